"""Attention on CPUs: common/model/attention.py's mathematics in fewer passes over memory.

What makes it fast: attention.c splits qkv into turned heads, and puts heads side by side, in one
pass each; sampling's one new token a row is one call; bf16 has a backward pass of its own; and
padding is not computed (tokens.py). Where there is no C, PyTorch's operations do the same. Shape
legend: B rows, T positions, S cache slots, H heads, K key/value heads, D head width, N tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.model.attention import Context, Rope, split_heads
from common.model.attention import attention as plain_attention
from common.model.cache import Slots
from common.model.cpu.compile import address, functions_for, native_for, tensor
from common.model.cpu.tokens import Tokens

Heads = tuple[Tensor, Tensor, Tensor]  # queries (B, H, T, D), keys and values (B, K, T, D)
CACHED = 2**19  # elements of a score matrix that stay in a core's cache
BLOCK = 32  # queries and keys that PyTorch's kernel takes at a time


def attention(
    qkv: Tensor, heads: int, kv_heads: int, context: Context, dropout: float = 0.0
) -> Tensor:
    """As common.model.attention.attention: qkv (B, T, (H + 2 K) D) -> (B, T, H D); or, of the
    context's N tokens, (1, N, ...) each."""
    rope, mask, slots, tokens = context
    if slots is not None:
        return _cached(qkv, heads, kv_heads, context, slots)
    if functions_for(qkv, *(rope or ())):
        q, k, v = _SplitHeads.apply(qkv, heads, kv_heads, rope, tokens)
        return _MergeHeads.apply(attend(q, k, v, mask, dropout), tokens)
    q, k, v = split_heads(tokens.scatter(qkv) if tokens else qkv, heads, kv_heads, rope)
    y = attend(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
    return tokens.gather(y) if tokens else y


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v: (B, H, T, D), for queries (B, H, T, D), keys and values (B,
    K, S, D)."""
    if q.dtype == torch.bfloat16 and q.requires_grad and not dropout:
        return _Attend.apply(q, k, v, mask)
    return _attend(q, k, v, mask, dropout)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """By PyTorch's kernel. What a row says must not depend, in the last bit, on the padding that
    its neighbours ask for (PPO's ratio is 1 before the first update): the kernel works in blocks,
    and only whole ones add up in the same order. So causal rows are made whole. (In fp32 without
    AVX-512 this holds up to 192 positions, to rounding beyond: MKL's products differ there.)"""
    T, causal = q.shape[2], mask is None
    if causal and T % BLOCK:
        q, k, v = (F.pad(x, (0, 0, 0, -T % BLOCK)) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)
    return y[:, :, :T]


# With a cache


def _cached(qkv: Tensor, heads: int, kv_heads: int, context: Context, slots: Slots) -> Tensor:
    """While sampling: keys and values go to the slots of the context, and all used slots are
    attended to."""
    rope, mask = context.rope, context.mask
    same_dtype = qkv.dtype == slots.keys.dtype
    if not same_dtype or not functions_for(qkv, slots.keys, *(rope or ())):
        return plain_attention(qkv, heads, kv_heads, context)
    B, T, width = qkv.shape
    if T == 1:
        return _attend_one(qkv, heads, kv_heads, rope, mask, slots)
    q = qkv.new_empty(B, heads, T, width // (heads + 2 * kv_heads))
    _move_heads(qkv, (q, slots.keys, slots.values), rope, slots=slots.at)
    y = attend(q, slots.keys[:, :, : slots.used], slots.values[:, :, : slots.used], mask)
    return y.transpose(1, 2).flatten(2)


def _attend_one(
    qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, mask: Tensor, slots: Slots
) -> Tensor:
    """One new token a row: qkv (B, 1, ...) -> (B, 1, H D). What it sees of the slots has no
    gaps."""
    B, (_, _, S, D) = len(qkv), slots.keys.shape
    y, mask = qkv.new_empty(B, 1, heads * D), mask.contiguous()
    native_for(qkv).attend_one(
        *tensor(qkv),
        *(B, S, heads, kv_heads, D),
        *_tables(rope),
        *map(address, (slots.keys, slots.values, slots.at)),
        *tensor(mask),
        slots.used,
        y.data_ptr(),
    )
    return y


# Between qkv and heads


def _move_heads(
    qkv: Tensor,
    heads: Heads,
    rope: Rope | None,
    tokens: Tokens | None = None,
    slots: Tensor | None = None,
    back: bool = False,
) -> None:
    """From qkv to queries, keys and values, or back; slots (B, T): where in keys and values (B, K,
    S, D) the positions go."""
    (_, H, T, D), (_, K, S, _) = heads[0].shape, heads[1].shape
    native_for(qkv, *heads).split_heads(
        *tensor(qkv),
        qkv.shape[0] * qkv.shape[1],
        tokens and tokens.at.data_ptr(),
        address(slots),
        *(T, S, H, K, D),
        *_tables(rope),
        len(rope[0]) if rope else 1,
        *map(address, heads),
        back,
    )


def _tables(rope: Rope | None) -> tuple[int | None, int | None, bool]:
    """Cosines and sines as attention.c takes them."""
    return (rope[0].data_ptr(), *tensor(rope[1])) if rope else (None, None, False)


class _SplitHeads(torch.autograd.Function):
    """`split_heads`, of all tokens or of these; what is no token is zero."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, tokens: Tokens | None
    ) -> Heads:
        """qkv -> queries, keys, values."""
        B, T = (tokens.rows, tokens.length) if tokens else qkv.shape[:2]
        D = qkv.shape[2] // (heads + 2 * kv_heads)
        new = qkv.new_zeros if tokens else qkv.new_empty
        parts = new(B, heads, T, D), new(B, kv_heads, T, D), new(B, kv_heads, T, D)
        ctx.rope, ctx.tokens, ctx.like = rope, tokens, qkv.shape
        _move_heads(qkv, parts, rope, tokens)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Turned back, and put where they came from."""
        dqkv = gradients[0].new_empty(ctx.like)
        parts = tuple(g.contiguous() for g in gradients)
        _move_heads(dqkv, parts, ctx.rope, ctx.tokens, back=True)
        return dqkv, None, None, None, None


class _MergeHeads(torch.autograd.Function):
    """y (B, H, T, D) -> (B, T, H D), or (1, N, H D) of these tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tokens | None) -> Tensor:
        """Heads side by side."""
        B, H, T, D = ctx.like = y.shape
        ctx.tokens = tokens
        size = (1, len(tokens.at)) if tokens else (B, T)
        merged = y.new_empty(*size, H * D)
        _merge(merged, y.contiguous(), tokens)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """Each head's share of the gradient."""
        heads = (g.new_zeros if ctx.tokens else g.new_empty)(ctx.like)
        _merge(g.contiguous(), heads, ctx.tokens, back=True)
        return heads, None


def _merge(merged: Tensor, heads: Tensor, tokens: Tokens | None, back: bool = False) -> None:
    """From heads (B, H, T, D) to merged, or back."""
    _, H, T, D = heads.shape
    native_for(merged).merge_heads(
        *tensor(merged),
        merged.shape[0] * merged.shape[1],
        tokens and tokens.at.data_ptr(),
        *(T, H, D),
        heads.data_ptr(),
        back,
    )


# The backward pass in bf16


class _Attend(torch.autograd.Function):
    """The backward pass of PyTorch's kernel for CPUs takes 14 times its forward in bf16. This one
    computes the scores again, a few rows at a time, so that they stay in the cache, and in matrix
    products, which such CPUs are made for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """By PyTorch's kernel."""
        ctx.save_for_backward(q, k, v, mask)
        return _attend(q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of queries, keys and values."""
        q, k, v, mask = ctx.saved_tensors
        (B, H, T, D), K = q.shape, k.shape[1]
        g = g.contiguous()
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        size = max(1, CACHED // (H * T * T))
        for rows in (slice(b, b + size) for b in range(0, B, size)):
            # The queries that share a key are one matrix: (rows K, H / K T, D) against (rows K, T,
            # D).
            q_, g_ = (x[rows].view(-1, H // K * T, D) for x in (q, g))
            k_, v_ = (x[rows].flatten(0, 1) for x in (k, v))
            seen = mask if mask is None or len(mask) == 1 else mask[rows]
            p, ds = _weights(torch.bmm(q_, k_.mT), torch.bmm(g_, v_.mT), seen, D)
            torch.bmm(ds, k_, out=dq[rows].view_as(q_))
            torch.bmm(ds.mT, q_, out=dk[rows].view_as(k_))
            torch.bmm(p.mT, g_, out=dv[rows].view_as(v_))
        return dq, dk, dv, None


def _weights(scores: Tensor, dp: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Softmax of scores / sqrt(width) + mask, whose gradient is dp; and the gradient of scores (N,
    H / K T, T)."""
    N, rows, T = scores.shape
    if functions := functions_for(scores, dp):
        mask = None if mask is None else mask.contiguous()
        given = (None, False, 1) if mask is None else (*tensor(mask), len(mask))
        sizes = (width**-0.5, N * rows // T, T)
        functions.attention_scores(*tensor(scores), dp.data_ptr(), *given, *sizes)
        return scores, dp
    if mask is None:
        mask = torch.full((1, 1, T, T), -math.inf, dtype=scores.dtype).triu(1)
    biased = scores.view(len(mask), -1, T, T).mul(width**-0.5).add_(mask)
    p = biased.softmax(-1).view_as(scores)
    return p, torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(width**-0.5)
