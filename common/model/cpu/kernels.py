"""The model's inner operations but attention, each with a backward pass of its own where PyTorch's
is slow on a CPU.

On a GPU, and wherever PyTorch's own is the faster one, they are PyTorch's own. The mathematics is
the same (tests compare them); what is saved is memory traffic: nothing is kept for the backward
pass that is cheaper to compute again, and kernels.c, if it could be compiled, does in one pass what
takes PyTorch several. Shape legend: N tokens, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.model.cpu.compile import address, functions_for, tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x computes in: autocast's precision, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better; under autocast
    the result is in its."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    return _norm(x, weight, None, eps, centred=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension, likewise (Ba
    2016)."""
    if (
        functions_for(x, weight, bias)
        and weight.dtype == bias.dtype
        and product_dtype(x) != torch.float16
    ):
        return _norm(x, weight, bias, eps, centred=True)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight of {tuple(weight.shape)} for x of {tuple(x.shape)}")
    arguments = (x.contiguous(), weight, bias, eps, centred, product_dtype(x))
    return _Norm.apply(*arguments) if torch.is_grad_enabled() else _normalised(*arguments)[0]


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, and of each row its mean, if centred, and its factor."""
    width, y = x.shape[-1], torch.empty_like(x, dtype=dtype)
    if functions := functions_for(x, weight, y):
        rows = (*x.shape[:-1], 1)
        mean = x.new_empty(rows, dtype=torch.float32) if centred else None
        scale = x.new_empty(rows, dtype=torch.float32)
        addresses = (address(bias), *tensor(y), address(mean), scale.data_ptr())
        functions.norm(*tensor(x), *tensor(weight), *addresses, x.numel() // width, width, eps)
        return y, mean, scale
    length = torch.linalg.vector_norm(
        x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    scale = length.square_().div_(width).add_(eps).rsqrt_()
    return (x * scale.to(x.dtype)).mul_(weight).to(dtype), None, scale


class _Norm(torch.autograd.Function):
    """PyTorch has no kernel of RMSNorm for CPUs: a dozen passes over x each way. Its LayerNorm
    leaves autocast's precision."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        y, mean, scale = _normalised(x, weight, bias, eps, centred, dtype)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        width = x.shape[-1]
        g = g.contiguous()
        if functions := functions_for(g, x, weight):
            threads = torch.get_num_threads()
            dx, dweight = torch.empty_like(x), weight.new_zeros(threads, width, dtype=torch.float32)
            dbias = torch.zeros_like(dweight) if ctx.has_bias else None
            functions.norm_backward(
                *tensor(g),
                *tensor(x),
                *tensor(weight),
                address(mean),
                scale.data_ptr(),
                *tensor(dx),
                dweight.data_ptr(),
                address(dbias),
                threads,
                x.numel() // width,
                width,
            )
            dweight, dbias = (
                d if d is None else d.sum(0).to(weight.dtype) for d in (dweight, dbias)
            )
            return dx, dweight, dbias, None, None, None
        g, normal = g.to(scale.dtype, copy=True), (x if mean is None else x - mean) * scale
        product = (g * normal).flatten(0, -2)
        dbias = g.flatten(0, -2).sum(0).to(weight.dtype) if ctx.has_bias else None
        dot = (product @ weight.to(scale.dtype)).div_(width).view_as(scale)
        dx = g.mul_(weight)
        if mean is not None:
            dx = dx - dx.mean(-1, keepdim=True)
        dx = dx.sub_(normal.mul_(dot)).mul_(scale)
        return dx.to(x.dtype), product.sum(0).to(weight.dtype), dbias, None, None, None


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020) of h (N, 2 C), gate first: (N, C)."""
    if h.device.type == "cpu" and torch.is_grad_enabled():
        return _SwiGLU.apply(h.contiguous())
    return _gated(h)


def _gated(h: Tensor) -> Tensor:
    width = h.shape[-1] // 2
    if functions := functions_for(h):
        y = h.new_empty(*h.shape[:-1], width)
        functions.swiglu(*tensor(h), y.data_ptr(), y.numel() // width, width)
        return y
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return _gated(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        g, width = g.contiguous(), g.shape[-1]
        if functions := functions_for(g, h):
            dh = torch.empty_like(h)
            functions.swiglu_backward(
                g.data_ptr(), *tensor(h), dh.data_ptr(), g.numel() // width, width
            )
            return dh
        gate, value = (
            half.contiguous() for half in h.chunk(2, dim=-1)
        )  # quicker by more than the copies take
        return torch.cat([torch.ops.aten.silu_backward(g * value, gate), g * F.silu(gate)], dim=-1)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation (Hendrycks 2016)."""
    return _GELU.apply(x) if functions_for(x) else F.gelu(x, approximate="tanh")


