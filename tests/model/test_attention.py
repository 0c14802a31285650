"""Segment attention: the same as torch's own within each segment, forwards and backwards, in every precision."""

import pytest
import torch

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
