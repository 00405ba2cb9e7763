"""The plain operations against hand literals, and against what CPUs compute in their place."""

import math

import pytest
import torch
from torch import Tensor

from common.model.attention import Context, additive, document_mask, rotary_tables
from common.model.dispatch import ON_CPU, PLAIN, operations
from common.model.layers import logprobs_at


def randn(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def test_entropy_literals():
    logits = torch.tensor([[0.0] * 8, [0.0, math.log(3.0)] + [-1e9] * 6])
    targets = torch.tensor([0, 1])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    _, entropies = logprobs_at(logits, targets, 1.0, True)
    assert entropies.tolist() == pytest.approx([math.log(8), quarter], abs=1e-6)
    tenth = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    _, entropies = logprobs_at(logits, targets, 0.5, True)
    assert entropies.tolist() == pytest.approx([math.log(8), tenth], abs=1e-6)


def test_the_device_decides():
    assert operations(torch.zeros(1)) is ON_CPU
    assert operations(torch.zeros(1, device="meta")) is PLAIN


def attended(table, x: Tensor, rotary: bool, masked: bool) -> Tensor:
    """4 heads of queries, 1 of keys and values, of width 4; 3 positions, the last of another
    document."""
    cos_sin = tuple(t[None].to(x.dtype) for t in rotary_tables(3, 4, 10000.0))
    mask = document_mask(torch.tensor([[0, 0, 1]])) if masked else None
    context = Context(cos_sin if rotary else None, additive(mask, x.dtype))
    return table.attention(x.unflatten(1, (-1, 24)), 4, 1, context)


CALLS = {
    "attention": lambda table, x: attended(table, x, False, False),
    "attention, rotary": lambda table, x: attended(table, x, True, False),
    "attention, documents": lambda table, x: attended(table, x, True, True),
    "rms_norm": lambda table, x: table.rms_norm(x, 2 + x[0], 1e-5),
    "layer_norm": lambda table, x: table.layer_norm(x, 2 + x[0], x[1], 1e-5),
    "swiglu": lambda table, x: table.swiglu(x),
    "gelu": lambda table, x: table.gelu(x),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_both_tables_compute_the_same(call, dtype, tolerance):
    """Values and gradients; fp32 in C where there is a compiler, fp64 by PyTorch's operations."""
    x = randn(3, 72).detach()
    found = []
    for table, kind in ((PLAIN, torch.float64), (ON_CPU, dtype)):
        given = x.to(kind, copy=True).requires_grad_()
        y = call(table, given)
        weights = randn(*y.shape, seed=9).detach().to(kind)
        found.append((y, *torch.autograd.grad((y * weights).sum(), given)))
    for plain, ours in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(plain, ours.double(), rtol=tolerance, atol=tolerance)
