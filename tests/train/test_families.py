"""Every kind of LLaMA checkpoint: packed training is that of transformers' own model, one example at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mtllama import folders
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.data.prompt import FORMATS, PromptEncoder
from mtllama.model import convert
from mtllama.train import journal, loop
from mtllama.train.draws import draw
from mtllama.train.parallel import Ranks
from mtllama.train.recipe import ParallelConfig, Recipe, TrainConfig

TRAIN = TrainConfig(examples=18, batch_size=6, lr=1e-3, max_length=200, tokens_per_pass=700, dtype="float32", weight_decay=0.1)
WINDOW = 64
MIXTURE = MixtureConfig(dir=Path("sampler"))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # within the lengths here, so that scaling does something
}
FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "LLaMA 1 and 2": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "LLaMA 3": (LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": LLAMA3, "max_position_embeddings": 4096}),
    "SmolLM2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}),
    "Mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": WINDOW, "head_dim": 16}),
    "Qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "Qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, bpe_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[str, Path]:
    """The name of a family, and a random two-layer model of it in fp32, every parameter of which does something."""
    kind, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    config = kind(
        **{
            "vocab_size": len(bpe_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "bos_token_id": bpe_tokenizer.bos_token_id,
            "eos_token_id": bpe_tokenizer.eos_token_id,
            "pad_token_id": bpe_tokenizer.pad_token_id,
            **settings,
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    convert.save_checkpoint(model, bpe_tokenizer, tmp_path / "base")
    return request.param, tmp_path / "base"


def recipe(base: Path, strategy: str = "none") -> Recipe:
    return Recipe(out=base.parent / strategy, train=TRAIN, model=str(base), mixture=MIXTURE, parallel=ParallelConfig(strategy=strategy))  # type: ignore[arg-type]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / journal.METRICS).read_text(encoding="utf-8").splitlines()]


def plain_training(base: Path, tokenizer: PreTrainedTokenizerFast, max_length: int) -> tuple[list[float], torch.nn.Module]:
    """The same steps by transformers' own model with its own loss, an example at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay)
    encoder, mixture, found = PromptEncoder(tokenizer, FORMATS["mtllama"], max_length), Mixture(MIXTURE), []
    for step in range(TRAIN.num_steps):
        _, mine = draw(TRAIN, mixture, encoder, step, Ranks())
        examples = [each.encoded for each in mine]
        assert len(examples) == 6
        total = sum(example.num_target for example in examples)
        loss = 0.0
        for example in examples:
            ids = torch.tensor([example.ids])
            labels = ids.clone()
            labels[:, : -example.num_target] = -100
            part = model(input_ids=ids, labels=labels).loss * example.num_target / total
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.max_grad_norm)
        optimizer.param_groups[0]["lr"] = loop.learning_rate(TRAIN, step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss)
    return found, model


def test_packed_training_is_plain_training(family: tuple[str, Path], bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    name, base = family
    out = loop.run(recipe(base))
    windowed = name == "Mistral"
    theirs, model = plain_training(base, bpe_tokenizer, WINDOW if windowed else TRAIN.max_length)
    assert losses(out) == pytest.approx(theirs, abs=1e-5)
    assert len(theirs) == 3 and max(theirs) - min(theirs) > 1e-3
    result = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(result) is type(model)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(result.state_dict()[key], tensor, rtol=1e-3, atol=5e-5)
        assert not torch.equal(before[key], tensor), f"{key} was not trained"
    if windowed:  # segments are not: what would not fit into the window is cut to it, and counted
        assert (folders.read_manifest(out) or {})["totals"]["cut"] > 0


@pytest.fixture
def group() -> Iterator[None]:
    """Ends the group of one that sharding in this process makes."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_model_that_is_filled_part_by_part_is_the_whole_one(family: tuple[str, Path], group: None) -> None:
    _, base = family
    assert losses(loop.run(recipe(base, "fsdp"))) == pytest.approx(losses(loop.run(recipe(base))), abs=1e-6)
