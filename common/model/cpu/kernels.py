"""The operations of common/model/layers.py on CPUs, each with a backward pass of its own where
PyTorch's is slow.

The mathematics is the same (tests compare them); what is saved is memory traffic: nothing is kept
for the backward pass that is cheaper to compute again, and kernels.c, if it could be compiled, does
in one pass what takes PyTorch several. Shape legend: B rows, N tokens, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from common.model import layers
from common.model.cpu.compile import address, functions_for, native_for, tensor
from common.model.ops import product_dtype

# Norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better; under autocast
    the result is in its precision."""
    return _norm(x, weight, None, eps, centred=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension, likewise."""
    native = functions_for(x, weight, bias) and weight.dtype == bias.dtype
    if native and product_dtype(x) != torch.float16:
        return _norm(x, weight, bias, eps, centred=True)
    return layers.layer_norm(x, weight, bias, eps)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """LayerNorm (centred) or RMSNorm, with or without gradients. Raises ValueError for a weight of
    another width."""
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
    precise = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
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
        """Keeps x, and two numbers of each row."""
        y, mean, scale = _normalised(x, weight, bias, eps, centred, dtype)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, mean, scale = ctx.saved_tensors
        native = functions_for(g.contiguous(), x, weight)
        backward = _norm_backward_in_c if native else _norm_backward
        return *backward(g.contiguous(), x, weight, mean, scale, ctx.has_bias), None, None, None


Gradients = tuple[Tensor, Tensor, Tensor | None]  # of x, weight, bias


def _norm_backward_in_c(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor, has_bias: bool
) -> Gradients:
    """By kernels.c; each thread adds up a gradient of weight and bias of its own."""
    width, threads = x.shape[-1], torch.get_num_threads()
    dx, dweight = torch.empty_like(x), weight.new_zeros(threads, width, dtype=torch.float32)
    dbias = torch.zeros_like(dweight) if has_bias else None
    native_for(g, x, weight).norm_backward(
        *tensor(g),
        *tensor(x),
        *tensor(weight),
        *map(address, (mean, scale)),
        *tensor(dx),
        *map(address, (dweight, dbias)),
        *(threads, x.numel() // width, width),
    )
    dweight, dbias = (d if d is None else d.sum(0).to(weight.dtype) for d in (dweight, dbias))
    return dx, dweight, dbias


def _norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor, has_bias: bool
) -> Gradients:
    """By PyTorch's operations, in the precision of `scale`."""
    g, normal = g.to(scale.dtype, copy=True), (x if mean is None else x - mean) * scale
    product = (g * normal).flatten(0, -2)
    dbias = g.flatten(0, -2).sum(0).to(weight.dtype) if has_bias else None
    dot = (product @ weight.to(scale.dtype)).div_(x.shape[-1]).view_as(scale)
    dx = g.mul_(weight)
    if mean is not None:
        dx = dx - dx.mean(-1, keepdim=True)
    dx = dx.sub_(normal.mul_(dot)).mul_(scale)
    return dx.to(x.dtype), product.sum(0).to(weight.dtype), dbias


# Inside the MLP


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * value of h (N, 2 C), gate first: (N, C)."""
    return _SwiGLU.apply(h.contiguous()) if torch.is_grad_enabled() else _gated(h)


def _gated(h: Tensor) -> Tensor:
    """`swiglu` without gradients."""
    width = h.shape[-1] // 2
    if functions := functions_for(h):
        y = h.new_empty(*h.shape[:-1], width)
        functions.swiglu(*tensor(h), y.data_ptr(), y.numel() // width, width)
        return y
    return layers.swiglu(h)


class _SwiGLU(torch.autograd.Function):
    """Keeps h alone; silu is computed again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        """silu(gate) * value."""
        ctx.save_for_backward(h)
        return _gated(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Gradient of gate and value, in one tensor."""
        (h,) = ctx.saved_tensors
        g, width = g.contiguous(), g.shape[-1]
        if functions := functions_for(g, h):
            dh = torch.empty_like(h)
            sizes = (g.numel() // width, width)
            functions.swiglu_backward(g.data_ptr(), *tensor(h), dh.data_ptr(), *sizes)
            return dh
        # Contiguous halves are quicker by more than the copies take.
        gate, value = (half.contiguous() for half in h.chunk(2, dim=-1))
        return torch.cat([torch.ops.aten.silu_backward(g * value, gate), g * F.silu(gate)], dim=-1)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation."""
    return _GELU.apply(x) if functions_for(x) else layers.gelu(x)


class _GELU(torch.autograd.Function):
    """PyTorch's kernel for CPUs takes several times as long in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """By kernels.c."""
        ctx.save_for_backward(x)
        y, width = torch.empty_like(x), x.shape[-1]
        native_for(x).gelu(*tensor(x), y.data_ptr(), x.numel() // width, width)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """By kernels.c."""
        (x,) = ctx.saved_tensors
        g, dx, width = g.contiguous(), torch.empty_like(x), x.shape[-1]
        sizes = (x.numel() // width, width)
        native_for(g, x).gelu_backward(g.data_ptr(), *tensor(x), dx.data_ptr(), *sizes)
        return dx


# Behind the head


def logprobs_at(
    logits: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at targets: logits (N, V), targets (N) -> (N) in fp32; and
    the entropy of each distribution (N), if asked for. A target must be an id: C does not look."""
    functions = functions_for(logits)
    if functions is None:
        return layers.logprobs_at(logits, targets, temperature, entropies)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    found = torch.empty_like(logprobs) if entropies else None
    addresses = (logprobs.data_ptr(), address(found))
    functions.logprobs_at(
        *tensor(logits), targets.data_ptr(), 1 / temperature, *addresses, *logits.shape
    )
    return logprobs, found


def logprobs_gradient(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, g: Tensor
) -> Tensor:
    """Gradient of the logits (N, V), in their place, from g (N): that of the logprobs (N), over
    temperature."""
    functions = functions_for(logits)
    if functions is None:
        return layers.logprobs_gradient(logits, targets, temperature, logprobs, g)
    at_targets = layers.gradient_at_targets(logprobs, g)
    rows = map(address, (logprobs, g, at_targets))
    functions.logprobs_at_backward(
        *tensor(logits), targets.data_ptr(), 1 / temperature, *rows, *logits.shape
    )
    return logits


def pick_ids(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids (B) from softmax(logits / temperature) (B, V) where its cumulative sum exceeds uniforms
    (B); their log-probs (B), NaN where the logits are not finite."""
    functions = functions_for(logits, uniforms)
    if functions is None or uniforms.dtype != torch.float32:
        return layers.pick_ids(logits, uniforms, temperature)
    ids = torch.empty(len(logits), dtype=torch.long)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    sharpness = 1 / max(temperature, layers.COLDEST)
    addresses = (uniforms.data_ptr(), sharpness, ids.data_ptr(), logprobs.data_ptr())
    functions.pick_ids(*tensor(logits), *addresses, *logits.shape)
    return ids, logprobs
