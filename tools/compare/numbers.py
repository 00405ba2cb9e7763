"""What is measured of every answer. Another number is one more row of NUMBERS.

compare.json, the page's tables, cards and legend, and the terminal show what stands here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tools.compare.measure import Answer, interval, mean


class Number(NamedTuple):
    """A number that is known of an answer."""

    name: str
    """Its key among an answer's samples in compare.json."""
    value: Callable[[Answer], float | bool | None]
    """Reads it; None where nobody knows it."""
    column: str = ""
    """Key and heading of its mean over answers; "" = no mean is reported."""
    about: str = ""
    """What the column means, for the legend."""
    spread: bool = False
    """Whether the mean comes with its 95 % interval."""
    mark: Callable[[dict[str, Any]], str] | None = None
    """Writes it under an answer, which it gets as compare.json has it; None = not written there."""


def right_or_wrong(answer: dict[str, Any]) -> str:
    """The ground truth's word about an answer."""
    return f"gold {answer['gold']:.2f} {'right' if answer['correct'] else 'wrong'}"


NUMBERS = (
    Number(
        "gold",
        lambda answer: answer.gold,
        "gold",
        "the ground truth, 0 to 1",
        spread=True,
        mark=right_or_wrong,
    ),
    Number("correct", lambda answer: answer.correct),
    Number(
        "reward",
        lambda answer: answer.reward,
        "reward",
        "the reward model's score",
        spread=True,
        mark=lambda answer: f"reward {answer['reward']:+.2f}",
    ),
    Number("kl", lambda answer: answer.kl, "kl", "distance from the reference, nats an answer"),
    Number(
        "stopped",
        lambda answer: answer.stopped,
        "stop_rate",
        "share of answers that ended by themselves",
        mark=lambda answer: "" if answer["stopped"] else "cut off",
    ),
    Number("length", lambda answer: answer.tokens, "length", "tokens of an answer"),
)


def known(answer: Answer) -> dict[str, Any]:
    """The numbers that are known of an answer, by name."""
    values = {number.name: number.value(answer) for number in NUMBERS}
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }


def marks(answer: dict[str, Any]) -> str:
    """What is known about an answer: `gold 0.93 right · reward +1.20 · cut off`."""
    words = [number.mark(answer) for number in NUMBERS if number.mark and number.name in answer]
    return " · ".join(filter(None, words))


def columns(row: dict[str, Any]) -> list[str]:
    """The columns that a row of `summarise` has, in the order of NUMBERS."""
    return [number.column for number in NUMBERS if number.column in row]


def summarise(
    answers: Sequence[Answer], kinds: Sequence[str] | None, each: int = 1
) -> dict[str, Any]:
    """Figures of one model in one mode: the mean of each number, and correctness by family.

    There are `each` answers to a prompt, one prompt behind the other; n counts answers. A number
    that is not known of every answer is left out. `kinds`: the family of each prompt.
    """
    found: dict[str, Any] = {}
    for number in NUMBERS:
        values = known_values(number, answers)
        if number.column and len(values) == len(answers):
            found[number.column] = with_interval(values, each) if number.spread else mean(values)
    if kinds:
        found["families"] = by_family(answers, kinds, each)
    return found


def known_values(number: Number, answers: Sequence[Answer]) -> list[float]:
    """The number of each answer of which it is known."""
    values = map(number.value, answers)
    return [value for value in values if value is not None]


def with_interval(values: Sequence[float], each: int) -> dict[str, Any]:
    """Mean and interval; whole prompts are drawn, as answers to one prompt are not independent."""
    sums = np.reshape(values, (-1, each)).sum(1)
    return interval(sums, [each] * len(sums))


def by_family(
    answers: Sequence[Answer], kinds: Sequence[str], each: int
) -> dict[str, dict[str, Any]]:
    """{family: mean gold, share of correct answers, number of answers, and how many are correct of
    those to each prompt}; all of them are judged."""
    found = {}
    for kind in sorted(set(kinds)):
        own = [answer for i, answer in enumerate(answers) if kinds[i // each] == kind]
        found[kind] = {
            "gold": mean([answer.gold for answer in own if answer.gold is not None]),
            "correct": mean([answer.correct for answer in own if answer.correct is not None]),
            "n": len(own),
            "correct_by_prompt": np.reshape([bool(a.correct) for a in own], (-1, each))
            .sum(1)
            .tolist(),
        }
    return found
