"""Keys and values of the tokens that a model has seen, so that sampling computes each of them once.

Shape legend: B rows, T positions, S cache slots, K key/value heads, D head width, L layers.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from common.model import GPTConfig


class KVCache:
    """Keys and values of every layer, with a length of its own for each row.

    A row's next token is written right behind its last one; slots past a row's length hold whatever padding or a
    finished neighbour left there and are never seen, because a query at position p sees the slots 0..p only.
    """

    def __init__(self, config: "GPTConfig", batch: int, size: int, like: Tensor) -> None:
        shape = (config.n_layer, 2, batch, config.n_kv_head, size, config.head_width)
        self.entries = torch.zeros(shape, dtype=like.dtype, device=like.device)  # (L, 2, B, K, S, D)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.longest = 0  # of the lengths, known without asking the device

    def place(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` tokens of each row (B, T); also sets the mask that attention uses."""
        positions = self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)
        self.longest += tokens
        slots = torch.arange(self.longest, device=positions.device)
        self.mask = (slots <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        rows = torch.arange(len(positions), device=positions.device)
        self.at = (rows[:, None], slice(None), positions) if tokens > 1 else (rows, slice(None), positions[:, 0])
        return positions

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) at the placed positions; return all that is stored, (B, K, S, D) each."""
        for kind, new in enumerate((k, v)):
            # Indices around a slice put their own dimensions in front: (B, T, K, D), or (B, K, D) for one token.
            self.entries[layer, kind][self.at] = new.transpose(1, 2) if new.shape[2] > 1 else new.squeeze(2)
        keys, values = self.entries[layer, :, :, :, : self.longest]
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Only the given rows (indices) stay in the batch."""
        self.entries = self.entries[:, :, rows]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
