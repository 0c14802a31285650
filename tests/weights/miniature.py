"""Miniatures of published deltas: two layers and 480 pieces, in the very form of the releases.

Each builder writes a base and a delta folder and returns them with the state dict that a restore must give, computed here
by numpy. What is copied from the releases is their form: files, keys, shapes, dtypes, tokens and ids.
"""

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mtllama.tasks.catalog import sampler_dir

VOCABULARY = 480
"""Pieces of the SentencePiece vocabulary and rows of the base: the miniature's 32,000."""
PAD = VOCABULARY
"""Id of `[PAD]`, the row that a delta may have more: the miniature's 32,000th."""
LAYERS, HIDDEN, HEADS, INTERMEDIATE = 2, 64, 4, 172
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
BIN_INDEX = "pytorch_model.bin.index.json"

Serialisation = Literal["zip", "legacy"]


@dataclass(frozen=True)
class Release:
    """A base, a delta published for it, and what the two make."""

    base: Path
    delta: Path
    target: dict[str, torch.Tensor]
    """The restored model's weights. Rotary frequencies are a buffer, not a weight, and are not in it."""
    rows: int
    """Rows of the target's embeddings."""
    check_sum: float | None = None
    """Sum over the target's tensors of each tensor's sum, in float32."""
    check_sum_with_buffers: float | None = None
    """The same as a transformers of the time counts it: the rotary frequencies of every layer are in it."""


def mt_llama(folder: Path, serialisation: Serialisation = "zip") -> Release:
    """MT-LLaMA: fp16, two `.bin` shards, one row more (the base's counts as zero), special tokens in no vocabulary."""
    base = _base(folder / "base")
    delta, target = {}, {}
    for name, before in _weights(base).items():
        before = _one_more_row(before, 0) if name in EMBEDDINGS else before
        delta[name] = (_tuned(name, before) - before).astype(np.float16)
        target[name] = before + delta[name]
    out = folder / "delta"
    _write_bin(out, _with_frequencies(delta), shards=2, serialisation=serialisation)
    _write_config(out, rows=VOCABULARY + 1, dtype="float16", bos=1, eos=2, pad=-1)
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    settings = {"add_bos_token": True, "add_eos_token": False, **special, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
    _write_tokenizer(out, special, settings, added={"[PAD]": PAD})
    return Release(base, out, _tensors(target), VOCABULARY + 1)


def fastchat(
    folder: Path, version: Literal["v0", "v1.1"] = "v1.1", serialisation: Serialisation | Literal["safetensors"] = "zip"
) -> Release:
    """Vicuna: fp16; v1.1 has the base's rows and tokens, v0 one row more. Safetensors are a newer transformers' and have no buffers."""
    base, rows = _base(folder / "base"), VOCABULARY + (version == "v0")
    delta, target = {}, {}
    for name, before in _weights(base).items():
        before = _one_more_row(before, 0) if name in EMBEDDINGS and version == "v0" else before
        delta[name] = (_tuned(name, before) - before).astype(np.float16)
        target[name] = before + delta[name]
    out = folder / "delta"
    if serialisation == "safetensors":
        out.mkdir(parents=True)
        save_file(_tensors(delta), out / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_bin(out, _with_frequencies(delta), shards=2, serialisation=serialisation)
    _write_config(out, rows=rows, dtype="float16", bos=1, eos=2, pad=0)
    if version == "v0":
        special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "</s>"}
        _write_tokenizer(out, special, {"bos_token": "", "eos_token": "", "unk_token": ""}, added={"[PAD]": PAD})
    else:
        objects = {f"{role}_token": _added_token(token) for role, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
        settings = {key: {"__type": "AddedToken", **value} for key, value in objects.items()}
        flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "pad_token": None}
        _write_tokenizer(out, {**objects, "pad_token": "<unk>"}, {**settings, **flags, "sp_model_kwargs": {}}, added=None)
    return Release(base, out, _tensors(target), rows)


def alpaca(folder: Path, serialisation: Serialisation = "zip") -> Release:
    """Stanford Alpaca: fp32 differences, one row more (the base's is the mean of its rows), and a check sum.

    The mean is the exact one, rounded: whoever adds in float32 comes to other last bits in that row.
    """
    base = _base(folder / "base")
    delta, target = {}, {}
    for name, stored in _weights(base).items():
        before = stored.astype(np.float32)
        if name in EMBEDDINGS:
            before = _one_more_row(before, before.mean(axis=0, dtype=np.float64))
        delta[name] = _tuned(name, before) - before
        target[name] = before + delta[name]
    out = folder / "delta"
    _write_bin(out, _with_frequencies(delta), shards=3, serialisation=serialisation)
    _write_config(out, rows=VOCABULARY + 1, dtype="float32", bos=0, eos=1, pad=-1)
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "</s>"}
    _write_tokenizer(out, special, {"bos_token": "", "eos_token": "", "unk_token": ""}, added={"[PAD]": PAD})
    total = float(sum(np.float32(tensor.astype(np.float64).sum()) for tensor in target.values()))
    frequencies = LAYERS * float(_frequencies().astype(np.float64).sum())
    return Release(base, out, _tensors(target), VOCABULARY + 1, total, total + frequencies)


