"""Muon (Jordan 2024) on the matrices inside the blocks, AdamW on everything else: one optimizer,
wherever it runs.

torch.optim.Muon needs whole matrices; ZeRO gives an optimizer flat pieces. This one puts a matrix
together for its update.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.train.optimizers import parameter_groups, remember_peaks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values to 1
MOMENTUM = 0.95
TOGETHER = 2**23  # elements that go through the iterations at once


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz iterations in `dtype`: about U V^T of the singular value decomposition of
    each matrix (N, R, C)."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / torch.stack([matrix.norm() for matrix in x]).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.AdamW):
    """Muon in the groups that have a "shape" (one matrix each), AdamW in the others.

    ZeRO calls step() with a group's parameter replaced by this process's piece of it: flat, the
    pieces in the order of the processes, padding at the end. With one matrix to a group all pieces,
    one after the other, are the matrix.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], beta2: float, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the iterations
        super().__init__(groups, betas=(0.9, beta2), fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update: Muon on its groups, then AdamW on the others."""
        groups = self.param_groups
        # Matrices of one shape, with their groups: one product for several.
        alike: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in groups:
            for p in group["params"] if "shape" in group else ():
                if p.grad is not None:
                    alike.setdefault((p.shape, p.device), []).append((p, group))
        for (shape, _), found in alike.items():
            few = max(1, TOGETHER // shape.numel()) if len(shape) == 2 else 1
            for start in range(0, len(found), few):
                self.step_matrices(found[start : start + few])
        self.param_groups = [group for group in groups if "shape" not in group]
        super().step()
        self.param_groups = groups

    def step_matrices(self, found: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Update several whole matrices of one shape, or one piece of a matrix."""
        updates = [self.momentum(p) for p, _ in found]
        if found[0][0].dim() == 2:
            updates = orthogonal(torch.stack(updates), self.dtype).unbind()
        else:
            updates = [self.piece(updates[0], found[0][1]["shape"])]
        for (p, group), update in zip(found, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            rows, columns = group["shape"]
            p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def momentum(self, p: Tensor) -> Tensor:
        """The gradient after Nesterov's momentum, whose buffer moves on."""
        state = self.state[p]
        if not state:  # AdamW's load_state_dict wants a step in every state
            state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        momentum = state["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(momentum, MOMENTUM)

    def piece(self, update: Tensor, shape: tuple[int, int]) -> Tensor:
        """This process's piece of the orthogonal update, from its piece of the plain one."""
        # An offloaded piece is not where it can be sent from.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pieces = torch.empty(dist.get_world_size(), update.numel(), device=device)
        dist.all_gather(list(pieces), update.to(device))
        matrix = pieces.view(-1)[: math.prod(shape)].view(shape)
        matrix.copy_(orthogonal(matrix[None], self.dtype)[0])
        return pieces[dist.get_rank()].to(update.device)


def muon(
    module: nn.Module,
    muon_learning_rate: float,
    learning_rate: float,
    weight_decay: float,
    beta2: float = 0.999,
    dtype: torch.dtype = torch.bfloat16,
) -> Muon:
    """Muon over the trainable matrices inside blocks, at muon_learning_rate, and AdamW over the
    rest, at learning_rate."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if ".blocks." in name and p.dim() == 2]
    chosen = set(map(id, matrices))
    groups = parameter_groups(
        [p for _, p in named if id(p) not in chosen], learning_rate, weight_decay
    )
    alike = {"lr": muon_learning_rate, "weight_decay": weight_decay}
    groups += [{"params": [p], "shape": tuple(p.shape), **alike} for p in matrices]
    return remember_peaks(Muon(groups, beta2, dtype))
