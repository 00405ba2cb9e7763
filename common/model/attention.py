"""Causal self-attention (Vaswani 2017), in plain PyTorch.

One tensor holds the queries, keys and values of all heads; `attention` splits it, turns queries
and keys by their positions, lets every query attend to the keys it may see, and puts the heads side
by side again. CPUs have a faster one with the same mathematics (cpu/attention.py); dispatch.py
chooses. Shape legend: B rows, T positions, S positions attended to (T, or the slots of a cache), H
heads, K key/value heads, D head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.model.cache import Slots
from common.model.cpu.tokens import Tokens

# Cosines and sines, (B or 1, T, D) each; the sines are negative for the first half of D.
Rope = tuple[Tensor, Tensor]


class Context(NamedTuple):
    """What attention knows of its tokens besides their vectors."""

    rope: Rope | None = None
    """Rotary positions of the tokens (llama); None: there are none."""
    mask: Tensor | None = None
    """(B or 1, 1, T, S), 0 or -inf, added to the scores; None: causal."""
    slots: Slots | None = None
    """While sampling: the cache's slots for these tokens, behind the earlier ones."""
    tokens: Tokens | None = None
    """On a CPU: which tokens of padded rows these are; None: all of them."""


def attention(
    qkv: Tensor, heads: int, kv_heads: int, context: Context, dropout: float = 0.0
) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v for each head: qkv (B, T, (H + 2 K) D) -> (B, T, H D).

    qkv has heads of queries, keys and values in this order. With a cache (`slots`), keys and values
    are written there, and the earlier ones are attended to as well.
    """
    q, k, v = split_heads(qkv, heads, kv_heads, context.rope)
    if context.slots is not None:
        k, v = context.slots.write(k, v)
    causal, grouped = context.mask is None, heads != kv_heads
    y = F.scaled_dot_product_attention(
        q, k, v, context.mask, dropout, is_causal=causal, enable_gqa=grouped
    )
    return y.transpose(1, 2).flatten(2)


def split_heads(
    qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, K, T, D) of qkv; queries and keys are turned."""
    parts = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    q, k, v = (part.transpose(1, 2).contiguous() for part in parts)
    return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x (B, H, T, D), each pair of elements (i, i + D/2) turned by its position's angle (Su 2021).

    The pairs are those of transformers; Su pairs (2 i, 2 i + 1).
    """
    cos, sin = (table.unsqueeze(1) for table in rope)  # the same for all heads
    other = x.roll(x.shape[-1] // 2, -1)  # each element's partner
    return torch.addcmul(x * cos, other, sin)


def rotary_tables(length: int, width: int, theta: float) -> Rope:
    """Cosines and sines (length, D) of the angles position * theta^(-2 i / D), once per pair half;
    the first half's sines are negative, as `rotate` wants them."""
    frequencies = theta ** -(torch.arange(0, width, 2).float() / width)
    angles = torch.arange(length).float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def document_mask(documents: Tensor) -> Tensor:
    """What a token may attend to where several documents are packed into a row: itself and earlier
    tokens of its own document. documents (B, T) numbers each token's -> bool (B, 1, T, T)."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def window_mask(positions: Tensor, keys: int, window: int) -> Tensor:
    """What a token of a local layer may attend to: itself and the window - 1 positions before it.
    positions (B or 1, T), keys at positions 0 to keys - 1 -> bool (B or 1, 1, T, keys)."""
    back = positions[:, :, None] - torch.arange(keys, device=positions.device)
    return ((back >= 0) & (back < window))[:, None]


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as what is added to scores: 0 where it is set, -inf elsewhere; None stays."""
    if mask is None:
        return None
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, float("-inf"))
