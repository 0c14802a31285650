"""Deltas as they are made: what stands in them for every kind of change, their manifest and card, and `verify`."""

import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EMBEDDING,
    HEAD,
    NORM,
    Q,
    Tensors,
    add_noise,
    apply,
    assert_restored,
    nothing_left,
    other_files,
    round_trip,
    same_bits,
    save,
    tree,
    weights,
    with_weights,
)
from test_codec import DTYPE_LIST, special_pair
from transformers import AutoModelForCausalLM

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model.find import ModelFolder, find_model
from mtllama.model.load import load_model
from mtllama.weights import card, codec, delta
from mtllama.weights.codec import LEVELS, Level
from mtllama.weights.manifest import DELTA_JSON, FILES, Manifest, Mode
from mtllama.weights.shards import BIN_SINGLE, INDEX, SINGLE, CheckpointReader, CheckpointWriter, raw_bytes


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(bytes(raw_bytes(tensor))).hexdigest()


def test_the_manifest_describes_every_tensor_and_file(pico: Path, target: Path, made: Path) -> None:
    manifest = Manifest.read(made)
    assert (manifest.mode, manifest.base_name) == ("bits", "the pico")
    before, after = weights(pico), weights(target)
    assert manifest.entries.keys() == after.keys() and len(after) > 10
    for name, entry in manifest.entries.items():
        old, new = before[name], after[name]
        assert entry.base is not None and entry.base.name == name
        assert (entry.sha256, entry.restored_sha256, entry.base.sha256) == (digest(new), digest(new), digest(old))
        for info, tensor in ((entry.info, new), (entry.base.info, old)):
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.kind == ("equal" if name == NORM else "difference")
        assert (entry.num_equal, entry.num_inexact) == (int((old == new).sum()), 0)
        assert entry.norm == pytest.approx((new.double() - old.double()).norm().item())
        assert entry.base_norm == pytest.approx(old.double().norm().item(), rel=1e-5), (
            "added up in float32, in another order on each processor"
        )
        places = [(2 * k + 1) * old.numel() // 32 for k in range(16)]
        assert entry.base.sample == bytes(raw_bytes(old.reshape(-1)[places]))
    assert manifest.files == {path.name: folders.sha256_file(path) for path in other_files(target)} != {}
    assert manifest.base_files == {path.name: folders.sha256_file(path) for path in other_files(pico)} != {}
    assert manifest.base_config == folders.read_json(pico / "config.json")
    assert manifest.versions == folders.versions() and manifest.versions["mtllama"]


def test_a_manifest_that_is_written_is_read_as_it_was(made: Path, added: Path, tmp_path: Path) -> None:
    for folder in (made, added):
        manifest = Manifest.read(folder)
        manifest.write(tmp_path)
        assert Manifest.read(tmp_path) == manifest
        assert (tmp_path / DELTA_JSON).read_bytes() == (folder / DELTA_JSON).read_bytes()


def test_a_delta_is_smaller_than_the_target_and_holds_all_its_other_files(target: Path, made: Path) -> None:
    assert (made / SINGLE).stat().st_size < 0.8 * (target / SINGLE).stat().st_size
    assert {path.name: path.read_bytes() for path in (made / FILES).iterdir()} == {p.name: p.read_bytes() for p in other_files(target)}


def test_nothing_loads_a_delta_as_a_model(made: Path, added: Path) -> None:
    for folder in (made, added):
        with pytest.raises(UserError, match="is a delta, not a model: pass --base B --delta"):
            find_model(str(folder))
    with pytest.raises(ValueError, match=card.MODEL_TYPE):
        AutoModelForCausalLM.from_pretrained(made)
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_model(ModelFolder(made, "a delta"))


def change_nothing(tensors: Tensors) -> None:
    pass


def more_rows(tensors: Tensors) -> None:
    add_noise(tensors)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.ones(3, tensors[EMBEDDING].shape[1], dtype=torch.bfloat16)])


