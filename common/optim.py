"""Optimizers, the learning-rate schedule, and `update()`: one optimizer step, normalised once by the global count."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from common.config import Failure, InputError

SchedulerType = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


class NonFiniteError(Failure):
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


def parameter_groups(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of those that train; decay on matrices only (GPT-3, appendix B)."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], beta2: float = 0.999, eps: float = 1e-8) -> torch.optim.AdamW:
    return remember_peaks(torch.optim.AdamW(groups, betas=(0.9, beta2), eps=eps, fused=True))


def remember_peaks(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Update(NamedTuple):
    losses: list[float]  # mean over the global batch of each of the K terms
    grad_norm: float  # before clipping, L2


def update(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    counts: Tensor,
    max_grad_norm: float,
) -> Update:
    """One optimizer step on sum_k (sum of term k / global count of term k), whatever the split into micro-batches.

    loss(micro_batch) -> (K) summed terms; counts (K): what this process's micro-batches sum over (tokens, rows, ...).
    The same weights follow from 1x4, 2x2, two processes, or ZeRO; every process needs the same number of micro-batches.
    Raises NonFiniteError, on all processes alike, before anything changes.
    """
    engine = module if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    total = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").clamp(min=1)
    # DDP and DeepSpeed average gradients over processes; a sum is wanted, because the count is already global.
    weights = accelerator.num_processes / total
    parts = []
    optimizer.zero_grad()  # what a refused update may have left
    for i, batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with nullcontext() if last or engine else accelerator.no_sync(module):
            terms = loss(batch)
            scaled = (terms * weights).sum()
            # A process that gave up alone would leave the others waiting. NaN gradients reach all of them, in the norm.
            scaled = scaled * torch.where(scaled.isfinite(), 1.0, torch.nan)
            if engine:
                engine.set_gradient_accumulation_boundary(last)
                engine.backward(scaled)
            else:
                accelerator.backward(scaled)
        parts.append(terms.detach())
    if engine:
        engine.step()  # clips, too; with a norm that is not finite it changes nothing
        norm = float(engine.get_global_grad_norm())
    else:
        norm = float(accelerator.clip_grad_norm_(module.parameters(), max_grad_norm))
    losses = (accelerator.reduce(torch.stack(parts).sum(0), "sum") / total).tolist()
    overflow = accelerator.scaler is not None and all(map(math.isfinite, losses))  # fp16: the scaler skips, and scales less
    if not math.isfinite(norm) and not overflow:
        bad = [f"{i} of process {accelerator.process_index}" for i, terms in enumerate(parts) if not terms.isfinite().all()]
        where = f" from micro-batch {', '.join(found)}" if (found := gather_object(bad)) else ""
        raise NonFiniteError(f"loss {losses}{where}, gradient norm {norm}; no update was applied")
    optimizer.step()
    optimizer.zero_grad()
    return Update(losses, norm)


def steps_for(max_steps: int | None, epochs: float | None, rows: int, batch: int) -> int:
    """Number of updates: max_steps, or epochs over `rows` in global batches of `batch`. Exactly one must be given."""
    if (max_steps is None) == (epochs is None):
        raise InputError(f"max_steps {max_steps}, num_train_epochs {epochs}: give one of the two, null for the other")
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * math.ceil(rows / batch)))
