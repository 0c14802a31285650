"""The miniatures are what they stand for: each peculiarity of the releases is there."""

import json
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import sentencepiece
import torch
from miniature import (
    BIN_INDEX,
    EMBEDDINGS,
    LAYERS,
    PAD,
    VOCABULARY,
    Release,
    Serialisation,
    alpaca,
    fastchat,
    mt_llama,
    sentencepiece_model,
)
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

SERIALISATIONS = get_args(Serialisation)


def read(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        state |= torch.load(file, weights_only=True)
    return state


def load(folder: Path, name: str) -> dict[str, object]:
    return dict(json.loads((folder / name).read_text(encoding="utf-8")))


def frequencies(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name.endswith("self_attn.rotary_emb.inv_freq")]


def with_row(weight: torch.Tensor, rows: int, *, mean: bool) -> torch.Tensor:
    new = torch.zeros(rows - len(weight), weight.shape[1], dtype=weight.dtype)
    return torch.cat([weight, weight.double().mean(0, keepdim=True).to(weight.dtype) if mean else new])


@pytest.fixture(params=SERIALISATIONS)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Release:
    return mt_llama(tmp_path, request.param)


def test_the_base_is_as_a_transformers_of_today_saves_it(release: Release) -> None:
    state = read(release.base)
    assert len(list(release.base.glob("model-0000*-of-00002.safetensors"))) == 2
    assert not frequencies(state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(len(state[name]) == VOCABULARY for name in EMBEDDINGS)
    assert "dtype" in load(release.base, "config.json")


def test_the_delta_has_two_bin_shards_and_an_index_and_no_other_weights(release: Release) -> None:
    shards = sorted(release.delta.glob("*.bin"))
    assert [file.name for file in shards] == ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert shards[0].stat().st_size > 2 * shards[1].stat().st_size
    assert not list(release.delta.glob("*.safetensors"))
    where = load(release.delta, BIN_INDEX)["weight_map"]
    assert where == {name: file.name for file in shards for name in torch.load(file, weights_only=True)}


@pytest.mark.parametrize("serialisation", SERIALISATIONS)
def test_the_serialisations_are_torchs_two(serialisation: Serialisation, tmp_path: Path) -> None:
    shards = list(mt_llama(tmp_path, serialisation).delta.glob("*.bin"))
    assert len(shards) == 2
    for file in shards:
        assert zipfile.is_zipfile(file) == (serialisation == "zip")
        if serialisation == "legacy":
            with pytest.raises(RuntimeError, match="mmap"):
                torch.load(file, weights_only=True, mmap=True)


def test_the_delta_has_a_buffer_a_layer_more_than_the_base_has_tensors(release: Release) -> None:
    base, delta = read(release.base), read(release.delta)
    assert sorted(set(delta) - set(base)) == [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(LAYERS)]
    assert set(base) <= set(delta)
    assert not any(delta[name].any() for name in frequencies(delta))
    assert {tensor.dtype for tensor in delta.values()} == {torch.float16}


def test_the_delta_has_one_row_more_and_it_is_not_empty(release: Release) -> None:
    delta = read(release.delta)
    for name in EMBEDDINGS:
        assert len(delta[name]) == release.rows == VOCABULARY + 1
        assert delta[name][PAD].any()


def test_the_target_is_base_plus_delta_in_half_precision_with_zero_for_the_new_row(release: Release) -> None:
    base, delta = read(release.base), read(release.delta)
    assert set(release.target) == set(base)
    changed = 0
    for name, target in release.target.items():
        before = with_row(base[name], release.rows, mean=False) if name in EMBEDDINGS else base[name]
        assert torch.equal(before + delta[name], target) and target.dtype == torch.float16
        changed += int((before != target).sum())
    assert 0.4 < changed / sum(tensor.numel() for tensor in release.target.values()) < 0.7


def test_the_special_tokens_are_the_published_ones(release: Release) -> None:
    model = sentencepiece.SentencePieceProcessor(model_proto=(release.delta / "tokenizer.model").read_bytes())
    special = load(release.delta, "special_tokens_map.json")
    assert special == {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert special.items() <= load(release.delta, "tokenizer_config.json").items()
    assert load(release.delta, "added_tokens.json") == {"[PAD]": release.rows - 1}
    vocabulary = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    assert "[UNK]" not in vocabulary and "[PAD]" not in vocabulary and vocabulary.index("</s>") == 2
    assert not (release.delta / "tokenizer.json").exists()


def test_the_configs_are_of_their_time(release: Release) -> None:
    for name in ("config.json", "generation_config.json"):
        config = load(release.delta, name)
        assert str(config["transformers_version"]).startswith("4.28")
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, -1)
    config = load(release.delta, "config.json")
    assert config["vocab_size"] == release.rows and config["torch_dtype"] == "float16"
    assert not {"dtype", "rope_parameters", "num_key_value_heads"} & set(config)


def test_the_target_fits_the_deltas_config(release: Release) -> None:
    model = LlamaForCausalLM(AutoConfig.from_pretrained(release.delta))
    assert not any(model.load_state_dict(release.target))


def test_both_serialisations_hold_the_same_release(tmp_path: Path) -> None:
    first, second = (mt_llama(tmp_path / each, each) for each in SERIALISATIONS)
    assert first.target.keys() == second.target.keys() and len(first.target) == 21
    assert all(torch.equal(tensor, second.target[name]) for name, tensor in first.target.items())


def test_the_vocabulary_is_made_the_same_each_time_and_has_llamas_settings() -> None:
    assert sentencepiece_model.__wrapped__() == sentencepiece_model()
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert model.get_piece_size() == VOCABULARY
    assert [model.id_to_piece(number) for number in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert all(model.is_byte(number) for number in model.encode("東")[1:]) and len(model.encode("東")) == 4
    assert max(map(len, map(model.id_to_piece, range(259, VOCABULARY)))) > 2


@pytest.mark.parametrize(("version", "more"), [("v0", 1), ("v1.1", 0)])
@pytest.mark.parametrize("serialisation", [*SERIALISATIONS, "safetensors"])
def test_fastchats_deltas_have_the_bases_rows_or_one_more(version: str, more: int, serialisation: str, tmp_path: Path) -> None:
    release = fastchat(tmp_path, version, serialisation)  # type: ignore[arg-type]
    base, delta = read(release.base), read(release.delta)
    assert len(delta[EMBEDDINGS[0]]) == release.rows == VOCABULARY + more
    assert bool(frequencies(delta)) == (serialisation != "safetensors")
    assert (release.delta / "added_tokens.json").exists() == bool(more)
    for name, target in release.target.items():
        before = with_row(base[name], release.rows, mean=False) if name in EMBEDDINGS else base[name]
        assert torch.equal(before + delta[name], target) and target.dtype == torch.float16


def test_alpacas_delta_is_float32_over_the_mean_row_and_has_a_check_sum(tmp_path: Path) -> None:
    release = alpaca(tmp_path)
    base, delta = read(release.base), read(release.delta)
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}
    assert len(list(release.delta.glob("*.bin"))) == 3 and len(frequencies(delta)) == LAYERS
    for name, target in release.target.items():
        before = base[name].float()
        before = with_row(before, release.rows, mean=True) if name in EMBEDDINGS else before
        assert torch.equal(before + delta[name], target) and target.dtype == torch.float32
    assert base[EMBEDDINGS[0]].float().mean(0).abs().max() > 0.001  # zero in its place would be noticed
    total = sum(float(tensor.sum()) for tensor in release.target.values())
    assert release.check_sum == pytest.approx(total, abs=1e-2)
    buffers = LlamaForCausalLM(AutoConfig.from_pretrained(release.delta)).model.rotary_emb.inv_freq
    assert release.check_sum_with_buffers == pytest.approx(total + LAYERS * float(buffers.sum()), abs=1e-2)
    assert np.isfinite(total) and abs(float(buffers.sum())) > 0.1
