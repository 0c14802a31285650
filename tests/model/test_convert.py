"""A GGUF file becomes a plain Hugging Face folder: the same weights, the same tokens, for any tool to load."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtllama import folders
from mtllama.errors import UserError
from mtllama.model import convert
from mtllama.model.find import find_model
from mtllama.tasks.catalog import sampler_dir
from mtllama.weights.shards import SINGLE

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves interleaved, as llama.cpp keeps them."""
    dim = weight.shape[0] // heads
    order = [head * dim + half * dim // 2 + pair for head in range(heads) for pair in range(dim // 2) for half in range(2)]
    return weight[order]


def write_gguf(path: Path, model: Path, tokenizer: Any, *, pre: str, untied: bool = False, architecture: str = "llama") -> None:
    """A model folder as GGUF in 16-bit, through the format's own library."""
    config = AutoConfig.from_pretrained(model)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in special else 1 for token in vocab])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = safetensors.torch.load_file(model / SINGLE)
    if untied:
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor = halves_to_pairs(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_weights_survive_the_way_to_gguf_and_back_bit_for_bit(pico: Path, bpe_tokenizer: Any, tmp_path: Path, untied: bool) -> None:
    write_gguf(tmp_path / "pico.gguf", pico, bpe_tokenizer, pre="gpt-2", untied=untied)
    convert.convert(tmp_path / "pico.gguf", tmp_path / "ours")
    theirs = safetensors.torch.load_file(pico / SINGLE)
    if untied:
        theirs["lm_head.weight"] = -theirs["model.embed_tokens.weight"]
    ours = safetensors.torch.load_file(tmp_path / "ours" / SINGLE)
    assert ours.keys() == theirs.keys() and len(theirs) == 20 + untied
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(ours[name], tensor), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) != untied
    if not untied:
        ids = torch.tensor([[5, 300, 17, 42]])
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(pico)(ids).logits)
    config, original = AutoConfig.from_pretrained(tmp_path / "ours"), AutoConfig.from_pretrained(pico)
    for field in ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "head_dim", "bos_token_id", "eos_token_id"):
        assert getattr(config, field) == getattr(original, field), field


def test_a_swapped_pair_of_rotary_halves_would_show(
    pico: Path, bpe_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "pico.gguf", pico, bpe_tokenizer, pre="gpt-2")
    monkeypatch.setattr(convert, "_rotary_halves", lambda weight, heads: weight)
    convert.convert(tmp_path / "pico.gguf", tmp_path / "ours")
    ours, theirs = safetensors.torch.load_file(tmp_path / "ours" / SINGLE), safetensors.torch.load_file(pico / SINGLE)
    wrong = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert wrong == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qk"}


TEXTS = ["a b  c", "It's 12:30, isn't it?\n\n", "naïve 漢字 😀", "\ttabs\r\n", "<|end|>text<|start|>", " 7 77", ""]


def test_tokens_and_template_survive_the_way_to_gguf_and_back(pico: Path, bpe_tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "pico.gguf", pico, bpe_tokenizer, pre="gpt-2")
    convert.convert(tmp_path / "pico.gguf", tmp_path / "ours")
    ours = AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        for split in (False, True):
            assert ours(text, split_special_tokens=split).input_ids == bpe_tokenizer(text, split_special_tokens=split).input_ids
        assert ours.decode(ours(text).input_ids) == text
    for token in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, token) == getattr(bpe_tokenizer, token)
    assert ours.chat_template == CHAT_TEMPLATE and ours.model_max_length == 512
    settings = folders.read_json(tmp_path / "ours" / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_digits_stand_alone_where_the_gguf_says_smollm(pico: Path, bpe_tokenizer: Any, tmp_path: Path) -> None:
    text = "in 2024, 10% of 1999"
    tokens = {}
    for pre in ("gpt-2", "smollm"):
        write_gguf(tmp_path / f"{pre}.gguf", pico, bpe_tokenizer, pre=pre)
        convert.convert(tmp_path / f"{pre}.gguf", tmp_path / pre)
        tokens[pre] = AutoTokenizer.from_pretrained(tmp_path / pre).tokenize(text)
    with_digits = [token for token in tokens["smollm"] if any(letter.isdigit() for letter in token)]
    assert with_digits == list("2024101999")
    assert "Ġ19" in tokens["gpt-2"], "elsewhere they do not"


def test_a_conversion_leaves_a_manifest_and_replaces_what_stood_there(pico: Path, bpe_tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "pico.gguf", pico, bpe_tokenizer, pre="gpt-2")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "half").write_text("of an older program", encoding="utf-8")
    convert.convert(tmp_path / "pico.gguf", tmp_path / "ours")
    manifest = folders.read_manifest(tmp_path / "ours")
    assert manifest is not None and manifest["stage"] == "base" and manifest["source"] == "pico.gguf"
    assert manifest["source_sha256"] == folders.sha256_file(tmp_path / "pico.gguf")
    assert not (tmp_path / "ours" / "half").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["ours", "pico.gguf"]


