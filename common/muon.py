"""Muon (Jordan 2024) on the matrices inside the blocks, AdamW on everything else: one optimizer, wherever it runs.

torch.optim.Muon needs whole matrices; ZeRO gives an optimizer flat pieces. This one puts a matrix together for its update.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.optim import parameter_groups, remember_peaks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values to 1
MOMENTUM = 0.95


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz iterations in `dtype`: about U V^T of the matrix's singular value decomposition."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.AdamW):
    """Muon in the groups that have a "shape" (one matrix each), AdamW in the others.

    ZeRO calls step() with a group's parameter replaced by this process's piece of it: flat, the pieces in the order of the
    processes, padding at the end. With one matrix to a group all pieces, one after the other, are the matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], beta2: float, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the iterations
        super().__init__(groups, betas=(0.9, beta2), fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        for group in groups:
            for p in group["params"] if "shape" in group else ():
                if p.grad is not None:
                    self.step_matrix(p, group)
        self.param_groups = [group for group in groups if "shape" not in group]
        super().step()
        self.param_groups = groups

    def step_matrix(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:  # AdamW's load_state_dict wants a step in every state
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        momentum = state["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        update = p.grad.lerp(momentum, MOMENTUM)  # Nesterov's
        if p.dim() == 2:
            update = orthogonal(update, self.dtype)
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"  # an offloaded piece is not where it can be sent from
            pieces = torch.empty(dist.get_world_size(), p.numel(), device=device)
            dist.all_gather(list(pieces), update.to(device))
            matrix = pieces.view(-1)[: math.prod(group["shape"])].view(group["shape"])
            matrix.copy_(orthogonal(matrix, self.dtype))
            update = pieces[dist.get_rank()].to(p.device)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        rows, columns = group["shape"]
        p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def muon(
    module: nn.Module,
    muon_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
    beta2: float = 0.999,
    dtype: torch.dtype = torch.bfloat16,
) -> Muon:
    """Muon over the trainable matrices inside blocks, at muon_learning_rate, and AdamW over the rest, at learning_rate."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if ".blocks." in name and p.dim() == 2]
    chosen = set(map(id, matrices))
    groups = parameter_groups([p for _, p in named if id(p) not in chosen], learning_rate, weight_decay)
    groups += [
        {"params": [p], "shape": tuple(p.shape), "lr": muon_learning_rate, "weight_decay": weight_decay} for p in matrices
    ]
    return remember_peaks(Muon(groups, beta2, dtype))
