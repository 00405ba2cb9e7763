"""Optimizers, the learning-rate schedule, and how many updates there are."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from common.config.training import SchedulerType, TrainConfig


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
    matrices = [p for p in trainable if p.dim() >= 2]
    others = [p for p in trainable if p.dim() < 2]
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": others, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, Any]], beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over these groups, fused, with their learning rates as peaks of the schedule."""
    return remember_peaks(torch.optim.AdamW(groups, betas=(0.9, beta2), eps=eps, fused=True))


def adamw_for(cfg: TrainConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW as the config says, over what trains in `module`."""
    groups = parameter_groups(module.parameters(), cfg.learning_rate, cfg.weight_decay)
    return adamw(groups, cfg.adam_beta2)


def remember_peaks(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer, with each group's learning rate noted as its peak."""
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def follow_schedule(
    cfg: TrainConfig, optimizer: torch.optim.Optimizer, step: int, steps: int
) -> float:
    """Set the learning rates of update number `step` (from 0) of `steps`; returns that of groups
    whose peak is cfg.learning_rate."""
    factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
    set_learning_rate(optimizer, factor)
    return factor * cfg.learning_rate


def steps_for(max_steps: int | None, epochs: float | None, rows: int, batch: int) -> int:
    """Number of updates: max_steps where it is given, else epochs over `rows` in global batches of
    `batch`. TrainConfig sees to it that one of the two is given."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, math.ceil(epochs * math.ceil(rows / batch)))


def is_due(done: int, every: int | None, steps: int) -> bool:
    """Whether what happens every so many updates (None: never) and at the end is to happen after
    `done` of `steps` updates."""
    return done == steps or bool(every and done % every == 0)