def test_another_architecture_is_refused_and_nothing_left(pico: Path, bpe_tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "pico.gguf", pico, bpe_tokenizer, pre="gpt-2", architecture="gptneox")
    with pytest.raises(UserError, match=r"pico\.gguf is not a LLaMA model but gptneox"):
        convert.convert(tmp_path / "pico.gguf", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["pico.gguf"]


def test_a_tokenizer_is_saved_under_the_name_that_every_transformers_knows(bpe_tokenizer: Any, tmp_path: Path) -> None:
    bpe_tokenizer.save_pretrained(tmp_path / "theirs")
    theirs = folders.read_json(tmp_path / "theirs" / "tokenizer_config.json")
    convert.save_tokenizer(bpe_tokenizer, tmp_path / "ours")
    ours = folders.read_json(tmp_path / "ours" / "tokenizer_config.json")
    assert theirs["tokenizer_class"] == "TokenizersBackend", "what save_tokenizer is for"
    assert ours == theirs | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(TEXTS).input_ids == bpe_tokenizer(TEXTS).input_ids


def test_the_package_is_found_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise convert.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(convert.importlib.metadata, "files", none)
    assert convert.find_gguf() is None
    monkeypatch.setattr(convert.importlib.metadata, "files", lambda name: None)
    assert convert.find_gguf() is None


GOLDEN = {
    "a  2024": ([81, 256, 34, 32, 34, 36], ["a", "ĠĠ", "2", "0", "2", "4"]),
    "I'll say it's they've DON'T": (
        [57, 3060, 1643, 357, 506, 502, 3543, 422, 2154, 23, 68],
        ["I", "'ll", "Ġsay", "Ġit", "'s", "Ġthey", "'ve", "ĠD", "ON", "'", "T"],
    ),
    "one\n\n two\r\n\tthree\n": ([537, 1116, 827, 2738, 197, 16347, 198], ["one", "ĊĊ", "Ġtwo", "čĊ", "ĉ", "three", "Ċ"]),
    "naïve 漢字 😀": (
        [3546, 46494, 17097, 137, 112, 36518, 40303, 218],
        ["na", "Ã¯ve", "Ġæ", "¼", "¢", "åŃĹ", "ĠðŁĺ", "Ģ"],
    ),
    "<|im_end|>12<|im_start|>user\n": ([2, 33, 34, 1, 4093, 198], ["<|im_end|>", "1", "2", "<|im_start|>", "user", "Ċ"]),
}
SPECIAL_AS_TEXT = [44, 108, 306, 79, 486, 108, 46, 33, 34, 44, 108, 306, 79, 3738, 108, 46, 4093, 198]
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for every byte: printable ones stand for themselves, the others for letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def plain_bpe(text: str, ids: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Byte-level BPE written down from its definition: numbers alone, GPT-2's words, best merge first."""
    letters, found = byte_letters(), []
    for part in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in GPT2_WORDS.findall(part):
            pieces = [letters[byte] for byte in word.encode()]
            while len(pieces) > 1:
                rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(pieces)))
                if rank == 1 << 30:
                    break
                pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
            found += [ids[piece] for piece in pieces]
    return found


@pytest.mark.real
def test_the_base_models_tokens_are_those_of_its_gguf(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text, (ids, tokens) in GOLDEN.items():
        assert tokenizer(text).input_ids == ids and tokenizer.convert_ids_to_tokens(ids) == tokens
        assert tokenizer.decode(ids) == text
        digits = [token for token in tokens if any(letter.isdigit() for letter in token)]
        assert digits == [letter for letter in text if letter.isdigit()], "every digit is a token of its own"
    special = list(GOLDEN)[-1]
    assert tokenizer(special, split_special_tokens=True).input_ids == SPECIAL_AS_TEXT and tokenizer.decode(SPECIAL_AS_TEXT) == special
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

    gguf_file = convert.find_gguf()
    assert gguf_file is not None
    fields = gguf.GGUFReader(gguf_file).fields
    ids_of = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"].contents())}
    rows = [row for path in sorted(sampler_dir().rglob("*.jsonl"))[:12] for row in path.read_text(encoding="utf-8").splitlines()[:2]]
    hard = ["½ ² Ⅳ ٣", "x\u00a0y\u2003z", "\n \n  a", "don’t", "e\u0301", "a\u200db", "-- 3.14e-10", "    def f():\n\treturn 1", "’s'S"]
    texts = [*rows, *hard, *list(GOLDEN)[:-1]]
    assert len(rows) > 10
    for text in texts:
        ours, theirs = tokenizer(text).input_ids, plain_bpe(text, ids_of, ranks)
        assert ours == theirs, text


@pytest.mark.real
def test_the_base_model_loads_as_any_other_and_knows_paris(smollm2: Path) -> None:
    config = folders.read_json(smollm2 / "config.json")
    assert "quantization_config" not in config and config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert folders.read_json(smollm2 / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    model, info = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, prompt.input_ids.shape[1] :])
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith("<|im_start|>assistant\n")


@pytest.mark.real
def test_the_base_model_is_converted_once_and_always_to_the_same(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLLAMA_HOME", str(tmp_path))
    original, calls = convert.convert, []

    def counted(gguf_file: Path, out: Path) -> None:
        calls.append(out)
        original(gguf_file, out)

    monkeypatch.setattr(convert, "convert", counted)
    first = find_model(convert.NAME).folder
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert find_model(convert.NAME).folder == first == tmp_path / "models" / convert.NAME
    assert calls == [first] and {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    for name in (SINGLE, "tokenizer.json", "config.json"):
        assert folders.sha256_file(first / name) == folders.sha256_file(smollm2 / name), name
    shutil.rmtree(first)
