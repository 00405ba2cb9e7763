"""Keys and values of the tokens that a model has seen, so that sampling computes each of them once.

Shape legend: B rows, T positions, S cache slots, K key/value heads, D head width, L layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.model.shape import GPTConfig


class Slots(NamedTuple):
    """One layer's share of a cache, and where its next tokens go."""

    keys: Tensor
    """(B, K, S, D)."""
    values: Tensor
    """(B, K, S, D)."""
    at: Tensor
    """(B, T) the slots of the next tokens."""
    used: int
    """How many slots, from the first on, hold anything once these tokens are written."""

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next tokens' keys and values (B, K, T, D); return all used ones, (B, K, used,
        D) each."""
        rows = torch.arange(len(self.at), device=self.at.device)[:, None]
        for kept, new in ((self.keys, k), (self.values, v)):
            # Indices around a slice put their dimensions in front: (B, T, K, D).
            kept[rows, :, self.at] = new.transpose(1, 2)
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


class KVCache:
    """Keys and values of every layer, with a length of its own for each row.

    A row's next token is written right behind its last one; slots past a row's length hold whatever
    padding or a finished neighbour left there and are never seen, because a query at position p
    sees the slots 0..p only.
    """

    def __init__(self, config: GPTConfig, batch: int, size: int, like: Tensor) -> None:
        """Room for `batch` rows of `size` tokens, of the dtype and on the device of `like`."""
        shape = (config.n_layer, 2, batch, config.n_kv_head, size, config.head_width)
        # (L, 2, B, K, S, D): of each layer the keys and the values.
        self.entries = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.longest = 0  # of the lengths, known without asking the device

    def place(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens of each row (B, T); also sets the mask that
        attention uses. Raises IndexError when the cache is full."""
        self.at = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        self.longest += tokens
        if self.longest > self.entries.shape[4]:
            room = self.entries.shape[4]
            raise IndexError(f"{self.longest} tokens in a row: the cache has room for {room}")
        slots = torch.arange(self.longest, device=self.at.device)
        self.mask = (slots <= self.at[:, :, None])[:, None]  # (B, 1, T, S)
        return self.at

    def slots(self, layer: int) -> Slots:
        """Where the placed tokens' keys and values of this layer go."""
        return Slots(self.entries[layer, 0], self.entries[layer, 1], self.at, self.longest)

    def advance(self, tokens: int) -> None:
        """The placed tokens are written: the rows are that much longer."""
        self.lengths = self.lengths + tokens

    def keep(self, rows: Tensor) -> None:
        """Only the given rows (indices) stay in the batch."""
        self.entries = self.entries[:, :, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
