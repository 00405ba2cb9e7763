"""Rows into batches: padding, order, each process's share, and rows that are held out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.program.errors import InputError
from common.rows.sources import Row

if TYPE_CHECKING:  # torch takes a second to import, which preparing text need not wait for
    from torch import Tensor


def pad(rows: Sequence[Sequence[int]], value: int) -> "Tensor":
    """Right-padded ids: (rows, longest)."""
    import torch

    size = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (size - len(row))] for row in rows])


def batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = 16
) -> list[list[int]]:
    """One epoch of row indices in batches; every row once, the last batch may be smaller.

    Shuffled, then sorted by length inside windows of `window` batches, so that a batch pads little;
    then the batches are shuffled. A pure function of its arguments. The short batch stays last.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)).tolist()
    whole: list[list[int]] = []
    for start in range(0, len(order), batch_size * window):
        rows = sorted(order[start : start + batch_size * window], key=lambda row: lengths[row])
        whole += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    short = [batch for batch in whole if len(batch) < batch_size]
    full = [batch for batch in whole if len(batch) == batch_size]
    return [full[i] for i in rng.permutation(len(full))] + short


class Order:
    """Which rows make up the global batch of a step: a pure function of (seed, step).

    Epochs follow each other; with `drop_last` the short batch that ends one is left out.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, drop_last: bool = False
    ) -> None:
        """`lengths` are those of the rows, `batch_size` the rows of a global batch."""
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.per_epoch = len(lengths) // batch_size if drop_last else -(-len(lengths) // batch_size)
        self.epoch: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """The indices of the rows of this step."""
        epoch, place = divmod(step, self.per_epoch)
        if self.epoch[0] != epoch:
            self.epoch = (epoch, batches(self.lengths, self.batch_size, self.seed, epoch))
        return self.epoch[1][place]


def hold_out(
    rows: Sequence[Row], fraction: float, prompt_of: Callable[[dict[str, Any]], Any]
) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, no prompt on both sides: held out is the last `fraction` of the
    different prompts.

    Raises InputError when that leaves nothing to train on.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(str(prompt_of(row.data)))
        except InputError:  # it trains without having a prompt that could be answered
            prompts.append(row.origin)
    different = list(dict.fromkeys(prompts))
    held = set(different[-max(1, int(len(different) * fraction)) :])
    train: list[Row] = []
    held_out: list[Row] = []
    for row, prompt in zip(rows, prompts, strict=True):
        (held_out if prompt in held else train).append(row)
    if not train:
        told = f"{rows[0].origin}: all {len(rows)} rows share the held-out prompts"
        raise InputError(f"{told}; give eval_data and more prompts")
    return train, held_out


def share(
    rows: Sequence[Any],
    rank: int,
    processes: int,
    micro_batch: int,
    blank: Callable[[Any], Any] | None = None,
) -> Iterator[Sequence[Any]]:
    """This process's part of a global batch, in micro-batches; interleaved, so that lengths stay
    balanced.

    Every process gets as many rows as any other (they wait for each other at each forward): where
    they do not divide, the last ones get blank(row), a row that counts for nothing. Without `blank`
    they must divide.
    """
    missing = -len(rows) % processes
    if missing:
        assert blank is not None, f"{len(rows)} rows for {processes} processes"
        rows = [*rows, *[blank(rows[-1])] * missing]
    mine = rows[rank::processes]
    for start in range(0, len(mine), micro_batch):
        yield mine[start : start + micro_batch]
