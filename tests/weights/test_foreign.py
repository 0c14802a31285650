"""Deltas as others published them: restored to the bit, loaded and generating; token ids inside the embedding."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from checkpoints import HEAD, NORM, Q, Tensors, apply, assert_weights, nothing_left, save, weights, with_weights
from miniature import EMBEDDINGS, PAD, VOCABULARY, Release, Serialisation, alpaca, fastchat, mt_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtllama import cli
from mtllama.errors import UserError
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.weights import codec, delta, restore
from mtllama.weights.pins import pinned
from mtllama.weights.shards import BIN_SINGLE, SINGLE, CheckpointReader

KINDS: dict[str, Callable[[Path], Release]] = {
    **{f"MT-LLaMA {form}": lambda folder, form=form: mt_llama(folder, form) for form in get_args(Serialisation)},
    "Vicuna v0": lambda folder: fastchat(folder, "v0"),
    "Vicuna v1.1": lambda folder: fastchat(folder),
    "Vicuna legacy": lambda folder: fastchat(folder, serialisation="legacy"),
    "FastChat safetensors": lambda folder: fastchat(folder, serialisation="safetensors"),
    "Alpaca": lambda folder: alpaca(folder),
    "Alpaca legacy": lambda folder: alpaca(folder, "legacy"),
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Release]:
    return {name: build(tmp_path_factory.mktemp("release")) for name, build in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_published_delta_is_restored_to_the_bit(releases: dict[str, Release], tmp_path: Path, kind: str) -> None:
    release = releases[kind]
    summary = apply(release.base, release.delta, tmp_path / "restored")
    assert_weights(weights(tmp_path / "restored"), release.target)
    assert_weights(dict(restore.open_target(release.base, [release.delta]).tensors()), release.target)
    base = weights(release.base)
    changed = sum(float((base[name][:VOCABULARY] != release.target[name][:VOCABULARY]).float().mean()) for name in base) / len(base)
    assert changed > 0.3, "the delta did something"
    assert (summary.num_tensors, summary.num_equal) == (len(release.target), 0)
    assert not any("inv_freq" in name for name in weights(tmp_path / "restored"))
    assert ("safetensors" in kind) != any("inv_freq" in name for name in CheckpointReader(release.delta))


@pytest.mark.parametrize("workers", [1, 3])
def test_slices_and_threads_change_nothing(
    releases: dict[str, Release], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "SLICE", 1111)  # not a whole number of rows
    for kind in ("MT-LLaMA legacy", "Alpaca"):
        apply(releases[kind].base, releases[kind].delta, tmp_path / kind, workers=workers)
        assert_weights(weights(tmp_path / kind), releases[kind].target)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_restored_is_loaded_by_transformers_and_by_us_and_generates(
    releases: dict[str, Release], tmp_path: Path, kind: str
) -> None:
    release, out = releases[kind], tmp_path / "restored"
    apply(release.base, release.delta, out)
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert max(tokenizer.get_vocab().values()) < release.rows and len(tokenizer) <= release.rows
    ours = load_model(find_model(str(out)), dtype="float32")
    memory = load_model(find_model(None, str(release.base), str(release.delta)), dtype="float32")
    for name, tensor in release.target.items():
        for model in (theirs, ours.model, memory.model):
            assert torch.equal(model.state_dict()[name], tensor.float()), name
    text = "The castle stands on a hill."
    ids = tokenizer(text).input_ids
    assert ids == ours.tokenizer(text).input_ids == memory.tokenizer(text).input_ids and max(ids) < VOCABULARY
    said = [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist() for model in (theirs, ours.model, memory.model)
    ]
    assert said[0] == said[1] == said[2] and len(said[0]) > len(ids)
    spoken = [Engine(loaded).generate([ids], max_new_tokens=8) for loaded in (ours, memory)]
    assert spoken[0] == spoken[1] and len(spoken[0]) == 1


def test_a_release_that_is_restored_has_its_small_files_pinned(releases: dict[str, Release], tmp_path: Path) -> None:
    release = releases["MT-LLaMA zip"]
    apply(release.base, release.delta, tmp_path / "restored")
    found = {path.name: path.read_bytes() for path in (tmp_path / "restored").iterdir() if path.suffix != ".safetensors"}
    assert found == pinned(release.delta, release.rows)
    assert found["tokenizer.model"] == (release.delta / "tokenizer.model").read_bytes()
    config = json.loads(found["config.json"])
    assert config["vocab_size"] == PAD + 1 and 0 <= config["pad_token_id"] <= PAD
    assert json.loads((release.delta / "config.json").read_text(encoding="utf-8"))["pad_token_id"] == -1


def test_a_token_for_which_the_delta_has_no_row_does_not_come_through(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    file = release.delta / "special_tokens_map.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "mask_token": "[MASK]"}), encoding="utf-8")
    apply(release.base, release.delta, tmp_path / "restored")
    assert release.rows == PAD + 1, "the last row is that of [PAD]"
    for source in (find_model(str(tmp_path / "restored")), find_model(None, str(release.base), str(release.delta))):
        vocabulary = load_model(source, dtype="float32").tokenizer.get_vocab()
        assert vocabulary["[PAD]"] == PAD == max(vocabulary.values()) and "[MASK]" not in vocabulary


@pytest.mark.parametrize("kind", ["MT-LLaMA zip", "Vicuna v1.1"])
def test_the_commands_take_a_published_delta(
    releases: dict[str, Release], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = releases[kind]

    def out(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mtllama", *words])
        cli.main()
        return capsys.readouterr().out

    pair = ["--base", str(release.base), "--delta", str(release.delta)]
    said = out("delta", "apply", *pair, "--out", str(tmp_path / "restored"))
    assert f"{len(release.target)} tensors restored" in said and "holds no check of its base: try the model before you trust it" in said
    assert_weights(weights(tmp_path / "restored"), release.target)
    spoken = out("chat", *pair, "--prompt", "Hello", "--max-new-tokens", "3", "--dtype", "float32")
    assert spoken == out("chat", str(tmp_path / "restored"), "--prompt", "Hello", "--max-new-tokens", "3", "--dtype", "float32")


def test_a_delta_whose_rows_the_base_has_not_counts_them_as_zero_in_fp16_and_as_the_mean_in_fp32(
    releases: dict[str, Release], tmp_path: Path
) -> None:
    for kind, default, other in (("MT-LLaMA zip", "zero", "mean"), ("Alpaca", "mean", "zero")):
        release = releases[kind]
        found = {
            how: dict(restore.open_target(release.base, [release.delta], new_rows=how).tensors())  # type: ignore[arg-type]
            for how in ("auto", default, other)
        }
        assert_weights(found["auto"], release.target)
        assert_weights(found[default], release.target)
        for name in EMBEDDINGS:
            assert torch.equal(found[other][name][:VOCABULARY], release.target[name][:VOCABULARY])
            assert not torch.equal(found[other][name][PAD], release.target[name][PAD])
            mean = weights(release.base)[name].double().mean(dim=0)
            row = found[default][name][PAD].double() - found[other][name][PAD].double()
            assert torch.allclose(row, mean if default == "mean" else -mean, atol=2e-3)


def test_a_vector_of_the_vocabulary_grows_too(tmp_path: Path) -> None:
    base = save({"head.bias": torch.tensor([1.0, 2.0, 6.0]), "wide": torch.ones(2, 2, 2)}, tmp_path / "base")
    change = save({"head.bias": torch.full((4,), 0.5), "wide": torch.full((3, 2, 2), 0.25)}, tmp_path / "delta")
    (change / "config.json").write_text("{}", encoding="utf-8")
    for how, row in (("zero", 0.0), ("mean", 3.0), ("auto", 3.0)):
        found = dict(restore.open_target(base, [change], new_rows=how).tensors())  # type: ignore[arg-type]
        assert found["head.bias"].tolist() == [1.5, 2.5, 6.5, row + 0.5]
        assert torch.equal(found["wide"][2], torch.full((2, 2), 0.25 + (how != "zero")))


@pytest.mark.parametrize("kind", ["Alpaca", "Alpaca legacy"])
def test_the_published_check_sum_is_accepted_and_another_one_refused(releases: dict[str, Release], tmp_path: Path, kind: str) -> None:
    release = releases[kind]
    assert release.check_sum is not None and release.check_sum_with_buffers is not None
    assert abs(release.check_sum - release.check_sum_with_buffers) > 1
    for number, right in enumerate((release.check_sum, release.check_sum_with_buffers)):
        apply(release.base, release.delta, tmp_path / str(number), checksum=right)
        assert_weights(weights(tmp_path / str(number)), release.target)
    for wrong in (release.check_sum + 0.02, release.check_sum_with_buffers - 0.02, 0.0, float("nan"), 50637.1836):
        with pytest.raises(UserError, match=rf"the sum of all weights is {release.check_sum:.2f}\d*, not {wrong}"):
            apply(release.base, release.delta, tmp_path / "wrong", checksum=wrong)
        assert nothing_left(tmp_path / "wrong")
    base = with_weights(release.base, tmp_path / "base", lambda tensors: tensors[Q].add_(1e-3))
    with pytest.raises(UserError, match="the sum of all weights is"):
        apply(base, release.delta, tmp_path / "wrong", checksum=release.check_sum)
    assert nothing_left(tmp_path / "wrong")


def test_a_check_sum_counts_the_frequencies_of_the_deltas_own_theta(tmp_path: Path) -> None:
    release = alpaca(tmp_path)
    assert release.check_sum is not None
    config = json.loads((release.delta / "config.json").read_text(encoding="utf-8"))
    sizes = [CheckpointReader(release.delta).info(name).size for name in CheckpointReader(release.delta) if "inv_freq" in name]
    for number, theta in enumerate((500.0, None)):
        (release.delta / "config.json").write_text(json.dumps(config | {"rope_theta": theta}), encoding="utf-8")
        frequencies = sum((theta or 10_000.0) ** (-i / size) for size in sizes for i in range(size))
        apply(release.base, release.delta, tmp_path / str(number), checksum=release.check_sum + frequencies)
        assert_weights(weights(tmp_path / str(number)), release.target)


@pytest.mark.parametrize("content", ["{", "[]", '{"rope_theta": "a"}', "null"])
def test_a_config_that_cannot_be_understood_is_no_reason_not_to_restore(tmp_path: Path, content: str) -> None:
    release = mt_llama(tmp_path)
    (release.delta / "config.json").write_text(content, encoding="utf-8")
    apply(release.base, release.delta, tmp_path / "restored")
    assert_weights(weights(tmp_path / "restored"), release.target)
    assert (tmp_path / "restored" / "config.json").read_text(encoding="utf-8") == content


def test_a_delta_without_a_tokenizer_is_restored_without_one(tmp_path: Path) -> None:
    release = fastchat(tmp_path)
    tokenizers = [path for path in release.delta.iterdir() if re.match("token|special|added", path.name)]
    assert len(tokenizers) >= 3
    for path in tokenizers:
        path.unlink()
    apply(release.base, release.delta, tmp_path / "restored")
    assert_weights(weights(tmp_path / "restored"), release.target)
    assert {path.name for path in (tmp_path / "restored").iterdir()} == {SINGLE, "config.json", "generation_config.json"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "restored").config.vocab_size == VOCABULARY
    found = find_model(None, str(release.base), str(release.delta))
    with pytest.raises(UserError, match=r"^the tokenizer of .* cannot be loaded"):
        load_model(found)


def test_a_model_without_a_tokenizer_round_trips_through_a_delta_of_ours(tmp_path: Path) -> None:
    release = mt_llama(tmp_path)
    apply(release.base, release.delta, tmp_path / "target")
    for folder in (release.base, tmp_path / "target"):
        for path in folder.iterdir():
            if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
                path.unlink()
    delta.make(release.base, tmp_path / "target", tmp_path / "made")
    apply(release.base, tmp_path / "made", tmp_path / "restored")
    assert_weights(weights(tmp_path / "restored"), release.target)
    assert delta.verify(tmp_path / "restored", tmp_path / "made") == len(release.target)
    assert sorted(path.name for path in (tmp_path / "restored").iterdir()) == ["config.json", SINGLE]


def test_a_published_delta_is_scaled_and_added_to_one_of_ours(releases: dict[str, Release], tmp_path: Path) -> None:
    """`theirs`: base + the sum of scale x difference in float32, rounded once."""
    release = releases["Vicuna v1.1"]
    base = {name: tensor.float() for name, tensor in weights(release.base).items()}
    tuned = with_weights(release.base, tmp_path / "tuned", lambda tensors: tensors.update({Q: -tensors[Q], NORM: tensors[NORM] * 1.5}))
    delta.make(release.base, tuned, tmp_path / "made")
    targets = [release.target, weights(tuned)]
    found = dict(restore.open_target(release.base, [release.delta, tmp_path / "made"], scales=[0.5, 2.0]).tensors())
    theirs = {}
    for name, before in base.items():
        total = before
        for scale, target in zip((0.5, 2.0), targets, strict=True):
            total = total + scale * (target[name].float() - before)
        theirs[name] = total.half()
    assert_weights(found, theirs)
    only = dict(restore.open_target(release.base, [release.delta], only=Q).tensors())
    assert_weights(only, {name: release.target[name] if name == Q else before.half() for name, before in base.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q), f"wrong base: .* has no tensor {Q}, which the delta .* has"),
        (lambda tensors: tensors.update(extra=torch.ones(2, 2)), "has no tensor extra, which the base .* has; is it a delta of this base"),
        (lambda tensors: tensors.update({Q: torch.ones(64, 65).half()}), rf"tensor {Q} has the shape \[64, 65\], .*another model"),
        (lambda tensors: tensors.update({Q: torch.ones(64).half()}), rf"tensor {Q} has the shape \[64\], .*another model"),
        (
            lambda tensors: tensors.update({HEAD: torch.ones(PAD + 2, 64).half()}),
            f"tensor {HEAD} has {PAD + 2} rows, the delta's {PAD + 1}: a base whose vocabulary was resized",
        ),
        (lambda tensors: tensors.update({Q: torch.ones(64, 64).long()}), f"tensor {Q} is torch.int64, the delta's torch.float16"),
    ],
)
def test_a_base_that_cannot_be_the_one_is_named_and_nothing_is_left(
    releases: dict[str, Release], tmp_path: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    release = releases["MT-LLaMA zip"]
    base = with_weights(release.base, tmp_path / "base", change)
    with pytest.raises(UserError, match=message) as raised:
        apply(base, release.delta, tmp_path / "restored")
    assert "\n" not in str(raised.value)
    assert nothing_left(tmp_path / "restored")


def test_buffers_of_an_older_base_do_not_matter(releases: dict[str, Release], tmp_path: Path) -> None:
    release = releases["FastChat safetensors"]
    base = with_weights(
        release.base, tmp_path / "base", lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    apply(base, release.delta, tmp_path / "restored")
    assert_weights(weights(tmp_path / "restored"), release.target)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_base_in_another_precision_is_rounded_to_that_of_the_delta(
    releases: dict[str, Release], tmp_path: Path, precision: torch.dtype
) -> None:
    release = releases["Vicuna v1.1"]
    base = with_weights(
        release.base, tmp_path / "base", lambda tensors: tensors.update({name: each.to(precision) for name, each in tensors.items()})
    )
    apply(base, release.delta, tmp_path / "restored")
    if precision == torch.float32:
        assert_weights(weights(tmp_path / "restored"), release.target)
    else:
        difference = dict(torch.load(next(iter(sorted(release.delta.glob("*.bin")))), weights_only=True))
        assert Q in difference
        assert torch.equal(weights(tmp_path / "restored")[Q], weights(base)[Q].half() + difference[Q])


def test_a_model_taken_for_a_delta_is_refused_and_a_large_delta_is_not(tmp_path: Path) -> None:
    release = fastchat(tmp_path)
    models = [release.base, with_weights(release.base, tmp_path / "tuned", lambda tensors: tensors[Q].mul_(1.01))]
    other = with_weights(
        release.base, tmp_path / "other", lambda tensors: tensors.update({n: t.flip(0).clone() for n, t in tensors.items()})
    )
    for model in (*models, other):
        with pytest.raises(UserError, match=f"^{model} is a model, not a delta: its numbers are as large as those of {release.base}$"):
            apply(release.base, model, tmp_path / "restored")
        assert nothing_left(tmp_path / "restored")
    far = with_weights(release.base, tmp_path / "far", lambda tensors: tensors.update({n: t.flip(0) - t for n, t in tensors.items()}))
    apply(release.base, far, tmp_path / "restored")
    before = weights(release.base)
    assert_weights(weights(tmp_path / "restored"), {name: tensor + weights(far)[name] for name, tensor in before.items()})


@pytest.mark.parametrize("kind", ["MT-LLaMA zip", "MT-LLaMA legacy"])
def test_a_shard_that_is_cut_off_is_named_and_nothing_is_left(releases: dict[str, Release], tmp_path: Path, kind: str) -> None:
    release = releases[kind]
    difference = Path(shutil.copytree(release.delta, tmp_path / "delta"))
    file = sorted(difference.glob("*.bin"))[1]
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=file.name) as raised:
            apply(release.base, difference, tmp_path / "restored")
        assert "\n" not in str(raised.value)
        assert nothing_left(tmp_path / "restored")
    file.unlink()
    with pytest.raises(UserError, match=file.name):
        apply(release.base, difference, tmp_path / "restored")


def test_a_hostile_delta_runs_nothing(releases: dict[str, Release], tmp_path: Path) -> None:
    release = releases["MT-LLaMA zip"]
    difference = Path(shutil.copytree(release.delta, tmp_path / "delta", ignore=shutil.ignore_patterns("pytorch_model*")))

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "marker",)

    torch.save({"a": Hostile()}, difference / BIN_SINGLE)
    with pytest.raises(UserError, match=BIN_SINGLE):
        apply(release.base, difference, tmp_path / "restored")
    assert not (tmp_path / "marker").exists()
    torch.load(difference / BIN_SINGLE, weights_only=False)
    assert (tmp_path / "marker").is_dir(), "the pickle does something where it is let"
