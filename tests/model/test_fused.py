"""Norms and gated units as one autograd step: what transformers' own modules give, in value and in gradient."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from mtllama.model.fused import fuse

KINDS = (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
NORMS = {Qwen3Config: 4 * 2 + 1}
"""Norms of two layers and the last one, where queries and keys have some too."""


def decoder(kind: type[PreTrainedConfig]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = kind(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).get_decoder()
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
