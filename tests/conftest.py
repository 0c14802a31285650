"""Shared fixtures: a pico LLaMA on disk, its tokenizers, the base model where it is installed, the real data where it is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A pico model gains nothing from a second thread, and threads that wait for each other are slow on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import json
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtllama.model import convert
from mtllama.model.find import find_model
from mtllama.tasks.catalog import sampler_dir

hypothesis.settings.register_profile("mtllama", deadline=None, derandomize=True)  # no test depends on how busy a machine is
hypothesis.settings.load_profile("mtllama")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Only tests that ask for a GPU (`-m gpu`) see one: the others say what is so on a CPU, on every machine."""
    asked = str(config.getoption("markexpr"))
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def corpus() -> list[str]:
    """Text to train tiny tokenizers on: the sampler's own."""
    rows = (sampler_dir() / "adversarial_qa_dbert" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["context"] for row in rows]


@pytest.fixture(scope="session")
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in the manner of SmolLM2: no BOS is put before a text, pad = EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|none|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|none|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece LLaMA: `▁` for blanks, a blank before every text, BOS first."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=800, special_tokens=specials, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random two-layer LLaMA with tied embeddings as a Hugging Face folder, stored in bf16."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(bpe_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=bpe_tokenizer.bos_token_id,
        eos_token_id=bpe_tokenizer.eos_token_id,
        pad_token_id=bpe_tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    convert.save_checkpoint(LlamaForCausalLM(config).to(torch.bfloat16), bpe_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real base model; a test that needs it skips where its package is not installed."""
    if convert.find_gguf() is None:
        pytest.skip("the base model is not installed: mtllama models fetch smollm2-135m")
    return find_model(convert.NAME).folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets are not beside this checkout (../shared/data)")
    return SHARED
