"""Padded rows on a CPU: only the tokens that matter are computed.

Rows are right-padded, so what lies behind the last token that matters to the caller influences
nothing. A CPU's time is proportional to the tokens: the model takes them out of (B, T) into one row
(1, N), and attention alone puts them back to see who precedes whom. Shape legend: B rows, T
positions, N tokens that matter, C width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """N tokens of B right-padded rows of T positions."""

    at: Tensor
    """(N) their places in the flattened (B, T), ascending."""
    rows: int
    """B."""
    length: int
    """T."""

    def of(self, x: Tensor) -> Tensor:
        """What x (B or 1, T) says of these tokens: (1, N)."""
        return x.expand(self.rows, self.length).flatten()[self.at][None]

    def gather(self, x: Tensor) -> Tensor:
        """Their vectors: x (B, T, C) -> (1, N, C)."""
        return _Gather.apply(x.flatten(0, 1), self.at)[None]

    def scatter(self, x: Tensor) -> Tensor:
        """The transpose: x (1, N, C) -> (B, T, C), zero where there is none of these tokens."""
        rows = _Scatter.apply(x[0], self.at, self.rows * self.length)
        return rows.unflatten(0, (self.rows, self.length))


def needed(keep: Tensor | None) -> Tokens | None:
    """The tokens up to the last one of each row that `keep` (B, T) is set for.

    None stands for all tokens: where nothing is said of them (keep None), where nearly all matter,
    and on GPUs, for which it is not worth the trouble.
    """
    if keep is None or not keep.is_cpu or torch.compiler.is_compiling():
        return None
    real = keep.flip(1).cummax(1).values.flip(1)
    if real.float().mean() > 0.95:
        return None
    return Tokens(real.flatten().nonzero().squeeze(1), *keep.shape)


class _Gather(torch.autograd.Function):
    """x (M, C) -> its rows `at` (N, C), all different.

    PyTorch's index does not know that they differ; its backward pass adds up, which is slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        """Take the rows."""
        ctx.save_for_backward(at)
        ctx.rows = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Put the gradients of the rows back; the others have none."""
        return _Scatter.apply(g, *ctx.saved_tensors, ctx.rows), None


class _Scatter(torch.autograd.Function):
    """The transpose: x (N, C) -> (rows, C), zero but for the rows `at`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, rows: int) -> Tensor:
        """Write the rows into zeros."""
        ctx.save_for_backward(at)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """Take the gradients of the rows."""
        return g.index_select(0, *ctx.saved_tensors), None, None
