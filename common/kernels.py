"""The model's inner operations, each with a backward pass of its own where PyTorch's is slow on a CPU.

On a GPU, and wherever PyTorch's own is the faster one, they are PyTorch's own. The mathematics is the same (tests compare
them); what is saved is memory traffic: nothing is kept for the backward pass that is cheaper to compute again.
Shape legend: B rows, T positions, H heads, K key/value heads, D head width, C width, N any shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]  # (B or 1, T, D) each: cosines; sines, negative for the first half of D
CACHED = 2**19  # elements of a score matrix that stay in a core's cache


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x computes in: autocast's precision, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Tokens(NamedTuple):
    """N of the tokens of B right-padded rows: what lies behind the last one that matters need not be computed."""

    at: Tensor  # (N) places in the flattened (B, T), ascending
    rows: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """x (B, T) -> (1, N)."""
        return x.flatten()[self.at][None]


def needed(keep: Tensor) -> Tokens | None:
    """The tokens up to each row's last kept one, which are all that matter; None: all, or nearly, or not worth it on GPUs."""
    if keep.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    real = keep.flip(1).cummax(1).values.flip(1)
    return None if real.float().mean() > 0.95 else Tokens(real.flatten().nonzero().squeeze(1), *keep.shape)


class _Gather(torch.autograd.Function):
    """x (M, C) -> its rows `at` (N, C), all different: PyTorch's index must add up in its backward pass, which is slow."""

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


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary positions (Su 2021) on x (B, H, T, D); element i is paired with i + D/2, as in transformers."""
    cos, sin = (table.flatten(1).unsqueeze(1) for table in rope)
    turned = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x.flatten(2) * cos, turned.flatten(2), sin).view_as(x)


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    rope: Rope | None,
    mask: Tensor | None,
    dropout: float = 0.0,
    tokens: Tokens | None = None,
    remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Self-attention over qkv (B, T, (H + 2 K) D), heads of queries, keys and values in this order -> (B, T, H D).

    mask: (B or 1, 1, T, S), added to the scores; None = causal. tokens: qkv is (1, N, ...), these of B rows, and so is what
    comes back. remember: stores keys and values (B, K, T, D), returns all so far.
    """
    if tokens:
        rows = _Scatter.apply(qkv[0], tokens.at, tokens.rows * tokens.length).unflatten(0, (tokens.rows, tokens.length))
        y = attention(rows, heads, kv_heads, rope, mask, dropout)
        return _Gather.apply(y.flatten(0, 1), tokens.at)[None]
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.requires_grad and not (dropout or remember):
        return _Attention.apply(qkv, heads, kv_heads, rope, mask)
    if remember:
        qk, v = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).transpose(1, 2).split([heads + kv_heads, kv_heads], dim=1)
        q, k = (qk if rope is None else rotate(qk, rope)).split([heads, kv_heads], dim=1)
        return _attend(q, *remember(k, v), mask)
    return _attend(*_split(qkv, heads, kv_heads, rope), mask, dropout)


