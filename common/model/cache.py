"""Keys and values of the tokens that a model has seen, so that sampling computes each of them once.

Shape legend: B rows, T positions, S cache slots, K key/value heads, D head width, L layers.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.model.shape import GPTConfig


class Slots(NamedTuple):
    """Of one layer."""

    keys: Tensor  # (B, K, S, D)
    values: Tensor
    at: Tensor  # (B, T) the slots of the next tokens
    used: int  # slots, from the first on, that hold anything when they are written

    def write(self, k: Tensor, v: Tensor) -> None:
        """k, v (B, K, T, D)."""
        rows = torch.arange(len(self.at), device=self.at.device)[:, None]
        for kept, new in ((self.keys, k), (self.values, v)):
            kept[rows, :, self.at] = new.transpose(
                1, 2
            )  # indices around a slice put their dimensions in front: (B, T, K, D)


class KVCache:
    """Keys and values of every layer, with a length of its own for each row.

    A row's next token is written right behind its last one; slots past a row's length hold whatever
    padding or a finished neighbour left there and are never seen, because a query at position p
    sees the slots 0..p only.
    """

    def __init__(self, config: "GPTConfig", batch: int, size: int, like: Tensor) -> None:
        shape = (config.n_layer, 2, batch, config.n_kv_head, size, config.head_width)
        self.entries = torch.zeros(
            shape, dtype=like.dtype, device=like.device
        )  # (L, 2, B, K, S, D)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.longest = 0  # of the lengths, known without asking the device

    def place(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens of each row (B, T); also sets the mask that
        attention uses."""
        self.at = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        self.longest += tokens
        if self.longest > self.entries.shape[4]:
            raise IndexError(
                f"{self.longest} tokens in a row: the cache has room for {self.entries.shape[4]}"
            )
        slots = torch.arange(self.longest, device=self.at.device)
        self.mask = (slots <= self.at[:, :, None])[:, None]  # (B, 1, T, S)
        return self.at

    def slots(self, layer: int) -> Slots:
        """Where the placed tokens' keys and values go."""
        return Slots(self.entries[layer, 0], self.entries[layer, 1], self.at, self.longest)

    def keep(self, rows: Tensor) -> None:
        """Only the given rows (indices) stay in the batch."""
        self.entries = self.entries[:, :, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