@functools.cache
def sentencepiece_model() -> bytes:
    """A `tokenizer.model` with LLaMA's settings: BPE, byte fallback, no normalisation, `<unk>` 0, `<s>` 1, `</s>` 2."""
    rows = (sampler_dir() / "adversarial_qa_dbert" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([json.loads(row)["context"] for row in rows]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _base(folder: Path) -> Path:
    """A LLaMA as a transformers of today saves it: safetensors shards, no buffers among them, fp16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_tokenizer(folder, tokens, {"add_bos_token": True, "add_eos_token": False, **tokens}, added=None)
    return folder


def _weights(base: Path) -> dict[str, np.ndarray]:
    """The base's weights in the order in which a transformers of 2023 had them."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float16, local_files_only=True)
    stored = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    order = ["model.embed_tokens.weight"]
    for layer in range(LAYERS):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "down", "up")]
        parts += ["input_layernorm", "post_attention_layernorm"]
        order += [f"model.layers.{layer}.{part}.weight" for part in parts]
    order += ["model.norm.weight", "lm_head.weight"]
    assert sorted(order) == sorted(stored)
    return {name: stored[name] for name in order}


def _tuned(name: str, before: np.ndarray) -> np.ndarray:
    """A fine-tuned weight: two thirds of its values moved a little."""
    chance = np.random.default_rng(list(name.encode()))
    step = chance.normal(0, 0.01, before.shape) * (chance.random(before.shape) < 2 / 3)
    return (before + step).astype(before.dtype)


def _one_more_row(weight: np.ndarray, row: Any) -> np.ndarray:
    return np.concatenate([weight, np.broadcast_to(np.asarray(row, dtype=weight.dtype), (1, weight.shape[1]))])


def _frequencies() -> np.ndarray:
    """Rotary frequencies of a layer."""
    dim = HIDDEN // HEADS
    return (1 / 10000 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def _with_frequencies(delta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The delta with the buffers that a transformers of 2023 saved: base and target had the same, so the difference is zero."""
    result = {}
    for name, tensor in delta.items():
        result[name] = tensor
        if name.endswith("self_attn.o_proj.weight"):
            result[name.replace("o_proj.weight", "rotary_emb.inv_freq")] = np.zeros(HIDDEN // HEADS // 2, tensor.dtype)
    return result


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _write_bin(folder: Path, state: dict[str, np.ndarray], *, shards: int, serialisation: Serialisation) -> None:
    """`pytorch_model-0000N-of-0000M.bin` and their index; the last shard is smaller than the others, as in the releases."""
    folder.mkdir(parents=True)
    total = sum(array.nbytes for array in state.values())
    limit = total / (shards - 0.65)
    names, weight_map, done = iter(range(1, shards + 1)), {}, 0
    groups: list[dict[str, torch.Tensor]] = []
    for name, tensor in _tensors(state).items():
        if not groups or (done + tensor.nbytes > limit * len(groups) and len(groups) < shards):
            groups.append({})
        groups[-1][name] = tensor
        done += tensor.nbytes
    assert len(groups) == shards
    for group in groups:
        file = f"pytorch_model-{next(names):05d}-of-{shards:05d}.bin"
        torch.save(group, folder / file, _use_new_zipfile_serialization=serialisation == "zip")
        weight_map |= dict.fromkeys(group, file)
    _write_json(folder / BIN_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_config(folder: Path, *, rows: int, dtype: str, bos: int, eos: int, pad: int) -> None:
    """config.json and generation_config.json of transformers 4.28: no rope, no number of key-value heads, ids as they came."""
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    config = {
        "_name_or_path": "llama-7b",
        "architectures": ["LlamaForCausalLM"],
        **ids,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 256,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.28.1",
        "use_cache": False,
        "vocab_size": rows,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids, "transformers_version": "4.28.1"})


def _write_tokenizer(folder: Path, special: dict[str, Any], settings: dict[str, Any], *, added: dict[str, int] | None) -> None:
    """A tokenizer as its slow class saved it: `tokenizer.model` and three small files, no `tokenizer.json`."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    _write_json(folder / "special_tokens_map.json", special)
    common = {"model_max_length": 512, "padding_side": "right", "tokenizer_class": "LlamaTokenizer"}
    _write_json(folder / "tokenizer_config.json", {**settings, **common})
    if added is not None:
        _write_json(folder / "added_tokens.json", added)


def _added_token(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