class _GELU(torch.autograd.Function):
    """PyTorch's kernel for CPUs takes several times as long in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y, width = torch.empty_like(x), x.shape[-1]
        functions_for(x).gelu(*tensor(x), y.data_ptr(), x.numel() // width, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g, dx, width = g.contiguous(), torch.empty_like(x), x.shape[-1]
        functions_for(g, x).gelu_backward(
            g.data_ptr(), *tensor(x), dx.data_ptr(), x.numel() // width, width
        )
        return dx


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at targets: hidden (N, C), weight (V, C),
    targets (N) -> (N) in fp32.

    And the entropy of each distribution (N), without a gradient, when asked for. There never are
    logits of more than a few tokens: the backward pass computes them again (as Liger Kernel, Hsu
    2024, does on GPUs). IndexError: a target that is no id.
    """
    return _LinearLogprobs.apply(
        hidden.to(product_dtype(hidden)), weight, targets, temperature, entropies
    )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        w, targets = weight.to(hidden.dtype), targets.long().contiguous()
        if (
            targets.device.type == "cpu"
            and len(targets)
            and not 0 <= targets.min() <= targets.max() < len(weight)
        ):
            # C would not say so.
            raise IndexError(
                f"targets from {targets.min()} to {targets.max()}: there are {len(weight)} ids"
            )
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        found = torch.empty_like(logprobs) if entropies else None
        for part in _parts(hidden, weight):
            _logprobs(
                hidden[part] @ w.T,
                targets[part],
                temperature,
                logprobs[part],
                found[part] if entropies else None,
            )
        ctx.save_for_backward(hidden, weight, targets, logprobs)
        ctx.temperature = temperature
        if entropies:
            ctx.mark_non_differentiable(found)
        return logprobs, found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g: Tensor, _: Tensor | None
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, logprobs = ctx.saved_tensors
        w, g = weight.to(hidden.dtype), (g / ctx.temperature).contiguous()
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _parts(hidden, weight):
            d = _logprobs_backward(
                hidden[part] @ w.T, targets[part], ctx.temperature, logprobs[part], g[part]
            )
            dhidden[part] = d @ w
            if dweight is not None:  # LoRA does not train it
                dweight += d.T @ hidden[part]
        return dhidden, dweight if dweight is None else dweight.to(weight.dtype), None, None, None


def _logprobs(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, entropies: Tensor | None
) -> None:
    """Of logits (N, V) at targets, written to logprobs and entropies (N)."""
    if functions := functions_for(logits):
        found = (logprobs.data_ptr(), address(entropies))
        functions.logprobs_at(
            *tensor(logits), targets.data_ptr(), 1 / temperature, *found, *logits.shape
        )
        return
    every = _log_softmax(logits, temperature)
    logprobs.copy_(every.gather(1, targets[:, None]).squeeze(1))
    if entropies is not None:
        entropies.copy_(-(every.exp() * every).sum(-1))


def _logprobs_backward(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, g: Tensor
) -> Tensor:
    """Gradient of the logits, in their place or not, from g: that of `logprobs`, over
    temperature."""
    # 1 - p of the target from its log-prob in fp32: in bf16 nothing would be left of it where the
    # model is sure.
    at_target = -g * logprobs.expm1()
    if functions := functions_for(logits):
        rows = (x.data_ptr() for x in (logprobs, g, at_target))
        functions.logprobs_at_backward(
            *tensor(logits), targets.data_ptr(), 1 / temperature, *rows, *logits.shape
        )
        return logits
    if temperature == 1:
        d = logits.softmax(-1)
    else:
        d = _log_softmax(logits, temperature).exp_().to(logits.dtype)
    d.mul_(-g[:, None].to(d.dtype))
    d[torch.arange(len(d), device=d.device), targets] = at_target.to(d.dtype)
    return d


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In fp32."""
    if temperature == 1:
        return logits.log_softmax(-1, dtype=torch.float32)
    return (logits.float() / temperature).log_softmax(-1)


def pick_ids(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids (B) from softmax(logits / temperature) (B, V) where its cumulative sum exceeds uniforms
    (B); their log-probs (B)."""
    if (functions := functions_for(logits, uniforms)) and uniforms.dtype == torch.float32:
        ids, logprobs = (
            torch.empty(len(logits), dtype=dtype) for dtype in (torch.long, torch.float32)
        )
        functions.pick_ids(
            *tensor(logits),
            uniforms.data_ptr(),
            1 / temperature,
            ids.data_ptr(),
            logprobs.data_ptr(),
            *logits.shape,
        )
        return ids, logprobs
    probabilities = (logits.float() / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # right=True lands on the first id whose cumulative mass exceeds the draw, so an id of
    # probability 0 is never met; the last cumulative value stands in for 1, which rounding may
    # miss.
    draws = uniforms[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    return ids.squeeze(1), probabilities.gather(1, ids).log().squeeze(1)


def at_once(device: str, vocabulary: int) -> int:
    """So many tokens that their logits stay in a core's cache, or take a quarter of a gigabyte of a
    GPU's memory; but not so few that adding up the weight's gradient costs more than making it."""
    return max(256, (2**20 if device == "cpu" else 2**26) // vocabulary)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = at_once(hidden.device.type, len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
