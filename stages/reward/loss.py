"""Bradley-Terry losses over comparisons. Imports torch alone.

Shape legend: N answers, P pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def ranked_pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) index pairs of one prompt's K answers by rank (0 = best); a tie is no
    pair."""
    answers = range(len(ranks))
    return [(i, j) for i in answers for j in answers if ranks[i] < ranks[j]]


def comparison_loss(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    weights: Tensor,
    margin: float = 0.0,
    centering: float = 0.0,
) -> Tensor:
    """Weighted sum of -log sigmoid(score_better - score_worse - margin) + centering (score_better +
    score_worse)^2.

    scores (N); better, worse (P) index into them; weights (P), 1 / (pairs of that prompt), so that
    each prompt counts once however many answers it has (InstructGPT, eq. 1). Centering: Eisenstein
    2023, eq. 3.
    """
    gaps, sums = scores[better] - scores[worse], scores[better] + scores[worse]
    return (weights * (centering * sums**2 - F.logsigmoid(gaps - margin))).sum()


def accuracy_by_margin(
    gaps: Tensor, edges: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
) -> list[tuple[str, int, float, float]]:
    """Calibration of score gaps (better - worse) (P): rows of (margin bucket, pairs, accuracy,
    accuracy the model claims).

    The claim is the mean of sigmoid(|gap|): equal to the accuracy for a calibrated model. Ties
    count one half.
    """
    right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    size, rows = gaps.abs(), []
    for low, high in zip((0.0, *edges), (*edges, float("inf")), strict=True):
        inside = (size >= low) & (size < high)
        if inside.any():
            accuracy, claim = right[inside].mean(), torch.sigmoid(size[inside]).mean()
            rows.append((f"{low:g}-{high:g}", int(inside.sum()), float(accuracy), float(claim)))
    return rows
