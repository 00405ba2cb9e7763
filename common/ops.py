"""Tensor maths that every stage shares. Imports torch alone.

Shape legend: B rows, T positions, V vocabulary, N any shape.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: logits (N, V), ids (N) -> (N), in fp32."""
    logits = logits.float() / temperature
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (N, V) -> (N)."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is set. Unlike x * mask, a NaN on padding stays outside."""
    return torch.where(mask.bool(), x, 0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is set; 0 for an empty mask."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, moments: Tensor | None = None) -> Tensor:
    """(x - mean) / std over the masked entries (N+ detail 14, mean removed); padding becomes 0.

    `moments`: (count, sum, sum of squares) over *all* processes; of x and mask alone when None.
    """
    count, total, squares = masked_moments(x, mask) if moments is None else moments
    mean = total / count
    variance = squares / count - mean**2
    return torch.where(mask.bool(), ((x - mean) * torch.rsqrt(variance.clamp(min=0) + 1e-8)).to(x.dtype), 0)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, sum, sum of squares) of the masked entries in fp64, ready to be summed over processes: (3)."""
    kept = torch.where(mask.bool(), x, 0).double()
    return torch.stack([mask.sum().double(), kept.sum(), (kept**2).sum()])


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """1 for the first lengths[b] positions of row b: (B) -> bool (B, size)."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)
