"""Self-attention in three steps: heads from qkv, turned by their positions; scores and sums; heads
side by side again.

On a GPU all is PyTorch's own. On a CPU the first and last are single passes of attention.c, if it
could be compiled, and so is sampling's one new token a row; and bf16 has a backward pass of our
own. The mathematics is the same (tests compare). Shape legend: B rows, T positions, S cache slots,
H heads, K key/value heads, D head width, N tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.model.cache import Slots
from common.model.cpu.compile import address, functions_for, tensor

Rope = tuple[
    Tensor, Tensor
]  # (B or 1, T, D) each: cosines; sines, negative for the first half of D
Heads = tuple[Tensor, Tensor, Tensor]  # queries (B, H, T, D), keys and values (B, K, T, D)
CACHED = 2**19  # elements of a score matrix that stay in a core's cache


def document_mask(documents: Tensor) -> Tensor:
    """bool (B, 1, T, T): causal, and within a document only; documents (B, T) numbers the document
    of each token."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where mask is set and -inf elsewhere, made once for all layers."""
    return (
        mask
        if mask is None
        else torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, float("-inf")
        )
    )


class Tokens(NamedTuple):
    """N of the tokens of B right-padded rows: what lies behind the last one that matters need not
    be computed."""

    at: Tensor  # (N) places in the flattened (B, T), ascending
    rows: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """x (B, T) -> (1, N)."""
        return x.flatten()[self.at][None]


def needed(keep: Tensor) -> Tokens | None:
    """The tokens up to each row's last kept one, which are all that matter; None: all, or nearly,
    or not worth it on GPUs."""
    if keep.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    real = keep.flip(1).cummax(1).values.flip(1)
    return (
        None
        if real.float().mean() > 0.95
        else Tokens(real.flatten().nonzero().squeeze(1), *keep.shape)
    )


class _Gather(torch.autograd.Function):
    """x (M, C) -> its rows `at` (N, C), all different: PyTorch's index must add up in its backward
    pass, which is slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.rows = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(g, *ctx.saved_tensors, ctx.rows), None


class _Scatter(torch.autograd.Function):
    """The transpose: x (N, C) -> (rows, C), zero but for the rows `at`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(at)
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g.index_select(0, *ctx.saved_tensors), None, None


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    rope: Rope | None,
    mask: Tensor | None,
    dropout: float = 0.0,
    tokens: Tokens | None = None,
    slots: Slots | None = None,
) -> Tensor:
    """Self-attention over qkv (B, T, (H + 2 K) D), heads of queries, keys and values in this order
    -> (B, T, H D).

    mask: (B or 1, 1, T, S), 0 or -inf, added to the scores; None = causal. tokens: qkv is (1, N,
    ...), these of B rows, and so is what comes back. slots: of a cache, where keys and values go,
    and whose earlier ones are attended to as well; what a token sees of them has no gaps.
    """
    if slots is not None:
        return _cached_attention(qkv, heads, kv_heads, rope, mask, slots)
    if functions_for(qkv, *(rope or ())):
        q, k, v = _SplitHeads.apply(qkv, heads, kv_heads, rope, tokens)
        return _MergeHeads.apply(attend(q, k, v, mask, dropout), tokens)
    if tokens:
        qkv = _Scatter.apply(qkv[0], tokens.at, tokens.rows * tokens.length).unflatten(
            0, (tokens.rows, tokens.length)
        )
    y = attend(*split_heads(qkv, heads, kv_heads, rope), mask, dropout).transpose(1, 2).flatten(2)
    return _Gather.apply(y.flatten(0, 1), tokens.at)[None] if tokens else y


