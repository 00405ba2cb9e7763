"""A row of comparisons as ids.

Its columns are `prompt`, `answers` and `ranks` (K answers ranked), or `prompt`, `chosen` and
`rejected`; of these two each may be the whole conversation, and `prompt` absent.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.program.errors import InputError
from common.text.chat import comparison_prompt, prompt_ids, transcript
from common.text.tokenizer import Tokenizer


class Ranked(NamedTuple):
    """The K answers of one row."""

    # Ids of the prompt and each answer, with the end token unless the answer was cut off.
    answers: list[list[int]]
    ranks: list[float]  # 0 = best
    sources: list[str]  # who wrote each: "policy" is the SFT model


def side(value: Any) -> str:
    """The text of `chosen` or `rejected`: plain, a message, or messages of which the last is the
    answer."""
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        role = value.get("role", value.get("from", "assistant"))
        if role in ("user", "human", "system"):
            raise InputError(f"an answer is the assistant's; this one is the {role}'s", "role")
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise InputError(
            f"an answer must be text or a message, not {str(value)[:60]!r}", "wrong type"
        )
    return value


def check_ranks(ranks: Any) -> list[float]:
    """Ranks as Python's numbers, those of numpy and torch too. Raises InputError for anything but
    finite numbers."""
    try:
        numbers = [rank.item() if hasattr(rank, "item") else rank for rank in ranks]
        finite = all(isinstance(rank, int | float) and math.isfinite(rank) for rank in numbers)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no list, a list of lists, 10^400
        finite = False
    if not finite:
        told = f"ranks {reprlib.repr(ranks)}: a list of numbers is needed, 0 = best"
        raise InputError(told, "wrong type")
    return numbers


def ranked(tokenizer: Tokenizer, row: Mapping[str, Any]) -> Ranked:
    """The answers of a row as ids. `stopped` (default: all) and `sources` (people) may be absent.

    Raises InputError for a row that is no comparison.
    """
    columns = ("answers", "ranks", "stopped", "sources")
    given = {name: row[name] for name in columns if row.get(name) is not None}
    for name, values in given.items():
        if not isinstance(values, list):
            raise InputError(f"{name} must be a list, not {str(values)[:60]!r}", "wrong type")
    start = prompt_ids(tokenizer, comparison_prompt(row))
    texts = [side(text) for text in given.get("answers") or _pair(row)]
    ranks = given.get("ranks", [0, 1])
    stopped = given.get("stopped", [True] * len(texts))
    sources = given.get("sources", ["people"] * len(texts))
    ranks = check_ranks(ranks)
    if not len(texts) == len(ranks) == len(stopped) == len(sources):
        sizes = f"{len(texts)} answers, {len(ranks)} ranks, {len(stopped)} stopped"
        told = f"{sizes}, {len(sources)} sources: as many are needed of each"
        raise InputError(told, "numbers differ")
    ids = []
    for text, ended in zip(texts, stopped, strict=True):
        end = [tokenizer.eot_id] if ended else []
        ids.append([*start, *tokenizer.encode(text), *end])
    return Ranked(ids, ranks, sources)


def _pair(row: Mapping[str, Any]) -> list[Any]:
    """`chosen` and `rejected` of a row without `answers`."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            needed = "need answers + ranks or chosen + rejected"
            raise InputError(f"no column {name!r}; {needed}", "columns")
    chosen, rejected = transcript(row["chosen"]), transcript(row["rejected"])
    before = [side[:-1] if isinstance(side, list) else [] for side in (chosen, rejected)]
    if before[0] != before[1]:
        differ = "chosen and rejected are conversations that differ before their last answer"
        raise InputError(differ, "prompts differ")
    return [chosen, rejected]
