"""How often the bar for a family of prompts errs (`family_drop_at_most` of tools.compare).

    python -m benchmarks.family_bar runs/demo

Takes the share of correct answers to each prompt from a report (compare.json) whose models were
asked several times, and simulates reports of two models with such shares: prompts are drawn anew,
and so many answers to each. Equal models have the same share at every prompt. Where one has lost,
each of its correct answers has turned wrong with the same chance, in one family. Beside it stands
a bar on the loss alone: more than .03 in any family.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.compare.changes import Counts, changes, counts_of

MOST = 0.03  # of the loss in a family, as in configs/demo/compare.yaml

Shares = dict[str, np.ndarray]  # family: (P), the chance that an answer to a prompt is correct


class Errors(NamedTuple):
    """In which share of the reports a bar says that a family is worse."""

    tested: float
    """The bar of tools.compare: a loss of more than MOST that chance cannot explain."""
    point: float
    """A bar on the loss alone."""


def shares_of(counts: dict[str, Counts]) -> Shares:
    """The chance of a correct answer at each prompt, as far as a few answers tell it.

    Counts out of few answers make prompts look more different than they are. So the shares are
    drawn together to their family's mean until they vary as the chances must.
    """
    found = {}
    for kind, (correct_P, each) in counts.items():
        share_P = np.array(correct_P) / each
        by_answers = (share_P * (1 - share_P)).mean() / (each - 1)
        seen = share_P.var()
        kept = np.sqrt(max(0.0, seen - by_answers) / seen) if seen else 0.0
        found[kind] = share_P.mean() + kept * (share_P - share_P.mean())
    return found


def drawn(rng: np.random.Generator, share_P: np.ndarray, each: int) -> Counts:
    """So many answers of a model to every prompt."""
    return Counts(rng.binomial(each, share_P).tolist(), each)


def simulate(
    shares: Shares, each: int, reports: int, loser: str | None = None, loss: float = 0.0
) -> Errors:
    """Reports of two models with these shares, of which the second has lost so much in one family
    (None: they are equal). The bars are asked about the loser, or about any family."""
    rng = np.random.default_rng(0)
    tested = point = 0
    for _ in range(reports):
        before, after = {}, {}
        for kind, share_P in shares.items():
            share_P = rng.choice(share_P, len(share_P))
            kept = 1 - loss / shares[kind].mean() if kind == loser else 1.0
            before[kind], after[kind] = (drawn(rng, s, each) for s in (share_P, share_P * kept))
        found = changes(before, after).families
        asked = [found[loser]] if loser else found.values()
        tested += any(change.worse and change.mean < -MOST for change in asked)
        point += any(change.mean < -MOST for change in asked)
    return Errors(tested / reports, point / reports)


def lines(figures: dict[str, Any], each: int | None, reports: int, loss: float) -> list[str]:
    """What the bars do with models such as this one, whose figures compare.json has."""
    counts = counts_of(figures)
    if any(own.each < 2 for own in counts.values()):
        return ["one answer to each prompt does not tell how sure it was: give more"]
    each, shares = each or next(iter(counts.values())).each, shares_of(counts)
    prompts = ", ".join(f"{kind} {len(share_P)}" for kind, share_P in shares.items())
    tested, point = simulate(shares, each, reports)
    found = [
        f"{each} answers to each prompt ({prompts}), {reports} reports",
        f"  equal models fail: {tested:.1%}; on the point estimates alone: {point:.1%}",
    ]
    for kind, share_P in shares.items():
        if (mean := share_P.mean()) > loss:
            tested, point = simulate(shares, each, reports, kind, loss)
            lost = f"  {kind}, {mean:.3f} -> {mean - loss:.3f}"
            found.append(f"{lost}, is found: {tested:.1%}; on the point estimates: {point:.1%}")
    return found


def main() -> None:
    """Simulate for each assistant of a report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="folder of a report with a ground truth")
    parser.add_argument(
        "--answers", type=int, help="answers to a prompt; the report's own if left out"
    )
    parser.add_argument("--reports", type=int, default=1000)
    parser.add_argument("--loss", type=float, default=0.08, help="of the share of correct answers")
    given = parser.parse_args()
    result = json.loads((given.report / "compare.json").read_text())
    for name, figures in result["sampled"].items():
        print(f"{name}:", *lines(figures, given.answers, given.reports, given.loss), sep="\n")


if __name__ == "__main__":
    main()
