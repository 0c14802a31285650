"""Deltas applied: exact for weights and files, no wrong base accepted, no damage restored, nothing half written."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
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
    assert_weights,
    copies,
    nothing_left,
    other_files,
    same_bits,
    save,
    tree,
    weights,
    with_weights,
)
from test_codec import DTYPE_LIST, special_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtllama import folders
from mtllama.errors import UserError
from mtllama.weights import codec, delta, restore
from mtllama.weights.manifest import DELTA_JSON, FILES, FORMAT_VERSION, Manifest, Mode, sha256_json
from mtllama.weights.shards import BIN_SINGLE, SINGLE, CheckpointReader


def test_the_target_comes_back_weights_and_files(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    summary = apply(pico, made, tmp_path / "restored")
    assert_restored(tmp_path / "restored", target)
    names = {path.name for path in other_files(tmp_path / "restored")}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert names >= wanted | {folders.MANIFEST}
    before, after = weights(pico), weights(tmp_path / "restored")
    share = sum(float((before[name] != after[name]).float().mean()) for name in before) / len(before)
    assert share > 0.2, "base and target do differ"
    assert (summary.num_tensors, summary.num_equal) == (len(before), 1)
    assert summary.num_weights == sum(tensor.numel() for tensor in before.values()) and summary.bits_per_weight == 16
    assert list(CheckpointReader(tmp_path / "restored")) == list(CheckpointReader(target))


def test_transformers_loads_what_was_restored(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    apply(pico, made, tmp_path / "restored")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "restored", target))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "restored")("a b").input_ids == AutoTokenizer.from_pretrained(target)("a b").input_ids


def test_what_is_promised_is_what_is_known(pico: Path, made: Path, added: Path) -> None:
    assert restore.open_target(pico, [made]).promise == "every one as recorded (SHA-256)"
    inexact = sum(entry.num_inexact for entry in Manifest.read(added).entries.values())
    assert f"; {inexact:,} weights are not the target's" in restore.open_target(pico, [added]).promise
    assert "no record to compare with" in restore.open_target(pico, [made], scales=[0.5]).promise


@pytest.mark.filterwarnings("error::UserWarning")
def test_in_memory_every_tensor_is_as_on_disk_and_may_be_written_to(tmp_path: Path) -> None:
    pairs = {str(dtype): special_pair(dtype, 8) for dtype in DTYPE_LIST}
    pairs |= {"scalar": (torch.tensor(1.0), torch.tensor(2.0)), "empty": (torch.zeros(0, 3), torch.zeros(0, 3))}
    base, target = (save({name: pair[side].clone() for name, pair in pairs.items()}, tmp_path / str(side)) for side in (0, 1))
    delta.make(base, target, tmp_path / "delta")
    found = dict(restore.open_target(base, [tmp_path / "delta"]).tensors())
    assert_weights(found, weights(target))
    for tensor in found.values():
        tensor.zero_()
    assert_weights(dict(restore.open_target(base, [tmp_path / "delta"]).tensors(workers=1)), weights(target))


def test_a_base_in_bin_shards_is_the_same_base(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    torch.save(weights(pico), base / BIN_SINGLE)
    apply(base, made, tmp_path / "restored")
    assert_restored(tmp_path / "restored", target)


def other_values(tensors: Tensors) -> None:
    tensors[Q][3, 5] += 0.25


def other_zero(tensors: Tensors) -> None:
    assert tensors[NORM][0] == 1
    tensors[NORM][0] = 1.0078125  # the next bf16


def other_shape(tensors: Tensors) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING][:-1].clone()


def reshaped(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].reshape(32, 128).clone()  # the same bytes


def other_dtype(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].view(torch.float16).clone()  # the same bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_values, f"{Q} differs in its values"),
        (other_zero, f"{NORM} differs in its values"),
        (other_shape, rf"{EMBEDDING} has the shape \[599, 64\], not \[600, 64\]"),
        (reshaped, rf"{Q} has the shape \[32, 128\], not \[64, 64\]"),
        (other_dtype, f"{Q} is F16, not BF16"),
        (lambda tensors: tensors.pop(Q), f"has no tensor {Q}"),
        (lambda tensors: tensors.update({EMBEDDING: -tensors[EMBEDDING], Q: -tensors[Q]}), f"{EMBEDDING} differs in its values"),
    ],
)
@pytest.mark.parametrize("mode", ["bits", "add"])
def test_a_wrong_base_is_refused_before_a_byte_is_written_and_the_tensor_named(
    pico: Path,
    made: Path,
    added: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tensors], Any],
    message: str,
    mode: Mode,
) -> None:
    base = with_weights(pico, tmp_path / "base", change)

    def no_folder(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a folder was begun")

    monkeypatch.setattr(folders, "new_folder", no_folder)
    with pytest.raises(UserError, match=rf"^wrong base: .*{message}.*the delta needs the pico$") as raised:
        apply(base, made if mode == "bits" else added, tmp_path / "restored")
    assert "\n" not in str(raised.value)
    assert nothing_left(tmp_path / "restored")


def test_a_wrong_base_is_fine_where_the_delta_does_not_use_it(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", lambda tensors: tensors.update({Q: tensors[Q].view(torch.int16).clone()}))
    delta.make(pico, target, tmp_path / "delta")
    base = with_weights(pico, tmp_path / "base", lambda tensors: tensors.update({Q: tensors[Q] * 2, "extra": torch.ones(3)}))
    apply(base, tmp_path / "delta", tmp_path / "restored")
    assert_restored(tmp_path / "restored", target)


def sampled(tensor: torch.Tensor) -> set[int]:
    """The places of a tensor, laid flat, that a manifest keeps."""
    return {(2 * k + 1) * tensor.numel() // 32 for k in range(16)}


def change_unsampled(name: str, size: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        flat = tensors[name].reshape(-1)
        place = next(place for place in range(len(flat) // 2, len(flat)) if place not in sampled(flat))
        flat[place] += size

    return change


def change_sampled(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        flat = tensors[name].reshape(-1)
        flat[max(sampled(flat))] += 0.5

    return change


@pytest.mark.parametrize("mode", ["bits", "add"])
def test_a_fast_check_takes_the_right_base_and_hashes_none_of_it(
    pico: Path, target: Path, made: Path, added: Path, tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "sha256", lambda *args: pytest.fail("a tensor of the base was hashed"))
    apply(pico, made if mode == "bits" else added, tmp_path / "restored", check="fast")
    if mode == "bits":
        assert_restored(tmp_path / "restored", target)
    with pytest.raises(BaseException, match="a tensor of the base was hashed"):
        apply(pico, made, tmp_path / "again", check="full")


@pytest.mark.parametrize("name", [Q, NORM])
def test_a_fast_check_refuses_what_a_sample_tells(pico: Path, made: Path, tmp_path: Path, name: str) -> None:
    base = with_weights(pico, tmp_path / "base", change_sampled(name))
    with pytest.raises(UserError, match=f"^wrong base: .*{name} differs in its values"):
        apply(base, made, tmp_path / "restored", check="fast")
    assert nothing_left(tmp_path / "restored")


@pytest.mark.parametrize("name", [Q, EMBEDDING, NORM])
@pytest.mark.parametrize("mode", ["bits", "add"])
def test_where_only_values_differ_that_are_not_sampled_the_result_tells_and_nothing_is_left(
    pico: Path, made: Path, added: Path, tmp_path: Path, name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, difference = with_weights(pico, tmp_path / "base", change_unsampled(name, 0.5)), made if mode == "bits" else added
    begun = []
    create = folders.new_folder
    monkeypatch.setattr(folders, "new_folder", lambda *args, **options: begun.append(args) or create(*args, **options))
    for check in restore.CHECKS:
        with pytest.raises(UserError, match=f"^wrong base: .*{name} differs in its values: .*that tensor was edited"):
            apply(base, difference, tmp_path / "restored", check=check)
        assert nothing_left(tmp_path / "restored")
        with pytest.raises(UserError, match=f"^wrong base: .*{name} differs in its values"):
            dict(restore.open_target(base, [difference]).tensors(check))
    assert len(begun) == 1, "only the fast check began to write"


@pytest.mark.parametrize("where", ["base weights", "base header", "delta weights", "delta header", "delta.json", "files"])
@pytest.mark.parametrize("mode", ["bits", "add"])
def test_a_flipped_bit_ends_in_an_error_or_does_no_harm(
    pico: Path, target: Path, made: Path, added: Path, tmp_path: Path, where: str, mode: Mode
) -> None:
    base, difference = copies(pico, made if mode == "bits" else added, tmp_path)
    apply(base, difference, tmp_path / "whole")
    shard = {"base": base, "delta": difference}.get(where.split()[0], base) / SINGLE
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    draw = random.Random(where)
    refused = 0
    for number in range(12):
        file, low = shard, 0
        if where == "delta.json":
            file = difference / DELTA_JSON
        elif where == "files":
            file = draw.choice(sorted((difference / FILES).iterdir()))
        size = file.stat().st_size
        low, high = (0, header) if where.endswith("header") else (header, size) if where.endswith("weights") else (0, size)
        place, bit = draw.randrange(low, high), draw.randrange(8)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        out = tmp_path / f"restored{number}"
        try:
            apply(base, difference, out)
        except UserError as error:
            assert "\n" not in str(error)
            assert nothing_left(out)
            refused += 1
        else:
            assert_restored(out, tmp_path / "whole")
            shutil.rmtree(out)
        file.write_bytes(whole)
    assert refused >= (12 if where in ("base weights", "delta.json", "files") else 6), refused


@pytest.mark.parametrize("length", [0, 1, 0.5, 0.999])
def test_coded_data_that_is_cut_off_is_named(pico: Path, made: Path, tmp_path: Path, length: float) -> None:
    base, difference = copies(pico, made, tmp_path)
    coded = weights(made)
    coded[Q] = coded[Q][: int(length * len(coded[Q])) if length != 1 else 1].clone()
    safetensors.torch.save_file(coded, difference / SINGLE)
    with pytest.raises(UserError, match=f"{difference}: {Q}: the delta is damaged \\(.+\\); fetch or make it again"):
        apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def test_coded_data_of_another_tensor_is_named(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = copies(pico, made, tmp_path)
    coded = weights(made)
    coded[Q], coded[EMBEDDING] = coded[EMBEDDING], coded[Q]
    safetensors.torch.save_file(coded, difference / SINGLE)
    with pytest.raises(UserError, match=f"{difference}: {EMBEDDING}: the delta is damaged"):
        apply(base, difference, tmp_path / "restored")
    coded[Q], coded[EMBEDDING] = coded[EMBEDDING], coded[Q]
    other = Q.replace("q_proj", "o_proj")
    coded[Q], coded[other] = coded[other], coded[Q]  # of the same shape: the SHA-256 tells, if nothing else does
    safetensors.torch.save_file(coded, difference / SINGLE)
    with pytest.raises(UserError, match=r"is damaged|is not the target"):
        apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def test_a_delta_whose_manifest_was_changed_is_refused(pico: Path, made: Path, tmp_path: Path) -> None:
    # One bit makes layers.1 of layers.0: a key that stands twice, of which JSON keeps the last.
    base, difference = copies(pico, made, tmp_path)
    text = (difference / DELTA_JSON).read_text(encoding="utf-8")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert text.count(f'"{name}": {{') == 1
    changed = text.replace(f'"{name}": {{', f'"{Q}": {{')
    assert len(json.loads(changed)["tensors"]) == len(json.loads(text)["tensors"]) - 1
    (difference / DELTA_JSON).write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match=r"delta\.json is damaged"):
        apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def sign(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a delta as someone would who knows the format: with a new SHA-256."""
    manifest = json.loads((folder / DELTA_JSON).read_text(encoding="utf-8"))
    assert manifest.pop("sha256") == sha256_json(manifest)
    change(manifest)
    folders.write_json(folder / DELTA_JSON, {**manifest, "sha256": sha256_json(manifest)})


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "sub/x", "..", "", ".", "../files/config.json"])
def test_a_file_name_that_leaves_its_folder_is_refused(pico: Path, made: Path, tmp_path: Path, name: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / "x").write_text("x", encoding="utf-8")
    (difference / FILES / "sub").mkdir()
    (difference / FILES / "sub" / "x").write_text("x", encoding="utf-8")
    digest = hashlib.sha256(b"x").hexdigest()
    if name.endswith("config.json"):
        digest = folders.sha256_file(difference / FILES / "config.json")
    sign(difference, lambda manifest: manifest["files"].update({name: digest}))
    with pytest.raises(UserError, match=r"leaves its folder; refused|is missing or damaged"):
        apply(base, difference, tmp_path / "deep" / "restored")
    assert nothing_left(tmp_path / "deep" / "restored") and not (tmp_path / "deep" / "x").exists()


