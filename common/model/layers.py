"""What the model computes between and behind its matrix products, in plain PyTorch.

CPUs have faster ones with the same mathematics (cpu/kernels.py); dispatch.py chooses. Shape legend:
B rows, N tokens, C width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

COLDEST = 1e-37  # the lowest temperature whose inverse fp32 holds; below, all is the same argmax


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang 2019)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension (Ba 2016)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020) of h (N, 2 C), gate first: (N, C)."""
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation (Hendrycks 2016)."""
    return F.gelu(x, approximate="tanh")


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) (N, V), in fp32."""
    if temperature == 1:
        return logits.log_softmax(-1, dtype=torch.float32)
    return (logits.float() / temperature).log_softmax(-1)


def logprobs_at(
    logits: Tensor, targets: Tensor, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at targets: logits (N, V), targets (N) -> (N) in fp32; and
    the entropy of each distribution (N) in nats, if asked for."""
    every = log_softmax(logits, temperature)
    chosen = every.gather(1, targets[:, None]).squeeze(1)
    return chosen, -(every.exp() * every).sum(-1) if entropies else None


def logprobs_gradient(
    logits: Tensor, targets: Tensor, temperature: float, logprobs: Tensor, g: Tensor
) -> Tensor:
    """Gradient of the logits (N, V), g (one-hot(targets) - softmax): what `logprobs_at` returned
    are the logprobs (N), and g (N) is their gradient over temperature."""
    if temperature == 1:
        d = logits.softmax(-1)
    else:
        d = log_softmax(logits, temperature).exp_().to(logits.dtype)
    d.mul_(-g[:, None].to(d.dtype))
    d[torch.arange(len(d), device=d.device), targets] = gradient_at_targets(logprobs, g).to(d.dtype)
    return d


def gradient_at_targets(logprobs: Tensor, g: Tensor) -> Tensor:
    """g (1 - p) of the targets, from their log-probs in fp32: in bf16, 1 - p would be 0 where the
    model is sure."""
    return -g * logprobs.expm1()


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """(logits - the row's largest) / temperature (B, V), in fp32: the same softmax as without the
    difference, but no number overflows however small the temperature is."""
    logits = logits.float()
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)


def pick_ids(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids (B) drawn from softmax(logits / temperature) (B, V), and their log-probs (B), which are
    NaN where the logits are not finite.

    The id is the first whose cumulative probability exceeds the row's uniform (B) in [0, 1).
    """
    scaled = logits.float() if temperature == 1 else sharpened(logits, temperature)
    probabilities = scaled.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # right=True lands on the first id whose cumulative mass exceeds the draw, so an id of
    # probability 0 is never met; the last cumulative value stands in for 1, which rounding may
    # miss.
    draws = uniforms[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, draws, right=True).clamp_(max=logits.shape[-1] - 1)
    return ids.squeeze(1), probabilities.gather(1, ids).log().squeeze(1)