def fewer_rows(tensors: Tensors) -> None:
    add_noise(tensors)
    tensors[EMBEDDING] = tensors[EMBEDDING][:-7].clone()


def untied(tensors: Tensors) -> None:
    add_noise(tensors)
    tensors[HEAD] = tensors[EMBEDDING] + 0.01


def wider(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].float() * 1.5


def turned(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].reshape(32, 128) * 2


def of_whole_numbers(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].view(torch.int16).clone()


def more_tensors(tensors: Tensors) -> None:
    tensors["model.rotary_emb.inv_freq"] = torch.linspace(1, 1e-4, 8)
    tensors["scale"] = torch.tensor(3.0)
    tensors["nothing"] = torch.zeros(0, 4)
    tensors["mask"] = torch.arange(6) % 2 == 0


def fewer_tensors(tensors: Tensors) -> None:
    del tensors[NORM]
    add_noise(tensors)


@pytest.mark.parametrize("mode", ["bits", "add"])
@pytest.mark.parametrize(
    ("change", "alone"),
    [
        (more_rows, set()),
        (fewer_rows, set()),
        (untied, set()),
        (wider, set()),
        (turned, {Q}),
        (of_whole_numbers, {Q}),
        (more_tensors, {"model.rotary_emb.inv_freq", "scale", "nothing", "mask"}),
        (fewer_tensors, set()),
    ],
)
def test_a_target_of_another_form_comes_back(
    pico: Path, tmp_path: Path, change: Callable[[Tensors], None], alone: set[str], mode: Mode
) -> None:
    """`alone`: the tensors for which the base has nothing to compare with."""
    target = with_weights(pico, tmp_path / "target", change)
    before, after = weights(pico), weights(target)
    if mode == "add":
        if change is more_tensors:
            with pytest.raises(UserError, match=r"^mask holds booleans, which have no arithmetic difference; use --mode bits$"):
                delta.make(pico, target, tmp_path / "delta", mode=mode)
            assert nothing_left(tmp_path / "delta")
            return
        delta.make(pico, target, tmp_path / "delta", mode=mode)
        apply(pico, tmp_path / "delta", tmp_path / "restored")
        assert {name: (t.dtype, t.shape) for name, t in weights(tmp_path / "restored").items()} == {
            name: (t.dtype, t.shape) for name, t in after.items()
        }
        manifest = Manifest.read(tmp_path / "delta")
    else:
        _, manifest = round_trip(pico, target, tmp_path)
        equal = {name for name in after if name in before and same_bits(before[name], after[name])}
        assert {name for name, entry in manifest.entries.items() if entry.kind == "equal"} == equal
    assert {name for name, entry in manifest.entries.items() if entry.base is None} == alone
    assert manifest.base_unused == sorted(before.keys() - after.keys())


def test_rows_that_the_base_has_are_compared_with_it_and_new_ones_count_from_zero(pico: Path, tmp_path: Path) -> None:
    before = weights(pico)[EMBEDDING]
    new = torch.cat([torch.zeros(2, 64), torch.ones(1, 64)]).bfloat16()
    target = with_weights(pico, tmp_path / "target", lambda tensors: tensors.update({EMBEDDING: torch.cat([before, new])}))
    _, manifest = round_trip(pico, target, tmp_path)
    entry = manifest.entries[EMBEDDING]
    assert entry.num_equal == before.numel() + 2 * 64
    assert entry.norm == pytest.approx(8), "64 ones"
    assert CheckpointReader(tmp_path / "delta").info(EMBEDDING).size < 500