Change = Callable[[dict[str, Any]], Any]


def entry(**changes: Any) -> Change:
    return lambda manifest: manifest["tensors"][Q].update(changes)


def base_entry(**changes: Any) -> Change:
    return lambda manifest: manifest["tensors"][Q]["base"].update(changes)


def without(*keys: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


CHANGES: dict[str, Change] = {
    "another kind": entry(kind="other"),
    "a sum of bytes": entry(kind="sum"),
    "a kind that is a list": entry(kind=[]),
    "equal, though it is not": entry(kind="equal"),
    "equal to nothing": lambda manifest: manifest["tensors"][Q].update(kind="equal", base=None),
    "no kind": without("tensors", Q, "kind"),
    "no base": without("tensors", Q, "base"),
    "no dtype": without("tensors", Q, "dtype"),
    "no shape": without("tensors", Q, "shape"),
    "no digest": without("tensors", Q, "sha256"),
    "no count": without("tensors", Q, "num_inexact"),
    "no norm": without("tensors", Q, "norm"),
    "no sample": without("tensors", Q, "base", "sample"),
    "no name of the base's tensor": without("tensors", Q, "base", "name"),
    "a base that is a number": entry(base=3),
    "an entry that is a number": lambda manifest: manifest["tensors"].update({Q: 3}),
    "an unknown dtype": entry(dtype="F17"),
    "a dtype that is a list": entry(dtype=["F16"]),
    "another dtype": entry(dtype="F16"),
    "another dtype of the base": base_entry(dtype="F16"),
    "another shape": entry(shape=[64, 65]),
    "a huge shape": entry(shape=[1 << 40, 1 << 40]),
    "a negative shape": entry(shape=[-64, -64]),
    "a shape of halves": entry(shape=[64.0, 64.0]),
    "a shape that is a number": entry(shape=4096),
    "another shape of the base": base_entry(shape=[32, 128]),
    "another shape of an equal tensor": lambda manifest: manifest["tensors"][NORM].update(shape=[8, 9]),
    "another digest": entry(sha256="0" * 64),
    "a digest that is a number": entry(sha256=0),
    "another digest of the base": base_entry(sha256="0" * 64),
    "another sample": base_entry(sample="00" * 32),
    "a short sample": base_entry(sample="00"),
    "a sample that is none": base_entry(sample="no hex"),
    "another tensor of the base": base_entry(name=NORM),
    "a tensor that the base lacks": base_entry(name="nothing"),
    "a tensor too many": lambda manifest: manifest["tensors"].update({"extra": manifest["tensors"][Q]}),
    "no tensors": lambda manifest: manifest.update(tensors={}),
    "a list of tensors": lambda manifest: manifest.update(tensors=[]),
    "tensors not there": without("tensors"),
    "files not there": without("files"),
    "a list of files": lambda manifest: manifest.update(files=["config.json"]),
    "a file that is gone": lambda manifest: manifest["files"].update(gone="0" * 64),
    "no name of the base": without("base_name"),
    "no mode": without("mode"),
    "another mode": lambda manifest: manifest.update(mode="xor"),
    "another format": lambda manifest: manifest.update(format="other"),
    "a newer version": lambda manifest: manifest.update(format_version=FORMAT_VERSION + 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_of_another_form_is_a_user_error(pico: Path, made: Path, tmp_path: Path, name: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    sign(difference, CHANGES[name])
    with pytest.raises(UserError, match=r"delta") as raised:
        apply(base, difference, tmp_path / "restored")
    assert "\n" not in str(raised.value)
    assert nothing_left(tmp_path / "restored")


def test_a_newer_and_an_older_format_say_so(made: Path, tmp_path: Path) -> None:
    difference = Path(shutil.copytree(made, tmp_path / "delta"))
    for version, mend in ((FORMAT_VERSION + 1, "update it"), (FORMAT_VERSION - 1, "make the delta again")):
        sign(difference, lambda manifest, version=version: manifest.update(format_version=version))
        with pytest.raises(UserError, match=f"format version {version}; this mtllama reads {FORMAT_VERSION}: {mend}$"):
            Manifest.read(difference)


def test_an_empty_folder_or_a_model_is_not_a_delta(pico: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no delta\.json"):
        apply(pico, tmp_path, tmp_path / "restored")
    for model in (pico, target):
        with pytest.raises(UserError, match=f"{model} is a model, not a delta"):
            apply(pico, model, tmp_path / "restored")
        with pytest.raises(UserError, match=f"{model} is a model, not a delta"):
            dict(restore.open_target(pico, [model]).tensors())
    assert nothing_left(tmp_path / "restored")


def test_a_missing_shard_of_the_delta_is_named(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / SINGLE).unlink()
    with pytest.raises(UserError, match=f"{difference} holds no weights"):
        apply(base, difference, tmp_path / "restored")
    kept = weights(made)
    del kept[Q]
    safetensors.torch.save_file(kept, difference / SINGLE)
    with pytest.raises(UserError, match=f"the difference of {Q} is missing"):
        apply(base, difference, tmp_path / "restored")


@pytest.mark.parametrize("mode", ["bits", "add"])
@pytest.mark.parametrize("side", ["base", "delta"])
def test_a_shard_that_is_cut_off_while_it_is_read_is_one_error_and_leaves_nothing(
    pico: Path, made: Path, added: Path, tmp_path: Path, side: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "SLICE", 1500)
    base, difference = copies(pico, made if mode == "bits" else added, tmp_path)
    # In mode bits coded data end with what is needed first, so the made ones are made again in slices of that size.
    if mode == "bits":
        delta.make(base, with_weights(pico, tmp_path / "target", add_noise), difference, overwrite=True)
    target, file = restore.open_target(base, [difference]), tmp_path / side / SINGLE
    before, threads = set(tmp_path.iterdir()), threading.active_count()
    os.truncate(file, file.stat().st_size * 2 // 3)
    for check in restore.CHECKS:
        with pytest.raises(UserError, match=f"{file} was cut off while it was read") as raised:
            restore.apply(target, tmp_path / "restored", base, difference, check=check, workers=3)
        assert "\n" not in str(raised.value)
        assert set(tmp_path.iterdir()) == before and threading.active_count() == threads


def test_a_full_disk_while_restoring_leaves_nothing(pico: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(restore.CheckpointWriter, "write", full)
    threads = threading.active_count()
    with pytest.raises(UserError, match="no space left on the disk"):
        apply(pico, made, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored") and threading.active_count() == threads


def test_output_is_not_overwritten_without_overwrite(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept", encoding="utf-8")
    actions: list[Callable[[bool], Any]] = [
        lambda overwrite: apply(pico, made, out, overwrite=overwrite),
        lambda overwrite: delta.make(pico, target, out, overwrite=overwrite),
    ]
    for act in actions:
        with pytest.raises(UserError, match="is not empty; choose another output folder, or pass --overwrite"):
            act(False)
        assert (out / "mine").read_text(encoding="utf-8") == "kept" and len(list(tmp_path.iterdir())) == 1
    actions[0](True)
    assert_restored(out, target)
    assert not (out / "mine").exists()


@pytest.mark.parametrize("place", ["base", "delta", "."])
def test_an_output_that_is_or_holds_an_input_is_refused_even_with_overwrite(pico: Path, made: Path, tmp_path: Path, place: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="is or holds the input"):
        apply(base, difference, tmp_path / place, overwrite=True)
    with pytest.raises(UserError, match="is or holds the input"):
        delta.make(base, difference, tmp_path / place, overwrite=True)
    assert tree(tmp_path) == before and before


def test_a_damaged_file_of_the_target_leaves_nothing(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / FILES / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or damaged"):
        apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def further(tensors: Tensors) -> None:
    """Another training of the same base."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        tensors[name] = (tensor.float() + 3e-3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


@pytest.fixture(scope="module")
def other(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A second target and its delta."""
    folder = tmp_path_factory.mktemp("other")
    target = with_weights(pico, folder / "target", further)
    delta.make(pico, target, folder / "made")
    return target, folder / "made"


def summed(base: Tensors, targets: Sequence[Tensors], scales: Sequence[float]) -> Tensors:
    """`theirs`: base + the sum of scale x (target - base), in float32, rounded once."""
    result = {}
    for name, before in base.items():
        total = before.float()
        for target, scale in zip(targets, scales, strict=True):
            total = total + scale * (target[name].float() - before.float())
        result[name] = total.to(before.dtype)
    return result


def combine(base: Path, made: Sequence[Path], out: Path, **options: Any) -> Tensors:
    """What is restored on disk; in memory it must be the same."""
    restore.apply(restore.open_target(base, made, **options), out, base, *made)
    found = weights(out)
    assert_weights(dict(restore.open_target(base, made, **options).tensors()), found)
    return found


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0, 1.7])
def test_a_scaled_difference_is_base_plus_scale_times_difference(
    pico: Path, target: Path, made: Path, tmp_path: Path, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "SLICE", 1500)
    difference = tmp_path / "delta"
    delta.make(pico, target, difference)
    ours = combine(pico, [difference], tmp_path / "out", scales=[scale])
    before, after = weights(pico), weights(target)
    assert_weights(ours, summed(before, [after], [scale]))
    if scale == 0:
        assert_weights(ours, before)
    else:
        assert sum(int((ours[name] != before[name]).sum()) for name in before) > 1000
    assert [path.name for path in other_files(tmp_path / "out")] == [path.name for path in other_files(target)]


def test_a_scale_of_one_is_the_target_itself(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    restore.apply(restore.open_target(pico, [made], scales=[1.0]), tmp_path / "out", pico, made)
    assert_restored(tmp_path / "out", target)


@pytest.mark.parametrize(("scales", "factors"), [((), (1, 1)), ((0.5,), (0.5, 0.5)), ((0.7, -0.2), (0.7, -0.2))])
def test_several_deltas_are_added_up_each_with_its_scale(
    pico: Path, target: Path, made: Path, other: tuple[Path, Path], tmp_path: Path, scales: tuple[float, ...], factors: tuple[float, ...]
) -> None:
    ours = combine(pico, [made, other[1]], tmp_path / "out", scales=scales)
    assert_weights(ours, summed(weights(pico), [weights(target), weights(other[0])], factors))


def test_deltas_of_both_modes_may_be_added_up(pico: Path, target: Path, added: Path, other: tuple[Path, Path], tmp_path: Path) -> None:
    ours = combine(pico, [added, other[1]], tmp_path / "out", scales=[0.3, 0.6])
    before, difference = weights(pico), weights(added)
    restored = {name: before[name] + difference[name] for name in before}
    assert_weights(ours, summed(before, [restored, weights(other[0])], [0.3, 0.6]))


@pytest.mark.parametrize("scales", [(), (0.5,)])
def test_only_the_tensors_that_match_a_pattern_change(
    pico: Path, target: Path, made: Path, tmp_path: Path, scales: tuple[float, ...]
) -> None:
    ours = combine(pico, [made], tmp_path / "out", only="model.layers.1.*_proj.weight", scales=scales)
    before, after = weights(pico), weights(target)
    theirs = summed(before, [after], scales) if scales else after
    meant = {name for name in before if name.startswith("model.layers.1.") and "_proj" in name}
    assert len(meant) == 7
    assert_weights(ours, {name: theirs[name] if name in meant else before[name] for name in before})


def test_tensors_that_the_base_has_not_and_whole_numbers_come_as_they_are(pico: Path, tmp_path: Path) -> None:
    """There is nothing to scale them from: zero would be a wrong buffer."""

    def more(tensors: Tensors) -> None:
        add_noise(tensors)
        tensors["model.rotary_emb.inv_freq"] = torch.linspace(1, 1e-4, 8)
        tensors["position_ids"] = torch.arange(10)
        tensors["steps"] = torch.tensor([7, 8])

    base = with_weights(pico, tmp_path / "base", lambda tensors: tensors.update(steps=torch.tensor([1, 2])))
    target = with_weights(pico, tmp_path / "target", more)
    delta.make(base, target, tmp_path / "delta")
    for number, options in enumerate(({"scales": [0.5]}, {"only": Q}, {"scales": [0.5], "only": Q})):
        ours = combine(base, [tmp_path / "delta"], tmp_path / f"out{number}", **options)
        for name in ("model.rotary_emb.inv_freq", "position_ids"):
            assert same_bits(ours[name], weights(target)[name]), (name, options)
        assert ours["steps"].tolist() == [1, 2], "the base's"


def test_rows_that_the_base_has_not_are_scaled_from_zero(pico: Path, tmp_path: Path) -> None:
    rows = torch.full((2, 64), 0.5, dtype=torch.bfloat16)
    target = with_weights(pico, tmp_path / "target", lambda tensors: tensors.update({EMBEDDING: torch.cat([tensors[EMBEDDING], rows])}))
    delta.make(pico, target, tmp_path / "delta")
    ours = combine(pico, [tmp_path / "delta"], tmp_path / "out", scales=[0.5])[EMBEDDING]
    assert torch.equal(ours, torch.cat([weights(pico)[EMBEDDING], rows / 2]))


def test_a_base_in_another_precision_is_scaled_in_that_of_the_target(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 50, dtype=torch.float64, generator=generator)
    base = save({"a": exact.float(), "wide": exact}, tmp_path / "base")
    target = save({"a": (exact * 1.01).bfloat16(), "wide": exact * 1.01}, tmp_path / "target")
    delta.make(base, target, tmp_path / "delta")
    ours = combine(base, [tmp_path / "delta"], tmp_path / "out", scales=[0.3])
    rounded = exact.float().bfloat16().float()
    assert same_bits(ours["a"], (rounded + 0.3 * ((exact * 1.01).bfloat16().float() - rounded)).bfloat16())
    assert same_bits(ours["wide"], exact + 0.3 * (exact * 1.01 - exact)), "float64 is not computed in float32"


def test_what_cannot_be_combined_is_one_clear_line(pico: Path, target: Path, made: Path, other: tuple[Path, Path], tmp_path: Path) -> None:
    for scales in ([1.0, 2.0, 3.0], [0.5, 0.5]):
        deltas = [made, other[1]] if len(scales) == 3 else [made]
        with pytest.raises(
            UserError, match=f"--scale is given {len(scales)} times for {len(deltas)} deltas; give it once, or once for each"
        ):
            restore.open_target(pico, deltas, scales=scales)
    with pytest.raises(UserError, match=r"--only 'layers\.\*' names no tensor; they are called like model\."):
        restore.open_target(pico, [made], only="layers.*")
    untied = with_weights(target, tmp_path / "untied", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2}))
    delta.make(pico, untied, tmp_path / "delta")
    with pytest.raises(UserError, match=f"do not restore models of one form: {HEAD} differs"):
        restore.open_target(pico, [made, tmp_path / "delta"])
    wrong = with_weights(pico, tmp_path / "base", other_values)
    with pytest.raises(UserError, match=f"wrong base: .*{Q} differs in its values"):
        restore.apply(restore.open_target(wrong, [made, other[1]]), tmp_path / "out", wrong, made, other[1])
    for place in (made, other[1]):
        with pytest.raises(UserError, match=f"is or holds the input {place}"):
            restore.apply(restore.open_target(pico, [made, other[1]]), place, pico, made, other[1], overwrite=True)
    assert nothing_left(tmp_path / "out")


KILLED = """
    # Runs `apply` in forks that kill themselves at the k-th thing they do to the file system, and prints what stands at `out`.
    import json, os, signal, sys
    from pathlib import Path
    from mtllama import folders
    from mtllama.weights import restore

    base, made, room = map(Path, sys.argv[1:4])

    def stands(out):
        return {path.name: folders.sha256_file(path) for path in out.iterdir()} if out.exists() else None

    def apply(out, overwrite):
        restore.apply(restore.open_target(base, [made]), out, base, made, overwrite=overwrite)

    apply(room / "whole", False)
    whole = stands(room / "whole")
    events, limit = 0, 1 << 30

    def hook(name, args):
        global events
        # Before the first folder is made there is only reading.
        if name == "os.mkdir" or events and name in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "os.listdir", "os.scandir"):
            events += 1
            if events == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    k = 0
    while True:
        k += 1
        for overwrite in (False, True):
            out = room / f"{k}{overwrite}"
            if overwrite:
                out.mkdir()
                (out / "old").write_text("old")
                old = stands(out)
            pid = os.fork()
            if not pid:
                events, limit = 0, k
                apply(out, overwrite)
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            found = stands(out)
            kind = "absent" if found is None else "whole" if found == whole else "old" if overwrite and found == old else "PART"
            print(json.dumps([os.WTERMSIG(status), overwrite, kind]), flush=True)
        if not status:
            break
"""


def test_killed_at_any_moment_it_never_leaves_a_part_of_the_output(pico: Path, made: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(pico), str(made), str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    seen = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    killed = [(overwrite, kind) for number, overwrite, kind in seen if number == signal.SIGKILL]
    assert len(killed) > 30, len(killed)
    assert not [each for each in seen if each[2] == "PART"]
    assert set(killed) >= {(False, "absent"), (True, "old"), (True, "whole")}
    assert seen[-1] == (0, True, "whole")


def test_a_damaged_delta_is_noticed_where_it_is_scaled_too(pico: Path, made: Path, tmp_path: Path) -> None:
    """Nothing is known of the result, but the delta's own target is."""
    source = shutil.copytree(made, tmp_path / "damaged")
    shard, noticed = source / SINGLE, 0
    content = shard.read_bytes()
    begin, draw = 8 + int.from_bytes(content[:8], "little"), random.Random(0)
    for _ in range(12):
        place = draw.randrange(begin, len(content))
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        for options in ({"scales": [0.5]}, {"scales": [0.5], "check": "fast"}):
            target = restore.open_target(pico, [source], scales=options["scales"])
            with pytest.raises(UserError):
                restore.apply(target, tmp_path / "out", pico, source, check=options.get("check", "full"))
            assert nothing_left(tmp_path / "out")
            noticed += 1
    assert noticed == 24