def _split(qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, K, T, D), contiguous."""
    parts = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], dim=2)
    q, k, v = (part.transpose(1, 2).contiguous() for part in parts)
    return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    T, causal = q.shape[2], mask is None
    if causal and q.device.type == "cpu" and T % 32:
        # What a row says must not depend, in the last bit, on the padding that its neighbours ask for (PPO's ratio is 1 before
        # the first update): the kernel works in blocks, and only whole ones add up in the same order.
        q, k, v = (F.pad(x, (0, 0, 0, -T % 32)) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y[:, :, :T].transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """The backward pass of PyTorch's kernel for CPUs takes 14 times its forward in bf16. This one computes the scores again,
    a few rows at a time, so that they stay in the cache, and in matrix products, which such CPUs are made for."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, mask: Tensor | None) -> Tensor:
        q, k, v = _split(qkv, heads, kv_heads, rope)
        ctx.save_for_backward(q, k, v, mask, *(rope or ()))
        return _attend(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        q, k, v, mask, *rope = ctx.saved_tensors
        (B, H, T, D), K = q.shape, k.shape[1]
        bias = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1) if mask is None else mask
        bias = bias.expand(B, H, T, T)
        g = g.view(B, T, H, D).transpose(1, 2).contiguous()
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        size = max(1, CACHED // (H * T * T))
        for rows in (slice(b, b + size) for b in range(0, B, size)):
            # The queries that share a key are one matrix: (rows K, H / K T, D) against (rows K, T, D).
            q_, g_ = (x[rows].view(-1, H // K * T, D) for x in (q, g))
            k_, v_ = (x[rows].flatten(0, 1) for x in (k, v))
            p = torch.baddbmm(bias[rows].reshape(-1, H // K * T, T), q_, k_.mT, alpha=D**-0.5).softmax(-1)
            ds = torch._softmax_backward_data(torch.bmm(g_, v_.mT), p, -1, p.dtype)
            dq_, dk_, dv_ = dq[rows].view_as(q_), dk[rows].view_as(k_), dv[rows].view_as(v_)
            torch.baddbmm(dq_, ds, k_, beta=0, alpha=D**-0.5, out=dq_)
            torch.baddbmm(dk_, ds.mT, q_, beta=0, alpha=D**-0.5, out=dk_)
            torch.bmm(p.mT, g_, out=dv_)
        if rope:
            back = (rope[0], -rope[1])
            dq, dk = rotate(dq, back), rotate(dk, back)
        return torch.cat([x.transpose(1, 2) for x in (dq, dk, dv)], dim=2).flatten(2), None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better; under autocast the result is in its."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps, product_dtype(x))
    return _scaled(x, _rms_scale(x, eps), weight, product_dtype(x))


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (x * scale.to(x.dtype)).mul_(weight).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """PyTorch has no kernel for CPUs: a dozen passes over x each way instead of three and seven."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = _rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return _scaled(x, scale, weight, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g, normal = g.to(scale.dtype, copy=True), x * scale
        product = (g * normal).flatten(0, -2)
        dot = (product @ weight.to(scale.dtype)).div_(x.shape[-1]).view_as(scale)
        dx = g.mul_(weight).sub_(normal.mul_(dot)).mul_(scale)
        return dx.to(x.dtype), product.sum(0).to(weight.dtype), None, None


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020) of h (N, 2 C), gate first: (N, C)."""
    if h.device.type == "cpu" and torch.is_grad_enabled():
        return _SwiGLU.apply(h)
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SwiGLU(torch.autograd.Function):
    """On halves made contiguous, which is quicker by more than the copies take."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        gate, value = (half.contiguous() for half in h.chunk(2, dim=-1))
        silu = F.silu(gate)
        ctx.save_for_backward(gate, value, silu)
        return silu * value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        gate, value, silu = ctx.saved_tensors
        return torch.cat([torch.ops.aten.silu_backward(g * value, gate), g * silu], dim=-1)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation. In bf16 on a CPU the exact one, which is nearer to it than bf16 to fp32, and a
    quarter of the time."""
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, entropies: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at targets: hidden (N, C), weight (V, C), targets (N) -> (N) in fp32.

    And the entropy of each distribution (N), without a gradient, when asked for. There never are logits of more than a few
    tokens: the backward pass computes them again (as Liger Kernel, Hsu 2024, does on GPUs).
    """
    return _LinearLogprobs.apply(hidden.to(product_dtype(hidden)), weight, targets, temperature, entropies)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropies: bool
    ) -> tuple[Tensor, Tensor | None]:
        w = weight.to(hidden.dtype)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        found = torch.empty_like(logprobs) if entropies else None
        for part in _parts(hidden, weight):
            every = _log_softmax(hidden[part] @ w.T, temperature)
            logprobs[part] = every.gather(1, targets[part, None]).squeeze(1)
            if entropies:
                found[part] = -(every.exp() * every).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, logprobs)
        ctx.temperature = temperature
        if entropies:
            ctx.mark_non_differentiable(found)
        return logprobs, found

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, logprobs = ctx.saved_tensors
        w, g = weight.to(hidden.dtype), g / ctx.temperature
        # 1 - p of the target from fp32: in bf16 nothing would be left of it where the model is sure.
        at_target, g = (x.to(hidden.dtype) for x in (-g * logprobs.expm1(), g))
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _parts(hidden, weight):
            logits = hidden[part] @ w.T
            if ctx.temperature == 1:
                d = logits.softmax(-1)
            else:
                d = _log_softmax(logits, ctx.temperature).exp_().to(w.dtype)
            d.mul_(-g[part, None])
            d[torch.arange(len(d), device=d.device), targets[part]] = at_target[part]
            dhidden[part] = d @ w
            if dweight is not None:  # LoRA does not train it
                dweight += d.T @ hidden[part]
        return dhidden, dweight if dweight is None else dweight.to(weight.dtype), None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In fp32."""
    if temperature == 1:
        return logits.log_softmax(-1, dtype=torch.float32)
    return (logits.float() / temperature).log_softmax(-1)


def at_once(device: str, vocabulary: int) -> int:
    """So many tokens that their logits stay in a core's cache, or take a quarter of a gigabyte of a GPU's memory; but not so
    few that adding up the weight's gradient costs more than making it."""
    return max(256, (2**20 if device == "cpu" else 2**26) // vocabulary)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = at_once(hidden.device.type, len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
