"""Log-probs of given tokens straight from hidden states: there never are logits of more than a few
tokens.

The logits of a batch are the largest tensor of training (at 50 257 ids 200 KB a token). Here a few
tokens at a time are multiplied with the head's weight; the backward pass computes their logits
again, as Liger Kernel (Hsu 2024) does. Shape legend: N tokens, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.model.dispatch import operations
from common.model.ops import product_dtype


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature) at targets: hidden (N, C), weight (V, C),
    targets (N) -> (N) in fp32; and, if asked for, the entropy of each distribution (N) in nats,
    without a gradient. Raises IndexError for a target that is no id."""
    hidden = hidden.to(product_dtype(hidden))
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, entropies)


def at_once(device: str, vocabulary: int) -> int:
    """So many tokens that their logits stay in a core's cache, or take a quarter of a gigabyte of a
    GPU's memory; but not so few that adding up the weight's gradient costs more than making it."""
    return max(256, (2**20 if device == "cpu" else 2**26) // vocabulary)


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The tokens, `at_once` at a time."""
    size = at_once(hidden.device.type, len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


class _LinearLogprobs(torch.autograd.Function):
    """`linear_logprobs`, part by part in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies; only the log-probs are kept for the backward pass."""
        w, targets = weight.to(hidden.dtype), targets.long().contiguous()
        _check(targets, len(weight))
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        found = torch.empty_like(logprobs) if entropies else None
        for part in _parts(hidden, weight):
            logits = hidden[part] @ w.T
            of_part = operations(logits).logprobs_at(logits, targets[part], temperature, entropies)
            logprobs[part] = of_part[0]
            if found is not None:
                found[part] = of_part[1]
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
        """Gradients of hidden and weight; the latter is added up in fp32."""
        hidden, weight, targets, logprobs = ctx.saved_tensors
        w, g = weight.to(hidden.dtype), (g / ctx.temperature).contiguous()
        dhidden = torch.empty_like(hidden)
        # LoRA does not train the weight.
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _parts(hidden, weight):
            logits = hidden[part] @ w.T
            given = (targets[part], ctx.temperature, logprobs[part], g[part])
            d = operations(logits).logprobs_gradient(logits, *given)
            dhidden[part] = d @ w
            if dweight is not None:
                dweight += d.T @ hidden[part]
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


def _check(targets: Tensor, ids: int) -> None:
    """IndexError for a target outside 0 to ids - 1, which C would read without a word."""
    if targets.is_cpu and len(targets) and not 0 <= targets.min() <= targets.max() < ids:
        raise IndexError(f"targets from {targets.min()} to {targets.max()}: there are {ids} ids")
