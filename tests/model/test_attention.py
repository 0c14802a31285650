"""Segment attention: the same as torch's own within each segment, forwards and backwards, in every precision."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtllama.model import attention

SEGMENTS = [1, 299, 400]
"""One alone, one over two blocks of rows, and one that ends within a block."""


def inputs(dtype: torch.dtype, heads: int = 6, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(SEGMENTS), 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(tensors: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, longest: int) -> list[torch.Tensor]:
    """Output and gradients, by plain products (`longest` large) or torch's attention (0)."""
    monkeypatch.setattr(attention, "LONGEST", longest)
    out, _ = attention.segment_attention(torch.nn.Module(), *tensors, None, segments=SEGMENTS, scaling=0.3)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
def test_it_equals_torchs_attention_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, heads: int, kv_heads: int
) -> None:
    tensors = inputs(dtype, heads, kv_heads)
    ours, theirs = run(tensors, monkeypatch, 2048), run(tensors, monkeypatch, 0)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert float((mine - other).abs().max()) < tolerance * float(other.abs().max())


def test_in_bfloat16_under_autocast_it_is_as_near_to_the_truth_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training: rotated queries and keys are float32, values bfloat16, and the backward pass runs outside of autocast."""
    exact = run(inputs(torch.float64), monkeypatch, 0)
    query, key, value = inputs(torch.float64)
    mixed = [
        each.detach().to(dtype).requires_grad_() for each, dtype in ((query, torch.float32), (key, torch.float32), (value, torch.bfloat16))
    ]
    monkeypatch.setattr(attention, "LONGEST", 2048)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention.segment_attention(torch.nn.Module(), *mixed, None, segments=SEGMENTS, scaling=0.3)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    ours = [out, *torch.autograd.grad(out, mixed, weights)]
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    for mine, truth in zip(ours, exact, strict=True):
        assert float((mine.double() - truth).abs().max()) < 0.03 * float(truth.abs().max())


def test_no_segment_sees_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(torch.float64)
    before = run(tensors, monkeypatch, 2048)[0]
    with torch.no_grad():
        for each in tensors:
            each[:, :, 1:300] += 1
    after = run(tensors, monkeypatch, 2048)[0]
    same = (before == after).all(dim=-1).all(dim=-1)[0]
    assert same[:1].all() and same[300:].all() and not same[1:300].any()


def as_documented(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_ends: torch.Tensor, k_ends: torch.Tensor, q_max: int, k_max: int, **how: Any
) -> torch.Tensor:
    """What torch documents of `varlen_attn`, by its plain attention: tensors are [seq, heads, dim], and ends are cumulative."""
    assert how["window_size"] == (-1, 0) and how["enable_gqa"] and q_ends.dtype == torch.int32 and torch.equal(q_ends, k_ends)
    ends = q_ends.tolist()
    assert q_max == k_max == max(last - first for first, last in itertools.pairwise(ends)) and ends[-1] == len(q) == len(k)
    parts = [
        F.scaled_dot_product_attention(
            *(each[first:last].transpose(0, 1)[None] for each in (q, k, v)), is_causal=True, scale=how["scale"], enable_gqa=True
        )
        for first, last in itertools.pairwise(ends)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def test_flash_attention_is_asked_for_the_same_as_torchs_attention_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention itself needs a GPU; what it is called with does not."""
    tensors = inputs(torch.bfloat16)
    theirs = run(tensors, monkeypatch, 0)
    monkeypatch.setattr(attention, "_has_flash", lambda device, dim: True)
    called = []
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **how: called.append(1) or as_documented(*args, **how))
    ours = run(tensors, monkeypatch, 0)
    assert called
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert float((mine - other).abs().max()) <= 0.02 * float(other.abs().max())


def test_torch_takes_that_call_and_gives_gradients_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without contents, of which torch itself works out shapes and dtypes."""
    monkeypatch.setattr(attention, "_has_flash", lambda device, dim: True)
    query, key, value = (
        torch.empty(1, heads, 700, 64, dtype=dtype, device="meta", requires_grad=True)
        for heads, dtype in ((6, torch.float32), (2, torch.float32), (2, torch.bfloat16))
    )
    out, _ = attention.segment_attention(torch.nn.Module(), query, key, value, None, segments=SEGMENTS)
    out.sum().backward()
    assert (out.shape, out.dtype) == ((1, 700, 6, 64), torch.bfloat16)
    for each in (query, key, value):
        assert each.grad is not None and (each.grad.shape, each.grad.dtype) == (each.shape, each.dtype)


@pytest.mark.gpu
def test_flash_attention_on_a_gpu_is_as_near_to_the_truth_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < attention.FLASH_CAPABILITY:
        pytest.skip("needs a CUDA GPU of compute capability 8.0 or more")
    exact = run(inputs(torch.float64), monkeypatch, 0)
    tensors = [each.detach().to("cuda", torch.bfloat16).requires_grad_() for each in inputs(torch.float64)]
    out, _ = attention.segment_attention(torch.nn.Module(), *tensors, None, segments=SEGMENTS, scaling=0.3)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    for mine, truth in zip([out, *torch.autograd.grad(out, tensors, weights)], exact, strict=True):
        assert float((mine.detach().double().cpu() - truth).abs().max()) < 0.03 * float(truth.abs().max())
