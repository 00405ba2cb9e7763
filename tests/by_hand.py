"""Training written out a second time, in plain arithmetic: the yardstick for whole runs.

A key that does not get from the config to the maths, or gets to another place, shows as a
difference of the weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

# Keys of all training stages, none of them at its default.
KEYS = {
    "max_steps": 4,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "min_lr_ratio": 0.4,
    "weight_decay": 0.5,
    "adam_beta2": 0.7,
    "max_grad_norm": 0.3,
    "seed": 3,
}
FACTORS = (0.5, 1.0, 0.8, 0.6)  # on the learning rate: half-way up; the peak; down towards .4
BETA1 = 0.9


class AdamW:
    """Loshchilov 2019, with decay on matrices only; a peak learning rate for each module."""

    def __init__(
        self, rates: Mapping[nn.Module, float], beta2: float, weight_decay: float, eps: float = 1e-8
    ) -> None:
        self.rates, self.beta2, self.eps, self.weight_decay = rates, beta2, eps, weight_decay
        self.count = 0
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters()}

    def parameters(self) -> list[nn.Parameter]:
        found = (p for module in self.rates for p in module.parameters() if p.requires_grad)
        return list(dict.fromkeys(found))

    def step(self, loss: Tensor, factors: Mapping[nn.Module, float], max_grad_norm: float) -> float:
        """One update; returns the norm of the gradient before it is clipped."""
        parameters = self.parameters()
        for p in parameters:
            p.grad = None
        loss.backward()
        norm = sum(float((p.grad.double() ** 2).sum()) for p in parameters) ** 0.5
        self.count += 1
        with torch.no_grad():
            for module, peak in self.rates.items():
                for p in (p for p in module.parameters() if p.requires_grad):
                    self.move(p, peak * factors[module], min(1.0, max_grad_norm / norm))
        return norm

    def move(self, p: nn.Parameter, rate: float, scale: float) -> None:
        """The new value of one parameter."""
        first, second = self.moments[p]
        gradient = p.grad * scale
        first.copy_(BETA1 * first + (1 - BETA1) * gradient)
        second.copy_(self.beta2 * second + (1 - self.beta2) * gradient**2)
        if p.dim() >= 2:
            p *= 1 - rate * self.weight_decay
        mean = first / (1 - BETA1**self.count)
        root = (second / (1 - self.beta2**self.count)).sqrt()
        p -= rate * mean / (root + self.eps)


def train(model: nn.Module, losses: Sequence[Callable[[nn.Module], Tensor]]) -> list[float]:
    """One update of `model` for each of the losses, with KEYS; returns the gradient norms."""
    optimizer = AdamW(
        {model: KEYS["learning_rate"]}, KEYS["adam_beta2"], KEYS["weight_decay"], eps=1e-8
    )
    return [
        optimizer.step(loss(model), {model: factor}, KEYS["max_grad_norm"])
        for loss, factor in zip(losses, FACTORS, strict=True)
    ]


def logprobs(model: nn.Module, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """log p of each id but the first, from those before it, of one unpadded row."""
    logits = model(torch.tensor([list(ids[:-1])]))[0] / temperature
    chosen = torch.tensor(list(ids[1:]))[:, None]
    return torch.log_softmax(logits, -1).gather(1, chosen)[:, 0]


def apart(model: nn.Module, folder: str | Path, start: nn.Module) -> float:
    """How far the published weights are from the model's, as a share of how far they have moved."""
    from common.handoff.publish import load_model

    kind = "reward" if hasattr(model, "score") else "lm"
    found = load_model(str(folder), kind)
    return distance(model, found) / distance(model, start)


def distance(one: nn.Module, other: nn.Module) -> float:
    """L2 over all weights."""
    return sum(squares(one, other)) ** 0.5


def squares(one: nn.Module, other: nn.Module) -> Iterable[float]:
    """Of each parameter."""
    theirs = dict(other.named_parameters())
    for name, p in one.named_parameters():
        yield float(((p - theirs[name]).detach().double() ** 2).sum())
