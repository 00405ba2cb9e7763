"""How the share of correct answers changes from one model to the next, family by family, and what
of it may be chance.

Both models answer the same prompts, so a prompt is resampled with the answers of both to it: a
paired bootstrap (Efron and Tibshirani 1993, section 8.3). Families are judged together: of two
equal models, LEVEL is the chance that any family is called worse (Holm 1979).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tools.compare.modes import modes

LEVEL = 0.02  # of all families together, one-sided
# Prompts added that lose all, change nothing, gain all: few prompts may agree by chance, and would
# then seem to vary by nothing (Agresti and Min 2005, who add so much to each cell of pairs).
UNSEEN = (0.5, 1, 0.5)


class Counts(NamedTuple):
    """The correct answers of one model to the prompts of one family."""

    correct_P: Sequence[int]
    """How many of the answers to each prompt are correct."""
    each: int
    """Answers to a prompt."""


class Change(NamedTuple):
    """What a family's share of correct answers has gained."""

    mean: float
    """After less before."""
    interval: tuple[float, float]
    """Where it lies but for chance."""
    worse: bool
    """Whether chance cannot explain the loss: the interval lies below 0."""


class Changes(NamedTuple):
    """The changes of all families, judged together."""

    confidence: float
    """Of the intervals, two-sided."""
    families: dict[str, Change]


def changes(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> Changes:
    """The change of every family. Each must have the same prompts and answers in both."""
    drawn = {kind: resampled(before[kind], after[kind]) for kind in before}
    chances = sorted(chance_K[means_K >= 0].sum() for means_K, chance_K in drawn.values())
    rejected = 0  # Holm: the more are certainly worse, the less strict with the others
    while rejected < len(chances) and chances[rejected] <= LEVEL / (len(chances) - rejected):
        rejected += 1
    tail = LEVEL / max(1, len(chances) - rejected)
    found = {}
    for kind, (means_K, chance_K) in drawn.items():
        low = means_K[chance_K.cumsum() > tail][0]
        high = means_K[chance_K[::-1].cumsum()[::-1] > tail][-1]
        gained = np.subtract(after[kind].correct_P, before[kind].correct_P) / after[kind].each
        found[kind] = Change(float(gained.mean()), (float(low), float(high)), bool(high < 0))
    return Changes(1 - 2 * tail, found)


def resampled(before: Counts, after: Counts) -> tuple[np.ndarray, np.ndarray]:
    """(K), (K): every mean change that a resample of the prompts can have, and its probability.

    The sum over a resample is that of P independent draws, so its distribution is that of one draw
    convolved with itself as often: a power of the Fourier transform. This is what ever more
    resamples would tend to, and depends on no seed.
    """
    each, change_P = after.each, np.subtract(after.correct_P, before.correct_P)
    count = np.bincount(change_P + each, minlength=2 * each + 1).astype(float)
    count[[0, each, -1]] += UNSEEN
    prompts = len(change_P) + round(sum(UNSEEN))
    most = prompts * each
    size = 2 ** (2 * most).bit_length()  # a fast one, with room for every sum
    sums = np.fft.irfft(np.fft.rfft(count / prompts, size) ** prompts, size)
    return np.arange(-most, most + 1) / most, sums[: 2 * most + 1]


def counts_of(figures: dict[str, Any]) -> dict[str, Counts]:
    """The counts of every family, from a model's figures as compare.json has them."""
    return {
        kind: Counts(row["correct_by_prompt"], row["n"] // len(row["correct_by_prompt"]))
        for kind, row in figures["families"].items()
    }


def table_of(changes: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the changes for people: one row a family, one column a mode."""
    found = modes(changes)
    header = ["family", *(f"{mode}, {100 * changes[mode]['confidence']:g} %" for mode in found)]
    rows = []
    for kind in changes[found[0]]["families"]:
        own = [changes[mode]["families"][kind] for mode in found]
        ends = ("[{:+.3f}, {:+.3f}]".format(*change["interval"]) for change in own)
        rows.append([kind, *(f"{c['mean']:+.3f} {e}" for c, e in zip(own, ends, strict=True))])
    return header, rows


def changes_of(result: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """The changes of a comparison in each mode, as compare.json has them: from the second to the
    third of base, sft and rl, or between two models. None where there is nothing to compare, or no
    ground truth."""
    if len(names) < 2 or not result["gold"]:
        return None
    before, after = names[:3][-2:]
    found: dict[str, Any] = {"before": before, "after": after}
    for mode in modes(result):
        row = changes(counts_of(result[mode][before]), counts_of(result[mode][after]))
        found[mode] = {
            "confidence": row.confidence,
            "families": {
                kind: {
                    "mean": round(change.mean, 6),
                    "interval": [round(end, 6) for end in change.interval],
                    "worse": change.worse,
                }
                for kind, change in row.families.items()
            },
        }
    return found
