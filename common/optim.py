"""Optimizers, the learning-rate schedule, and `update()`: one optimizer step, normalised once by the global count."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.config import InputError

SchedulerType = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is NaN or infinite; raised before the weights are touched."""


def schedule(kind: SchedulerType, step: int, total: int, warmup: int, min_ratio: float = 0.0) -> float:
    """Factor on the peak learning rate for the update number `step` of `total` (from 0): a pure function, nothing to save.

    Linear warm-up over `warmup` updates; then cosine or linear to min_ratio at the end, or constant, or
    warmup_stable_decay (Hu 2024, WSD): constant until the last fifth, then linear to min_ratio.
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


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters; decay on matrices only (GPT-3, appendix B)."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], beta2: float = 0.999, eps: float = 1e-8) -> torch.optim.AdamW:
    return remember_peaks(torch.optim.AdamW(groups, betas=(0.9, beta2), eps=eps, fused=True))


def muon(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """Muon (Jordan 2024) over the matrices inside the blocks; everything else is AdamW's (see `split_for_muon`)."""
    return remember_peaks(torch.optim.Muon(split_for_muon(module)[0], lr=learning_rate, weight_decay=weight_decay))


def split_for_muon(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices inside blocks, all other parameters), trainable ones."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if ".blocks." in name and p.dim() == 2]
    chosen = set(map(id, matrices))
    return matrices, [p for _, p in named if id(p) not in chosen]


def remember_peaks(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Each group's peak learning rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Update(NamedTuple):
    losses: list[float]  # mean over the global batch of each of the K terms
    grad_norm: float  # before clipping, L2


def update(
    accelerator: Accelerator,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    micro_batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    counts: Tensor,
    max_grad_norm: float,
) -> Update:
    """One optimizer step on sum_k (sum of term k / global count of term k), whatever the split into micro-batches.

    loss(micro_batch) -> (K) summed terms; counts (K): what this process's micro-batches sum over (tokens, rows, ...).
    The same weights follow from 1x4, 2x2 or two processes. Raises NonFiniteError before anything changes.
    """
    total = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").clamp(min=1)
    # DDP averages gradients over processes; a sum is wanted, because the count is already global.
    weights = accelerator.num_processes / total
    sums = torch.zeros_like(total)
    for optimizer in optimizers:
        optimizer.zero_grad()  # what a refused update may have left
    for i, batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with nullcontext() if last else accelerator.no_sync(module):
            terms = loss(batch)
            if not torch.isfinite(terms).all():
                raise NonFiniteError(f"loss {terms.tolist()} in micro-batch {i}; no update was applied")
            accelerator.backward((terms * weights).sum())
        sums += terms.detach()
    norm = accelerator.clip_grad_norm_(module.parameters(), max_grad_norm)
    if not math.isfinite(float(norm)):
        raise NonFiniteError(f"gradient norm {float(norm)}; no update was applied")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return Update((accelerator.reduce(sums, "sum") / total).tolist(), float(norm))


def steps_for(max_steps: int | None, epochs: float | None, rows: int, batch: int) -> int:
    """Number of updates: max_steps, or epochs over `rows` in global batches of `batch`. Exactly one must be given."""
    if (max_steps is None) == (epochs is None):
        raise InputError(f"max_steps {max_steps}, num_train_epochs {epochs}: give one of the two, null for the other")
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * math.ceil(rows / batch)))
