"""Optimizers, the learning-rate schedule, and `update()`: one optimizer step, normalised once by
the global count."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.config.training import SchedulerType
from common.program.errors import InputError


def schedule(
    kind: SchedulerType, step: int, total: int, warmup: int, min_ratio: float = 0.0
) -> float:
    """Factor on the peak learning rate for the update number `step` of `total` (from 0): a pure
    function, nothing to save.

    Linear warm-up over `warmup` updates; then cosine or linear to min_ratio at the end, or
    constant, or warmup_stable_decay (Hu 2024, WSD): constant until the last fifth, then linear to
    min_ratio.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)  # 0 .. <1
    if kind == "constant":
        return 1.0
    if kind == "warmup_stable_decay":
        done = max(0.0, (done - 0.8) / 0.2)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * falling


def parameter_groups(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups of those that train; decay on matrices only (GPT-3, appendix B)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.dim() >= 2],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trainable if p.dim() < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, Any]], beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.AdamW:
    return remember_peaks(torch.optim.AdamW(groups, betas=(0.9, beta2), eps=eps, fused=True))


def remember_peaks(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def steps_for(max_steps: int | None, epochs: float | None, rows: int, batch: int) -> int:
    """Number of updates: max_steps, or epochs over `rows` in global batches of `batch`. Exactly one
    must be given."""
    if (max_steps is None) == (epochs is None):
        raise InputError(
            f"max_steps {max_steps}, num_train_epochs {epochs}: give one of the two, null for the other"
        )
    return (
        max_steps if max_steps is not None else max(1, math.ceil(epochs * math.ceil(rows / batch)))
    )
