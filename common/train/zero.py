"""Optimizer state under DeepSpeed ZeRO: whole moments from its flat pieces, and back.

DeepSpeed maps whole parameters to its flat pieces of them at any time; moments only of the first
group, and only once a step was made (0.19.8). So moments travel through the place of the weights,
which are put back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


def zero_stage(made: Accelerator) -> int:
    """1, 2 or 3 under DeepSpeed, else 0."""
    plugin = made.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0


KINDS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def pieces(made: Accelerator) -> list[tuple[Tensor, dict[str, Any]]]:
    """(flat fp32 weights, group of the optimizer) that this process holds."""
    engine = made.deepspeed_engine_wrapped.engine
    groups, zero = engine.basic_optimizer.param_groups, engine.optimizer
    if zero_stage(made) < 3:
        return [(group["params"][0], group) for group in groups]
    return [
        (piece, groups[zero.sub_group_to_group_id[n]])
        for n, piece in enumerate(zero.fp32_partitioned_groups_flat)
    ]


def moments_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The moments that the parameters of a group have: Muon's one, or AdamW's two."""
    return ("momentum_buffer",) if "shape" in group else ("exp_avg", "exp_avg_sq")


@contextmanager
def weights_lent(held: Sequence[tuple[Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Inside, the flat weights may hold something else; at the end they are as they were."""
    weights = [piece.clone() for piece, _ in held]
    yield
    for (piece, _), weight in zip(held, weights, strict=True):
        piece.copy_(weight)


@torch.no_grad()
def zero_moments(made: Accelerator, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """("name/kind", whole tensor) of every moment and step. All processes must go through them."""
    from deepspeed.utils import safe_get_full_fp32_param

    held, parameters = pieces(made), dict(module.named_parameters())
    base = made.deepspeed_engine_wrapped.engine.basic_optimizer
    state, groups = base.state, base.param_groups
    step = max(float(of_one["step"]) for of_one in state.values())
    with weights_lent(held):
        for kind in KINDS:
            for piece, group in held:
                if kind in moments_of(group):
                    piece.copy_(state[piece][kind])
            for group in groups:
                for name in group["names"] if kind in moments_of(group) else ():
                    yield f"{name}/{kind}", safe_get_full_fp32_param(parameters[name])
    for group in groups:
        for name in group["names"]:
            yield f"{name}/step", torch.tensor(0.0 if "shape" in group else step)


@torch.no_grad()
def put_zero_moments(made: Accelerator, module: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Give the optimizer's pieces the moments that `zero_moments` gave. All processes must call
    it."""
    held, parameters = pieces(made), dict(module.named_parameters())
    base = made.deepspeed_engine_wrapped.engine.basic_optimizer
    state, groups = base.state, base.param_groups
    with weights_lent(held):
        for kind in KINDS:
            for group in groups:
                for name in group["names"] if kind in moments_of(group) else ():
                    put_zero_weight(parameters[name], moments[f"{name}/{kind}"], made)
            for piece, group in held:
                if kind in moments_of(group):
                    state[piece][kind] = piece.clone()
    for piece, group in held:
        state[piece]["step"] = moments[f"{group['names'][0]}/step"].to(piece.device)


def put_zero_weight(parameter: nn.Parameter, value: Tensor, made: Accelerator) -> None:
    """`value`, whole, into the fp32 pieces of a parameter."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    value = value.to(made.device)
    if zero_stage(made) < 3:
        safe_set_full_fp32_param(parameter, value)
        return
    # The last piece is padded, which safe_set_full does not do.
    size = safe_get_local_fp32_param(parameter).numel()
    flat = nn.functional.pad(value.flatten(), (0, size * made.num_processes - value.numel()))
    safe_set_local_fp32_param(parameter, flat.view(-1, size)[made.process_index])