def test_the_head_of_an_untied_target_is_compared_with_the_embedding_of_a_tied_base(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", untied)
    _, manifest = round_trip(pico, target, tmp_path)
    base = manifest.entries[HEAD].base
    assert base is not None and base.name == EMBEDDING
    assert CheckpointReader(tmp_path / "delta").info(HEAD).size < 0.7 * weights(target)[HEAD].nbytes


def test_a_tied_target_of_an_untied_base_comes_back_without_its_head(pico: Path, tmp_path: Path) -> None:
    base = with_weights(pico, tmp_path / "base", untied)
    target = with_weights(pico, tmp_path / "target", add_noise)
    _, manifest = round_trip(base, target, tmp_path)
    assert manifest.base_unused == [HEAD] and HEAD not in weights(tmp_path / "restored")


PRECISIONS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("of_base", "of_target"), PRECISIONS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("mode", ["bits", "add"])
def test_a_base_in_another_precision_counts_as_rounded(tmp_path: Path, of_base: torch.dtype, of_target: torch.dtype, mode: Mode) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(100, 60, dtype=torch.float64, generator=generator)
    tuned = exact * (1 + 0.01 * torch.randn(100, 60, dtype=torch.float64, generator=generator))
    base = save({"a": exact.to(of_base), "same": exact.to(of_base).clone()}, tmp_path / "base")
    rounded = exact.to(of_base).to(of_target)
    target = save({"a": tuned.to(of_target), "same": rounded}, tmp_path / "target")
    delta.make(base, target, tmp_path / "delta", mode=mode)
    apply(base, tmp_path / "delta", tmp_path / "restored")
    manifest = Manifest.read(tmp_path / "delta")
    same = manifest.entries["same"]
    assert same.base is not None and same.base.info.dtype == of_base and same.info.dtype == of_target
    assert (same.num_equal, same.norm, same.kind) == (6000, 0, "difference" if mode == "bits" else "sum")
    restored = weights(tmp_path / "restored")
    assert torch.equal(restored["same"].double(), rounded.double())
    if mode == "bits":
        assert_restored(tmp_path / "restored", target)
        assert CheckpointReader(tmp_path / "delta").info("same").size < 200
    elif of_target.itemsize > 1:
        assert same_bits(restored["a"], rounded + (weights(target)["a"] - rounded))
        assert manifest.entries["a"].num_inexact == int((restored["a"] != weights(target)["a"]).sum())


@pytest.mark.parametrize("level", LEVELS)
def test_every_dtype_comes_back_from_any_values(tmp_path: Path, level: Level) -> None:
    """NaN with their payloads, infinities, zeros of both signs, subnormals, whole numbers and booleans; few and many."""
    few = {str(dtype): special_pair(dtype) for dtype in DTYPE_LIST}
    many = {f"{dtype} many": special_pair(dtype, 8) for dtype in DTYPE_LIST if dtype.is_floating_point}
    scalars = {f"{dtype} scalar": (base[0, 0], target[0, 1]) for dtype, (base, target) in few.items()}
    empty = {f"{dtype} empty": (base[:0], target[:0]) for dtype, (base, target) in few.items()}
    pairs = {**few, **many, **scalars, **empty}
    assert len(pairs) == 3 * 12 + 6 and min(base.numel() for base, _ in many.values()) > codec.SMALL
    base = save({name: pair[0].clone() for name, pair in pairs.items()}, tmp_path / "base")
    target = save({name: pair[1].clone() for name, pair in pairs.items()}, tmp_path / "target")
    _, manifest = round_trip(base, target, tmp_path, level=level)
    assert {name for name, entry in manifest.entries.items() if entry.kind == "equal"} == set(empty)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_norms_of_the_largest_numbers_are_numbers_that_json_has(tmp_path: Path) -> None:
    values = {"mask": torch.full((300, 10), torch.finfo(torch.float32).min), "wide": torch.full((9,), 1e200, dtype=torch.float64)}
    base = save(values, tmp_path / "base")
    target = save({name: -tensor for name, tensor in values.items()}, tmp_path / "target")
    _, manifest = round_trip(base, target, tmp_path)
    assert manifest.entries["mask"].base_norm == pytest.approx(torch.finfo(torch.float32).max * 3000**0.5)
    assert manifest.entries["wide"].norm == pytest.approx(sys.float_info.max**0.5)
    assert "Infinity" not in (tmp_path / "delta" / DELTA_JSON).read_text(encoding="utf-8")


def test_equal_models_give_an_empty_delta_that_still_applies(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", change_nothing)
    summary, _ = round_trip(pico, target, tmp_path)
    assert summary.num_bytes == 0 and summary.num_equal == summary.num_tensors > 0
    assert not list((tmp_path / "delta").glob("*.safetensors"))


def uneven(tensors: Tensors) -> None:
    """Every eighth row of the embedding changes, a hundred times as much as others do."""
    add_noise(tensors)
    noise = torch.randn(600, 64, generator=torch.Generator().manual_seed(2)) * (torch.arange(600) % 8 == 0)[:, None]
    tensors[EMBEDDING] = (tensors[EMBEDDING].float() + 0.1 * noise).bfloat16()


def test_a_lower_level_is_larger_and_each_comes_back(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", uneven)
    sizes, codings = [], []
    for level in LEVELS:
        summary, _ = round_trip(pico, target, tmp_path / level, level=level)
        sizes.append(summary.num_bytes)
        coded = weights(tmp_path / level / "delta")[EMBEDDING].numpy().tobytes()
        codings.append(coded[-4 - int.from_bytes(coded[-4:], "little")])
    assert codings == [codec.PLANES, codec.EXPONENTS, codec.CLASSES]
    assert 0.95 * sizes[0] > sizes[1] > sizes[2], sizes


def in_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    create = CheckpointWriter.__init__
    monkeypatch.setattr(
        CheckpointWriter, "__init__", lambda self, folder, bounds, metadata=None: create(self, folder, bounds, metadata, 20_000)
    )


def test_small_shards_come_back_and_are_indexed(pico: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_shards(monkeypatch)
    round_trip(pico, target, tmp_path)
    for folder in (tmp_path / "delta", tmp_path / "restored"):
        assert (folder / INDEX).is_file() and len(list(folder.glob("model-*.safetensors"))) > 1
        assert not list(folder.glob("part-*"))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "restored", target))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", ["bits", "add"])
def test_files_do_not_matter_only_tensors_do(pico: Path, target: Path, tmp_path: Path, mode: Mode) -> None:
    """Base and target in one file, in shards of any name, and as `.bin` give one and the same delta."""
    folders_of: dict[str, list[Path]] = {"base": [pico], "target": [target]}
    for side, source in (("base", pico), ("target", target)):
        tensors = weights(source)
        for kind in ("renamed", "bin"):
            folder = Path(shutil.copytree(source, tmp_path / kind / side, ignore=shutil.ignore_patterns("*.safetensors")))
            if kind == "bin":
                torch.save(tensors, folder / BIN_SINGLE)
            else:
                names = list(tensors)
                groups = {"one.safetensors": names[1::2], "another.safetensors": names[::2]}
                for file, group in groups.items():
                    save({name: tensors[name] for name in group}, folder)
                    (folder / SINGLE).rename(folder / file)
                folders.write_json(folder / INDEX, {"weight_map": {name: file for file, group in groups.items() for name in group}})
            folders_of[side].append(folder)
    made = []
    for number, (base, tuned) in enumerate(zip(folders_of["base"], folders_of["target"], strict=True)):
        delta.make(base, tuned, tmp_path / str(number), base_name="the pico", mode=mode)
        made.append({name: digest(tensor) for name, tensor in weights(tmp_path / str(number)).items()})
        made[-1] |= {f"entry of {name}": str(entry) for name, entry in Manifest.read(tmp_path / str(number)).entries.items()}
        apply(folders_of["base"][number - 1], tmp_path / str(number), tmp_path / f"restored{number}")
        if mode == "bits":
            assert_restored(tmp_path / f"restored{number}", target)
        else:
            assert_restored(tmp_path / f"restored{number}", tmp_path / "restored0")
    assert made[0] == made[1] == made[2] and len(made[0]) > 20


def test_in_mode_add_every_tensor_is_base_plus_delta_and_what_is_lost_is_counted(
    pico: Path, target: Path, added: Path, tmp_path: Path
) -> None:
    """`theirs`: torch's own sums and differences of the stored tensors."""
    summary = delta.make(pico, target, tmp_path / "delta", mode="add")
    assert tree(tmp_path / "delta")[SINGLE] == tree(added)[SINGLE]
    apply(pico, added, tmp_path / "restored")
    before, after, difference, ours = (weights(folder) for folder in (pico, target, added, tmp_path / "restored"))
    manifest, lost = Manifest.read(added), 0
    for name, new in after.items():
        assert same_bits(difference[name], new - before[name])
        theirs = before[name] + difference[name]
        assert same_bits(ours[name], theirs)
        wrong = int((theirs.view(torch.int16) != new.view(torch.int16)).sum())
        entry = manifest.entries[name]
        assert (entry.kind, entry.num_inexact) == ("sum", wrong)
        assert (entry.sha256, entry.restored_sha256) == (digest(new), digest(theirs))
        lost += wrong
    assert manifest.mode == "add" and summary.num_inexact == lost > 0
    said = f"The sum is rounded: {lost:,} of {summary.num_weights:,} weights do not come back exact."
    assert said in (added / "README.md").read_text(encoding="utf-8")


ADDED = [dtype for dtype in DTYPE_LIST if dtype != torch.bool]


@pytest.mark.parametrize("dtype", ADDED, ids=str)
def test_mode_add_adds_every_dtype_as_torch_does(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        pair = tuple((0.3 * torch.randn(50, 90, dtype=torch.float64, generator=generator)).to(dtype) for _ in range(2))
    else:
        pair = tuple(torch.randint(-99, 100, (50, 90), generator=generator).to(dtype) for _ in range(2))
    base, target = (save({"a": tensor}, tmp_path / name) for name, tensor in zip(("base", "target"), pair, strict=True))
    summary = delta.make(base, target, tmp_path / "delta", mode="add")
    apply(base, tmp_path / "delta", tmp_path / "restored")
    wide = torch.float32 if dtype.itemsize == 1 and dtype.is_floating_point else dtype
    before, after = (tensor.to(wide) for tensor in pair)
    difference = (after - before).to(dtype)
    theirs = (before + difference.to(wide)).to(dtype)
    ours = weights(tmp_path / "restored")["a"]
    assert same_bits(weights(tmp_path / "delta")["a"], difference) and same_bits(ours, theirs)
    pattern = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert summary.num_inexact == int((theirs.view(pattern) != pair[1].view(pattern)).sum())
    assert (summary.num_inexact > 0) == dtype.is_floating_point


def test_zeros_whose_sign_is_lost_and_values_that_are_no_numbers_count_as_inexact(tmp_path: Path) -> None:
    inf, nan = torch.inf, torch.nan
    base = save({"a": torch.tensor([0.0, -0.0, 1.0, inf, 1.0, 1.0, 2.0])}, tmp_path / "base")
    target = save({"a": torch.tensor([-0.0, -0.0, -0.0, inf, inf, nan, 2.5])}, tmp_path / "target")
    summary = delta.make(base, target, tmp_path / "delta", mode="add")
    apply(base, tmp_path / "delta", tmp_path / "restored")
    wrong = [
        a.view(torch.int32) != b.view(torch.int32) for a, b in zip(weights(tmp_path / "restored")["a"], weights(target)["a"], strict=True)
    ]
    assert summary.num_inexact == sum(wrong)
    assert [bool(each) for each in wrong[:5]] == [True, True, True, True, False] and not wrong[6]


def test_a_delta_of_mode_add_opens_in_transformers_as_the_plain_difference_and_says_what_it_is(
    pico: Path, target: Path, added: Path
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(added, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, after = weights(pico), weights(target)
    state = model.state_dict()
    assert all(torch.equal(state[name], after[name] - before[name]) for name in after)
    config = folders.read_json(added / "config.json")
    assert config.pop(card.MARKER)["mode"] == "add" and config == folders.read_json(target / "config.json")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (added / name).read_bytes() == (target / name).read_bytes()


def test_without_its_manifest_a_delta_of_mode_add_is_one_as_others_publish_it(pico: Path, added: Path, tmp_path: Path) -> None:
    apply(pico, added, tmp_path / "ours")
    plain = Path(shutil.copytree(added, tmp_path / "plain"))
    (plain / DELTA_JSON).unlink()
    apply(pico, plain, tmp_path / "theirs")
    assert tree(tmp_path / "theirs")[SINGLE] == tree(tmp_path / "ours")[SINGLE]


def front(made: Path) -> tuple[list[str], str]:
    """The lines of a card's head, and the rest."""
    text = (made / "README.md").read_text(encoding="utf-8")
    found = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    assert found
    return found[1].splitlines(), text[found.end() :]


@pytest.mark.parametrize(
    ("files", "head", "said"),
    [
        ({"README.md": "---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n"}, "license: apache-2.0", "licence is apache-2.0: it holds"),
        ({"README.md": "---\r\nlicense: 'llama2'\r\n---\r\n"}, "license: llama2", "licence is llama2: it holds"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: my-own-licence\n---\n", "LICENSE.txt": "..."},
            None,
            "licence is called my-own-licence: it holds",
        ),
        ({"LICENSE": "Terms", "USE_POLICY.md": "No"}, None, "licence is as in the base's LICENSE, USE_POLICY.md: it holds"),
        ({"README.md": "# no head\nlicense: mit\n", "Licence.md": "Terms"}, None, "licence is as in the base's Licence.md: it holds"),
        ({"README.md": "---\nlanguage: en\n---\nlicense: mit\n"}, None, "names no licence. Its terms hold for what is restored"),
        ({"README.md": b"---\nlicense: mit\n---\n\xff\xfe"}, "license: mit", "licence is mit: it holds"),
        ({}, None, "names no licence. Its terms hold for what is restored"),
    ],
)
def test_the_card_names_the_licence_of_the_base_or_says_that_there_is_none(
    pico: Path, target: Path, tmp_path: Path, files: dict[str, str | bytes], head: str | None, said: str
) -> None:
    base = Path(shutil.copytree(pico, tmp_path / "base"))
    for name, content in files.items():
        (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    delta.make(base, target, tmp_path / "delta", base_name="owner/the-pico")
    lines, text = front(tmp_path / "delta")
    assert said in text
    assert [line for line in lines if line.startswith("license")] == ([head] if head else [])
    assert "base_model: owner/the-pico" in lines
    assert "mtllama delta apply --base BASE --delta THIS_FOLDER --out MODEL" in text and "Every weight and every file comes back" in text


@pytest.mark.parametrize("mode", ["bits", "add"])
def test_the_number_of_threads_changes_no_byte(
    pico: Path, target: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "SLICE", 1500)
    trees = []
    for workers in (1, 2, 3, None):
        room = tmp_path / str(workers)
        delta.make(pico, target, room / "delta", mode=mode, level="small", workers=workers)
        apply(pico, room / "delta", room / "restored", workers=workers)
        trees.append(tree(room))
    assert trees[0] == trees[1] == trees[2] == trees[3] and len(trees[0]) >= 15
    if mode == "bits":
        assert_restored(tmp_path / "3" / "restored", target)


def test_no_threads_at_all_are_refused(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers is 0; at least 1 is needed"):
        delta.make(pico, target, tmp_path / "delta", workers=0)
    with pytest.raises(UserError, match="--workers is 0; at least 1 is needed"):
        apply(pico, made, tmp_path / "restored", workers=0)
    with pytest.raises(UserError, match="--workers is 0; at least 1 is needed"):
        delta.verify(target, made, workers=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["bits", "add"])
def test_a_target_that_is_cut_off_while_it_is_read_is_one_error_and_leaves_nothing(
    pico: Path, target: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "SLICE", 1500)
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    refuse = delta.refuse_inside

    def cut(out: Path, *inputs: Path) -> None:  # by now the files are open
        refuse(out, *inputs)
        os.truncate(copy / SINGLE, (copy / SINGLE).stat().st_size // 2)

    monkeypatch.setattr(delta, "refuse_inside", cut)
    threads = threading.active_count()
    with pytest.raises(UserError, match=f"{SINGLE} was cut off while it was read"):
        delta.make(pico, copy, tmp_path / "delta", mode=mode, workers=3)
    assert nothing_left(tmp_path / "delta") and threading.active_count() == threads


@pytest.mark.parametrize("place", ["encode", "files"])
def test_an_error_while_making_leaves_nothing(
    pico: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    if place == "encode":
        monkeypatch.setattr(codec.Encoder, "code", full)  # in a thread
    else:
        monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        delta.make(pico, target, tmp_path / "delta")
    assert nothing_left(tmp_path / "delta")


@pytest.mark.parametrize("mode", ["bits", "add"])
def test_the_target_is_verified_and_what_was_restored_too(
    pico: Path, target: Path, made: Path, added: Path, tmp_path: Path, mode: Mode
) -> None:
    difference = made if mode == "bits" else added
    apply(pico, difference, tmp_path / "restored")
    assert delta.verify(target, difference) == delta.verify(tmp_path / "restored", difference) == len(weights(target))
    with pytest.raises(UserError, match=r"is not the target of .*its values differ"):
        delta.verify(pico, difference)
    if mode == "add":  # is neither the target nor what comes back
        other = with_weights(tmp_path / "restored", tmp_path / "other", lambda tensors: tensors[Q].view(torch.int16)[3, 5].bitwise_xor_(1))
        with pytest.raises(UserError, match=f"tensor {Q}: its values differ"):
            delta.verify(other, difference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[Q].view(torch.int16)[3, 5].bitwise_xor_(1), f"tensor {Q}: its values differ"),
        (lambda tensors: tensors.update({Q: tensors[Q].float()}), f"tensor {Q}: its dtype is torch.float32, not torch.bfloat16"),
        (lambda tensors: tensors.update({Q: tensors[Q][1:].clone()}), f"tensor {Q}: its shape is"),
        (lambda tensors: tensors.pop(NORM), f"it has no tensor {NORM}"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "it has a tensor extra, which the target does not have"),
    ],
)
def test_what_is_not_the_target_is_named(target: Path, made: Path, tmp_path: Path, change: Any, message: str) -> None:
    other = with_weights(target, tmp_path / "other", change)
    with pytest.raises(UserError) as raised:
        delta.verify(other, made)
    assert message in str(raised.value) and "is not the target of" in str(raised.value)


def test_another_file_of_the_target_is_verified_too(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(target, tmp_path / "other"))
    (other / "README.md").write_text("another")
    with pytest.raises(UserError, match=r"the file README.md is missing or differs"):
        delta.verify(other, made)
    (other / "README.md").unlink()
    with pytest.raises(UserError, match=r"the file README.md is missing or differs"):
        delta.verify(other, made)
    with pytest.raises(UserError, match="is not the target of"):
        delta.verify(pico, made)


def test_what_of_the_targets_folder_is_not_in_the_delta_is_told(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", add_noise)
    (target / "original").mkdir()
    (target / "model.gguf").write_bytes(b"another form of the weights")
    (target / "notes.txt").write_text("carried", encoding="utf-8")
    (target / ".hidden").write_text("nobody asks", encoding="utf-8")
    summary = delta.make(pico, target, tmp_path / "delta")
    assert summary.left_out == ("model.gguf", "original")
    assert (tmp_path / "delta" / FILES / "notes.txt").is_file()
