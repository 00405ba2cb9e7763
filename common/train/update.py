"""One optimizer step, normalised once by the global count."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from common.program.errors import Failure


class NonFiniteError(Failure):
    """A loss or gradient norm is NaN or infinite; raised before the weights are touched."""


class Update(NamedTuple):
    """What one optimizer step was, over all processes."""

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
    """One optimizer step on sum_k (sum of term k / global count of term k), whatever the split into
    micro-batches.

    loss(micro_batch) -> (K) summed terms; counts (K): what this process's micro-batches sum over
    (tokens, rows, ...). The same weights follow from 1x4, 2x2, two processes, or ZeRO; every
    process needs the same number of micro-batches. Raises NonFiniteError, on all processes alike,
    before anything changes.
    """
    engine = module if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    total = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").clamp(min=1)
    # DDP and DeepSpeed average gradients over processes; a sum is wanted, because the count is
    # already global.
    weights = accelerator.num_processes / total
    optimizer.zero_grad()  # what a refused update may have left
    parts = []  # (K) of each micro-batch
    for i, batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with nullcontext() if last or engine else accelerator.no_sync(module):
            terms = loss(batch)
            backward(accelerator, engine, (terms * weights).sum(), last)
        parts.append(terms.detach())
    if engine:
        engine.step()  # clips, too; with a norm that is not finite it changes nothing
        norm = float(engine.get_global_grad_norm())
    else:
        norm = float(accelerator.clip_grad_norm_(module.parameters(), max_grad_norm))
    losses = (accelerator.reduce(torch.stack(parts).sum(0), "sum") / total).tolist()
    # With fp16 a norm alone may overflow: the scaler skips the step, and scales less from then on.
    may_overflow = accelerator.scaler is not None and all(map(math.isfinite, losses))
    if not math.isfinite(norm) and not may_overflow:
        where = where_not_finite(accelerator, parts)
        raise NonFiniteError(f"loss {losses}{where}, gradient norm {norm}; no update was applied")
    optimizer.step()
    optimizer.zero_grad()
    return Update(losses, norm)


def backward(accelerator: Accelerator, engine: Any | None, scaled: Tensor, last: bool) -> None:
    """Add the gradients of a scaled loss. `engine`: DeepSpeed's, which is told at the `last`
    micro-batch that a step follows.

    A process that gave up alone would leave the others waiting. A loss that is not finite becomes
    NaN instead: NaN gradients reach all processes, in the norm.
    """
    scaled = scaled * torch.where(scaled.isfinite(), 1.0, torch.nan)
    if engine is None:
        accelerator.backward(scaled)
    else:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(scaled)


def where_not_finite(accelerator: Accelerator, parts: Sequence[Tensor]) -> str:
    """Words that name the micro-batches, of all processes, whose loss is not finite; empty when
    there are none. All processes must call it."""
    found = gather_object(
        [
            f"{i} of process {accelerator.process_index}"
            for i, terms in enumerate(parts)
            if not terms.isfinite().all()
        ]
    )
    return f" from micro-batch {', '.join(found)}" if found else ""
