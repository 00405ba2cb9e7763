"""A row of comparisons as ids.

Its columns are `prompt`, `answers` and `ranks` (K answers ranked), or `prompt`, `chosen` and
`rejected`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.program.errors import InputError
from common.text.chat import comparison_prompt, prompt_ids
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
        value = value.get("content", value.get("value"))
    if not isinstance(value, str):
        raise InputError(
            f"an answer must be text or a message, not {str(value)[:60]!r}", "wrong type"
        )
    return value


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
    if not all(isinstance(rank, int | float) and abs(rank) < math.inf for rank in ranks):
        raise InputError(f"ranks {ranks}: numbers are needed, 0 = best", "wrong type")
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
    return [row["chosen"], row["rejected"]]
