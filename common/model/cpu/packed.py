"""A model's matrices in the order that a CPU's matrix units read them (packed.c), while it samples.

A token for each of a few rows takes little arithmetic and all of the weights: PyTorch's product,
which puts them into that order each time, takes three to six times as long. Elsewhere, and in other
precisions than bf16, nothing happens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model.cpu.compile import address, functions_for, native_for

FEW = 512  # rows, up to which reading the weights is what takes time


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers of `model` compute with copies of their weights, made at the start, and
    without gradients."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and can_pack(m)]
    for layer in layers:
        layer.forward = partial(product, layer.weight, layer.bias, pack(layer.weight))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def can_pack(layer: nn.Linear) -> bool:
    """Whether the processor has matrix units and they take this layer: in bf16, of an even width of
    at least 32, and not packed already."""
    inputs = layer.weight.shape[1]
    in_bf16 = all(p is None or p.dtype == torch.bfloat16 for p in (layer.weight, layer.bias))
    if not in_bf16 or "forward" in vars(layer) or inputs % 2 or inputs < 32:
        return False
    functions = functions_for(layer.weight)
    return functions is not None and bool(functions.can_pack())


def pack(weight: Tensor) -> Tensor:
    """weight (outputs, inputs), as packed.c wants it."""
    outputs, inputs = weight.shape
    made = weight.new_empty(-(-outputs // 32) * 32 * -(-inputs // 32) * 32)
    native_for(weight).pack(weight.data_ptr(), made.data_ptr(), outputs, inputs)
    return made


def product(weight: Tensor, bias: Tensor | None, made: Tensor, x: Tensor) -> Tensor:
    """F.linear(x, weight, bias) for x (..., inputs); made: the weight packed. Many rows, and what
    needs a gradient, go to PyTorch."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if rows > FEW or x.dtype != weight.dtype or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], outputs)
    native_for(x).packed_linear(
        x.data_ptr(), made.data_ptr(), address(bias), y.data_ptr(), rows, outputs, inputs
    )
    return y