def _cached_attention(
    qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, mask: Tensor, slots: Slots
) -> Tensor:
    (B, T, _), (_, _, S, D) = qkv.shape, slots.keys.shape
    if qkv.requires_grad:
        raise RuntimeError(
            "attention with a cache is for sampling, without gradients: use torch.no_grad()"
        )
    functions = (
        functions_for(qkv, slots.keys, *(rope or ())) if qkv.dtype == slots.keys.dtype else None
    )
    if functions and T == 1:
        y = qkv.new_empty(B, 1, heads * D)
        mask = mask.contiguous()
        functions.attend_one(
            *tensor(qkv),
            B,
            S,
            heads,
            kv_heads,
            D,
            *_tables(rope),
            slots.keys.data_ptr(),
            slots.values.data_ptr(),
            slots.at.data_ptr(),
            *tensor(mask),
            slots.used,
            y.data_ptr(),
        )
        return y
    if functions:
        q = qkv.new_empty(B, heads, T, D)
        _move_heads(qkv, q, slots.keys, slots.values, rope, slots=slots.at)
    else:
        q, k, v = split_heads(qkv, heads, kv_heads, rope)
        slots.write(k, v)
    y = attend(q, slots.keys[:, :, : slots.used], slots.values[:, :, : slots.used], mask)
    return y.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary positions (Su 2021) on x (B, H, T, D); element i is paired with i + D/2, as in
    transformers."""
    cos, sin = (table.flatten(1).unsqueeze(1) for table in rope)
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x.flatten(2) * cos, turned.flatten(2), sin).view_as(x)


def split_heads(qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None) -> Heads:
    """qkv (B, T, (H + 2 K) D) -> queries, keys and values, contiguous, the first two turned."""
    parts = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    q, k, v = (part.transpose(1, 2).contiguous() for part in parts)
    return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


class _SplitHeads(torch.autograd.Function):
    """`split_heads`, of all tokens or of these; what is no token is zero."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, tokens: Tokens | None
    ) -> Heads:
        B, T = (tokens.rows, tokens.length) if tokens else qkv.shape[:2]
        D = qkv.shape[2] // (heads + 2 * kv_heads)
        new = qkv.new_zeros if tokens else qkv.new_empty
        q, k, v = new(B, heads, T, D), new(B, kv_heads, T, D), new(B, kv_heads, T, D)
        ctx.rope, ctx.tokens, ctx.like = rope, tokens, qkv.shape
        _move_heads(qkv, q, k, v, rope, tokens)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        dqkv = dq.new_empty(ctx.like)
        _move_heads(
            dqkv, dq.contiguous(), dk.contiguous(), dv.contiguous(), ctx.rope, ctx.tokens, back=True
        )
        return dqkv, None, None, None, None


def _move_heads(
    qkv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Rope | None,
    tokens: Tokens | None = None,
    slots: Tensor | None = None,
    back: bool = False,
) -> None:
    """From qkv to q, k, v, or back; slots (B, T): where in k and v (B, K, S, D) the positions
    go."""
    (_, H, T, D), (_, K, S, _) = q.shape, k.shape
    functions_for(qkv, q, k, v).split_heads(
        *tensor(qkv),
        qkv.shape[0] * qkv.shape[1],
        tokens and tokens.at.data_ptr(),
        address(slots),
        T,
        S,
        H,
        K,
        D,
        *_tables(rope),
        len(rope[0]) if rope else 1,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        back,
    )


def _tables(rope: Rope | None) -> tuple[int | None, int | None, bool]:
    """As attention.c takes them."""
    return (rope[0].data_ptr(), *tensor(rope[1])) if rope else (None, None, False)


class _MergeHeads(torch.autograd.Function):
    """y (B, H, T, D) -> (B, T, H D), or (1, N, H D) of these tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tokens | None) -> Tensor:
        B, H, T, D = ctx.like = y.shape
        ctx.tokens = tokens
        y = y.contiguous()
        merged = y.new_empty(*((1, len(tokens.at)) if tokens else (B, T)), H * D)
        functions_for(merged).merge_heads(
            *tensor(merged),
            merged.shape[0] * merged.shape[1],
            tokens and tokens.at.data_ptr(),
            T,
            H,
            D,
            y.data_ptr(),
            False,
        )
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        _, H, T, D = ctx.like
        g = g.contiguous()
        heads = (g.new_zeros if ctx.tokens else g.new_empty)(ctx.like)
        functions_for(g).merge_heads(
            *tensor(g),
            g.shape[0] * g.shape[1],
            ctx.tokens and ctx.tokens.at.data_ptr(),
            T,
            H,
            D,
            heads.data_ptr(),
            True,
        )
        return heads, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v: (B, H, T, D), for queries (B, H, T, D), keys and values (B,
    K, S, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and not dropout:
        return _Attend.apply(q, k, v, mask)
    return _forward(q, k, v, mask, dropout)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    T, causal = q.shape[2], mask is None
    if causal and q.device.type == "cpu" and T % 32:
        # What a row says must not depend, in the last bit, on the padding that its neighbours ask
        # for (PPO's ratio is 1 before the first update): the kernel works in blocks, and only whole
        # ones add up in the same order.
        q, k, v = (F.pad(x, (0, 0, 0, -T % 32)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y[:, :, :T]


class _Attend(torch.autograd.Function):
    """The backward pass of PyTorch's kernel for CPUs takes 14 times its forward in bf16. This one
    computes the scores again, a few rows at a time, so that they stay in the cache, and in matrix
    products, which such CPUs are made for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        return _forward(q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
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
        functions.attention_scores(
            *tensor(scores), dp.data_ptr(), *given, width**-0.5, N * rows // T, T
        )
        return scores, dp
    if mask is None:
        mask = torch.full((1, 1, T, T), float("-inf"), dtype=scores.dtype).triu(1)
    biased = scores.view(len(mask), -1, T, T).mul(width**-0.5).add_(mask)
    p = biased.softmax(-1).view_as(scores)
    return p, torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(width**-0.5)
