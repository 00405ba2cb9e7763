"""Tensor maths that every stage shares. Imports torch alone.

Shape legend: B rows, T positions, V vocabulary, N any shape.
"""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: logits (N, V), ids (N) -> (N), in fp32."""
    logits = logits.float() / temperature
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is set. Unlike x * mask, a NaN on padding stays outside."""
    return torch.where(mask.bool(), x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is set; 0 for an empty mask."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the masked entries (N+ detail 14, mean removed), taken in fp64; padding
    becomes 0."""
    kept = x[mask.bool()].double()
    root = torch.rsqrt(kept.var(correction=0) + 1e-8)
    return torch.where(mask.bool(), ((x - kept.mean()) * root).to(x.dtype), 0)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """1 for the first lengths[b] positions of row b: (B) -> bool (B, size)."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def response_mask(prompt_lengths: Tensor, response_lengths: Tensor, size: int) -> Tensor:
    """Positions whose logits predict a response token, one to its left: (B), (B) -> (B, size)."""
    positions = torch.arange(size, device=prompt_lengths.device)
    first = prompt_lengths.unsqueeze(-1) - 1
    return (positions >= first) & (positions < first + response_lengths.unsqueeze(-1))


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x computes in: autocast's precision, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
