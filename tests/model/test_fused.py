"""Norms and gated units as one autograd step: what transformers' own modules give, in value and in gradient."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from mtllama.model import fused
from mtllama.model.fused import fuse, fuse_tables

KINDS = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
NORMS = {Qwen3Config: 4 * 2 + 1}
"""Norms of two layers and the last one, where queries and keys have some too."""


def language_model(kind: type[PreTrainedConfig], **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return AutoModelForCausalLM.from_config(kind(**sizes, **heads, **settings), dtype=torch.float32)


def decoder(kind: type[PreTrainedConfig]) -> torch.nn.Module:
    model = language_model(kind).get_decoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def fused_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def outcome(module: torch.nn.Module, x: torch.Tensor, seed: int = 1) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of every parameter, of one random weighting of the output."""
    x = x.clone().requires_grad_()
    out = module(x)
    module.zero_grad()
    (out.float() * torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_fused_module_computes_what_it_replaces(kind: type[PreTrainedConfig]) -> None:
    plain = decoder(kind)
    model = copy.deepcopy(plain)
    fuse(model, torch.float32)
    fused = fused_modules(model)
    assert len(fused) == NORMS.get(kind, 2 * 2 + 1) + 2 and not fused_modules(plain)
    names = {id(module): name for name, module in model.named_modules()}
    for module in fused:
        own = plain.get_submodule(names[id(module)])
        width = own.weight.shape[0] if hasattr(own, "weight") else 32
        x = 3 * torch.randn(2, 7, width, generator=torch.Generator().manual_seed(2))
        for ours, theirs in zip(outcome(module, x), outcome(own, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_same_comes_out_and_inputs_are_left_as_they_are(kind: type[PreTrainedConfig]) -> None:
    plain = decoder(kind)
    model = copy.deepcopy(plain)
    fuse(model, torch.float32)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        ours, theirs = (each(input_ids=ids, use_cache=False).last_hidden_state for each in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for module in fused_modules(model):
            x = torch.randn(1, 4, module.weight.shape[0] if hasattr(module, "weight") else 32)
            before = x.clone()
            module(x)
            assert torch.equal(x, before)
    assert theirs.std() > 0.1


def test_norms_before_matrices_give_the_compute_dtype_and_the_last_norm_its_own() -> None:
    model = decoder(LlamaConfig)
    fuse(model, torch.bfloat16)
    x = torch.randn(1, 3, 32)
    assert model.layers[0].input_layernorm(x).dtype == torch.bfloat16
    assert model.norm(x).dtype == torch.float32


def test_weights_that_are_not_trained_and_inputs_in_bfloat16_are_served() -> None:
    plain = decoder(LlamaConfig).to(torch.bfloat16).requires_grad_(False)
    model = copy.deepcopy(plain)
    fuse(model, torch.bfloat16)
    x = torch.randn(1, 5, 32).to(torch.bfloat16)
    for name in ("norm", "layers.0.mlp"):
        ours, theirs = outcome(model.get_submodule(name), x), outcome(plain.get_submodule(name), x)
        assert len(ours) == len(theirs) == 2
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


def test_units_with_another_activation_are_left_as_they_are() -> None:
    model = decoder(LlamaConfig)
    model.layers[0].mlp.act_fn = torch.nn.GELU()
    fuse(model, torch.float32)
    assert "forward" not in vars(model.layers[0].mlp) and "forward" in vars(model.layers[1].mlp)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_place_are_those_of_autograd_and_add_up(
    kind: type[PreTrainedConfig], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SLICE", 3 * 32)  # 17 slices, the last of which is smaller
    plain = language_model(kind, tie_word_embeddings=tied, pad_token_id=7)
    model = copy.deepcopy(plain)
    fuse_tables(model, torch.float32)
    assert ("forward" in vars(model.get_input_embeddings())) and ("forward" in vars(model.get_output_embeddings()))
    ids = torch.randint(0, 49, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[:, 4] = 7  # whose row is not trained by being looked up: the model has it for padding
    for each in (model, plain):
        for number in range(2):  # the second pass adds to the first
            logits = each(input_ids=ids + number, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) is not tied
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    looked_up = ours["model.embed_tokens.weight"].grad
    assert looked_up is not None and (tied or not looked_up[7].any()) and looked_up[ids[0, 0]].any()


def test_a_head_in_bfloat16_is_as_near_to_the_truth_as_autocast_is() -> None:
    exact = language_model(LlamaConfig, tie_word_embeddings=True)
    plain, model = copy.deepcopy(exact), copy.deepcopy(exact)
    fuse_tables(model, torch.bfloat16)
    x = torch.randn(40, 32)
    errors = []
    truth = None
    for each in (exact, plain, model):
        rows = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=each is not exact):
            logits = each.get_output_embeddings()(rows)
        assert logits.dtype == (torch.float32 if each is exact else torch.bfloat16)
        torch.nn.functional.cross_entropy(logits.float(), torch.arange(40)).backward()
        weight = each.get_output_embeddings().weight
        assert rows.grad is not None and rows.grad.dtype == weight.grad.dtype == torch.float32
        found = [logits.detach().float(), rows.grad, weight.grad]
        truth = truth or found
        errors.append([float((mine - other).norm() / other.norm()) for mine, other in zip(found, truth, strict=True)])
    assert all(theirs > 1e-4 for theirs in errors[1])
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(errors[2], errors[1], strict=True))


def test_tables_that_are_not_trained_and_heads_of_other_kinds_are_left_as_they_are() -> None:
    frozen = language_model(LlamaConfig, tie_word_embeddings=True).requires_grad_(False)
    fuse_tables(frozen, torch.float32)
    assert not fused_modules(frozen)
    other = language_model(LlamaConfig, tie_word_embeddings=False)
    other.lm_head = torch.nn.Linear(32, 50, bias=True)
    fuse_tables(other, torch.float32)
    assert fused_modules(other) == [other.get_input_embeddings()]
