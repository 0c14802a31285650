"""Weight deltas: exact for weights and files, no wrong base accepted, no damage restored, nothing half written."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtllama import folders
from mtllama.errors import UserError
from mtllama.weights import delta
from mtllama.weights.shards import BIN_SINGLE, INDEX, SINGLE, CheckpointReader, raw_bytes

Tensors = dict[str, torch.Tensor]
EMBEDDING, NORM, Q = "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def weights(folder: Path) -> Tensors:
    return dict(safetensors.torch.load_file(folder / SINGLE))


def with_weights(source: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a model folder, its weights changed in place by `change`."""
    shutil.copytree(source, folder)
    tensors = weights(source)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def add_noise(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name != NORM:  # one tensor stays equal
            scale = 1e-2 if tensor.ndim == 1 else 1e-3  # a norm's weights are 1, where bf16 is coarse
            tensors[name] = (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


@pytest.fixture(scope="module")
def target(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico after a training step: noise on its weights, and every kind of file beside them."""
    folder = with_weights(pico, tmp_path_factory.mktemp("delta") / "target", add_noise)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n", encoding="utf-8")
    (folder / "README.md").write_bytes("# Über\r\nmodel\n".encode())
    folders.write_manifest(folder, "model", name="pico + noise", format="mtllama")
    return folder


@pytest.fixture(scope="module")
def made(pico: Path, target: Path) -> Path:
    """The delta of the two."""
    out = target.parent / "made"
    delta.make(pico, target, out, base_name="the pico")
    return out


def assert_restored(restored: Path, target: Path) -> None:
    """Every tensor bit for bit and every other file byte for byte, and nothing else."""
    ours, theirs = CheckpointReader(restored), CheckpointReader(target)
    assert set(ours) == set(theirs) and len(theirs) > 0
    for name in theirs:
        assert ours.info(name) == theirs.info(name), name
        assert bytes(raw_bytes(ours.tensor(name))) == bytes(raw_bytes(theirs.tensor(name))), name
    for ours_file, theirs_file in zip(other_files(restored), other_files(target), strict=True):
        assert ours_file.name == theirs_file.name and ours_file.read_bytes() == theirs_file.read_bytes()


def other_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix not in (".safetensors", ".bin") and path.name != INDEX)


def round_trip(base: Path, target: Path, room: Path) -> tuple[delta.Summary, dict[str, Any]]:
    """Make, apply, compare; returns what `make` said and the manifest."""
    summary = delta.make(base, target, room / "delta")
    applied = delta.apply(base, room / "delta", room / "restored")
    assert_restored(room / "restored", target)
    assert (applied.num_tensors, applied.num_equal) == (summary.num_tensors, summary.num_equal)
    return summary, delta.read_delta(room / "delta")


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))


def test_the_target_comes_back_weights_and_files(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    summary = delta.apply(pico, made, tmp_path / "restored")
    assert_restored(tmp_path / "restored", target)
    names = {path.name for path in other_files(tmp_path / "restored")}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert names >= wanted | {folders.MANIFEST}
    before, after = weights(pico), weights(tmp_path / "restored")
    share = sum(float((before[name] != after[name]).float().mean()) for name in before) / len(before)
    assert share > 0.2, "base and target do differ"
    assert (summary.num_tensors, summary.num_equal) == (len(before), 1)
    assert summary.num_weights == sum(tensor.numel() for tensor in before.values()) and summary.bits_per_weight == 16


def test_transformers_loads_what_was_restored(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    delta.apply(pico, made, tmp_path / "restored")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "restored", target))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "restored")("a b").input_ids == AutoTokenizer.from_pretrained(target)("a b").input_ids


def test_a_delta_is_smaller_than_the_target_and_cannot_be_loaded_as_a_model(target: Path, made: Path) -> None:
    assert (made / SINGLE).stat().st_size < 0.8 * (target / SINGLE).stat().st_size
    assert not (made / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(made)


def test_the_manifest_describes_every_tensor_and_file(pico: Path, target: Path, made: Path) -> None:
    manifest = delta.read_delta(made)
    assert manifest["base_name"] == "the pico"
    before, after = weights(pico), weights(target)
    assert manifest["tensors"].keys() == after.keys()
    for name, entry in manifest["tensors"].items():
        for side, tensors in (("base", before), ("target", after)):
            digest = hashlib.sha256(bytes(raw_bytes(tensors[name]))).hexdigest()
            assert entry[side] == {"dtype": "BF16", "shape": list(tensors[name].shape), "sha256": digest}
    assert manifest["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in other_files(target)}


def change_nothing(tensors: Tensors) -> None:
    pass


def more_rows(tensors: Tensors) -> None:
    add_noise(tensors)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.ones(3, tensors[EMBEDDING].shape[1], dtype=torch.bfloat16)])


def another_dtype(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].float() * 1.5


def one_more(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING] * 2
    tensors["scale"] = torch.tensor(3.0)
    tensors["nothing"] = torch.zeros(0, 4)


def one_less(tensors: Tensors) -> None:
    del tensors[NORM]
    add_noise(tensors)


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (more_rows, {"whole": {EMBEDDING}, "equal": {NORM}}),
        (another_dtype, {"whole": {Q}, "difference": set()}),
        (one_more, {"whole": {"lm_head.weight", "scale", "nothing"}, "difference": set()}),
        (one_less, {"whole": set(), "equal": set()}),
    ],
)
def test_a_target_of_another_form_comes_back(
    pico: Path, tmp_path: Path, change: Callable[[Tensors], None], kinds: dict[str, set[str]]
) -> None:
    target = with_weights(pico, tmp_path / "target", change)
    _, manifest = round_trip(pico, target, tmp_path)
    for kind, names in kinds.items():
        assert {name for name, entry in manifest["tensors"].items() if entry["kind"] == kind} == names
    assert manifest["base_unused"] == sorted(weights(pico).keys() - weights(target).keys())


def test_equal_models_give_an_empty_delta_that_still_applies(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", change_nothing)
    summary, _ = round_trip(pico, target, tmp_path)
    assert summary.num_bytes == 0 and summary.num_equal == summary.num_tensors > 0
    assert not list((tmp_path / "delta").glob("*.safetensors"))


def test_small_shards_come_back_and_are_indexed(pico: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "MAX_SHARD_BYTES", 20_000)
    round_trip(pico, target, tmp_path)
    for folder in (tmp_path / "delta", tmp_path / "restored"):
        assert (folder / INDEX).is_file() and len(list(folder.glob("model-*.safetensors"))) > 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "restored", target))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_base_in_bin_shards_is_the_same_base(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    torch.save(weights(pico), base / BIN_SINGLE)
    delta.apply(base, made, tmp_path / "restored")
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
def test_a_wrong_base_is_refused_before_a_byte_is_written_and_the_tensor_named(
    pico: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensors], Any], message: str
) -> None:
    base = with_weights(pico, tmp_path / "base", change)

    def no_folder(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a folder was begun")

    monkeypatch.setattr(folders, "new_folder", no_folder)
    with pytest.raises(UserError, match=rf"wrong base: in? ?.*{message}.*the delta needs the pico|wrong base: .*{message}"):
        delta.apply(base, made, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def test_a_wrong_base_is_fine_where_the_delta_does_not_use_it(pico: Path, tmp_path: Path) -> None:
    target = with_weights(pico, tmp_path / "target", lambda tensors: tensors.update({Q: tensors[Q].float()}))
    delta.make(pico, target, tmp_path / "delta")
    base = with_weights(pico, tmp_path / "base", lambda tensors: tensors.update({Q: tensors[Q] * 2}))
    delta.apply(base, tmp_path / "delta", tmp_path / "restored")
    assert_restored(tmp_path / "restored", target)


def copies(pico: Path, made: Path, room: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(pico, room / "base")), Path(shutil.copytree(made, room / "delta"))


@pytest.mark.parametrize("where", ["base weights", "base header", "delta weights", "delta header", "delta.json", "files"])
def test_a_flipped_bit_ends_in_an_error_or_does_no_harm(pico: Path, target: Path, made: Path, tmp_path: Path, where: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    shard = {"base": base, "delta": difference}.get(where.split()[0], base) / SINGLE
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    draw = random.Random(where)
    refused = 0
    for number in range(20):
        file, low = shard, 0
        if where == "delta.json":
            file = difference / delta.DELTA_JSON
        elif where == "files":
            file = draw.choice(sorted((difference / delta.FILES).iterdir()))
        size = file.stat().st_size
        low, high = (0, header) if where.endswith("header") else (header, size) if where.endswith("weights") else (0, size)
        place, bit = draw.randrange(low, high), draw.randrange(8)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        out = tmp_path / f"restored{number}"
        try:
            delta.apply(base, difference, out)
        except UserError as error:
            assert "\n" not in str(error)
            assert nothing_left(out)
            refused += 1
        else:
            assert_restored(out, target)
        file.write_bytes(whole)
    assert refused >= (20 if where in ("base weights", "delta.json", "files") else 10), refused
    delta.apply(base, difference, tmp_path / "whole")
    assert_restored(tmp_path / "whole", target)


def test_a_delta_whose_manifest_was_changed_is_refused(pico: Path, made: Path, tmp_path: Path) -> None:
    # One bit makes layers.1 of layers.0: a key that stands twice, of which JSON keeps the last.
    base, difference = copies(pico, made, tmp_path)
    text = (difference / delta.DELTA_JSON).read_text(encoding="utf-8")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert text.count(f'"{name}"') == 1
    changed = text.replace(f'"{name}"', f'"{Q}"')
    assert len(json.loads(changed)["tensors"]) == len(json.loads(text)["tensors"]) - 1
    (difference / delta.DELTA_JSON).write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match=r"delta\.json is damaged"):
        delta.apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def sign(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a delta as someone would who knows the format: with a new SHA-256."""
    manifest = json.loads((folder / delta.DELTA_JSON).read_text(encoding="utf-8"))
    assert manifest.pop("sha256") == delta.sha256_json(manifest)
    change(manifest)
    folders.write_json(folder / delta.DELTA_JSON, {**manifest, "sha256": delta.sha256_json(manifest)})


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "sub/x", "..", "", ".", "../files/config.json"])
def test_a_file_name_that_leaves_its_folder_is_refused(pico: Path, made: Path, tmp_path: Path, name: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / "x").write_text("x", encoding="utf-8")
    (difference / delta.FILES / "sub").mkdir()
    (difference / delta.FILES / "sub" / "x").write_text("x", encoding="utf-8")
    digest = hashlib.sha256(b"x").hexdigest()
    if name.endswith("config.json"):
        digest = folders.sha256_file(difference / delta.FILES / "config.json")
    sign(difference, lambda manifest: manifest["files"].update({name: digest}))
    with pytest.raises(UserError, match=r"leaves its folder; refused|is missing or damaged"):
        delta.apply(base, difference, tmp_path / "deep" / "restored")
    assert nothing_left(tmp_path / "deep" / "restored") and not (tmp_path / "deep" / "x").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["tensors"][Q].update(kind="other"),
        lambda manifest: manifest["tensors"][Q].pop("kind"),
        lambda manifest: manifest["tensors"][Q].pop("base"),
        lambda manifest: manifest["tensors"][Q].pop("target"),
        lambda manifest: manifest["tensors"][Q].update(target=3),
        lambda manifest: manifest["tensors"].update({Q: 3}),
        lambda manifest: manifest["tensors"][Q]["target"].update(dtype="F17"),
        lambda manifest: manifest["tensors"][Q]["target"].update(dtype=["F16"]),
        lambda manifest: manifest["tensors"][Q]["target"].update(dtype="F16"),
        lambda manifest: manifest["tensors"][Q]["target"].update(shape=[64, 65]),
        lambda manifest: manifest["tensors"][Q]["target"].update(shape=[-64, -64]),
        lambda manifest: manifest["tensors"][Q]["target"].update(shape=[32, 128]),
        lambda manifest: manifest["tensors"][Q]["target"].update(shape=4096),
        lambda manifest: manifest["tensors"][NORM]["target"].update(shape=[8, 8]),
        lambda manifest: manifest["tensors"][Q]["target"].update(sha256="0" * 64),
        lambda manifest: manifest["tensors"].update({"extra": manifest["tensors"][Q]}),
        lambda manifest: manifest.update(tensors={}),
        lambda manifest: manifest.update(tensors=[]),
        lambda manifest: manifest.pop("tensors"),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=["config.json"]),
        lambda manifest: manifest["files"].update(gone="0" * 64),
        lambda manifest: manifest.pop("base_name"),
        lambda manifest: manifest.update(format="other"),
        lambda manifest: manifest.update(format_version=3),
    ],
)
def test_a_manifest_of_another_form_is_a_user_error(
    pico: Path, made: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    base, difference = copies(pico, made, tmp_path)
    sign(difference, change)
    with pytest.raises(UserError, match=r"delta"):
        delta.apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def test_a_newer_format_says_so(made: Path, tmp_path: Path) -> None:
    difference = Path(shutil.copytree(made, tmp_path / "delta"))
    sign(difference, lambda manifest: manifest.update(format_version=3))
    with pytest.raises(UserError, match="format version 3; this mtllama reads 2: update it"):
        delta.read_delta(difference)


def test_a_model_or_an_empty_folder_is_not_a_delta(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a model, not a delta"):
        delta.apply(pico, pico, tmp_path / "restored")
    with pytest.raises(UserError, match=r"has no delta\.json"):
        delta.apply(pico, tmp_path, tmp_path / "restored")


def test_a_missing_shard_of_the_delta_is_named(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / SINGLE).unlink()
    with pytest.raises(UserError, match=f"{difference} holds no weights"):
        delta.apply(base, difference, tmp_path / "restored")
    kept = weights(made)
    del kept[Q]
    safetensors.torch.save_file(kept, difference / SINGLE)
    with pytest.raises(UserError, match=f"the difference of {Q} is missing"):
        delta.apply(base, difference, tmp_path / "restored")


def test_output_is_not_overwritten_without_overwrite(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept", encoding="utf-8")
    actions: list[Callable[[bool], Any]] = [
        lambda overwrite: delta.apply(pico, made, out, overwrite=overwrite),
        lambda overwrite: delta.make(pico, target, out, overwrite=overwrite),
    ]
    for act in actions:
        with pytest.raises(UserError, match="is not empty; choose another --out, or pass --overwrite"):
            act(False)
        assert (out / "mine").read_text(encoding="utf-8") == "kept" and len(list(tmp_path.iterdir())) == 1
    actions[0](True)
    assert_restored(out, target)
    assert not (out / "mine").exists()


@pytest.mark.parametrize("place", ["base", "delta", "."])
def test_an_output_that_is_or_holds_an_input_is_refused_even_with_overwrite(pico: Path, made: Path, tmp_path: Path, place: str) -> None:
    base, difference = copies(pico, made, tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is or holds the input"):
        delta.apply(base, difference, tmp_path / place, overwrite=True)
    with pytest.raises(UserError, match="is or holds the input"):
        delta.make(base, difference, tmp_path / place, overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before and before


def test_a_damaged_file_of_the_target_leaves_nothing(pico: Path, made: Path, tmp_path: Path) -> None:
    base, difference = copies(pico, made, tmp_path)
    (difference / delta.FILES / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or damaged"):
        delta.apply(base, difference, tmp_path / "restored")
    assert nothing_left(tmp_path / "restored")


def test_an_error_while_making_leaves_nothing(pico: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(delta.codec, "encode", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        delta.make(pico, target, tmp_path / "delta")
    assert nothing_left(tmp_path / "delta")


KILLED = """
    # Runs `apply` in forks that kill themselves at the k-th thing they do to the file system, and prints what stands at `out`.
    import json, os, signal, sys
    from pathlib import Path
    from mtllama import folders
    from mtllama.weights import delta

    base, made, room = map(Path, sys.argv[1:4])

    def stands(out):
        return {path.name: folders.sha256_file(path) for path in out.iterdir()} if out.exists() else None

    delta.apply(base, made, room / "whole")
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
                delta.apply(base, made, out, overwrite=overwrite)
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


def test_the_target_is_verified_and_what_was_restored_too(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    delta.apply(pico, made, tmp_path / "restored")
    assert delta.verify(target, made) == delta.verify(tmp_path / "restored", made) == len(weights(target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[Q].view(torch.int16)[3, 5].bitwise_xor_(1), f"tensor {Q}: its values differ"),
        (lambda tensors: tensors.update({Q: tensors[Q].float()}), f"tensor {Q}: its dtype is F32, not BF16"),
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
    with pytest.raises(UserError, match="is not the target of"):
        delta.verify(pico, made)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("level", ["fast", "default"])
def test_every_level_and_number_of_threads_restores_the_target(pico: Path, target: Path, tmp_path: Path, level: Any, workers: int) -> None:
    delta.make(pico, target, tmp_path / "delta", level=level, workers=workers)
    delta.apply(pico, tmp_path / "delta", tmp_path / "restored", workers=workers)
    assert_restored(tmp_path / "restored", target)


def test_no_threads_at_all_are_refused(pico: Path, target: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers is 0; at least 1 is needed"):
        delta.make(pico, target, tmp_path / "delta", workers=0)
    with pytest.raises(UserError, match="--workers is 0; at least 1 is needed"):
        delta.apply(pico, made, tmp_path / "restored", workers=0)
    assert not list(tmp_path.iterdir())
