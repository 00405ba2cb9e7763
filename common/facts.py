"""What is known of a recipe's rows before it runs: how many, how long; from the command line or from files that exist."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoint import load_tokenizer
from common.config import InputError
from common.costs import GPU
from common.data import Row, read_rows
from common.tokenizer import Tokenizer
from common.workload import Work

SAMPLE = 300  # rows that are tokenised to see how long rows are
LARGE = 500e6  # bytes: a plan reads no file beyond that


@dataclass
class Options:
    """What the command line adds to a recipe."""

    gpus: int
    gpu: GPU
    checkpointing: bool = False
    rows: Mapping[str, float] = field(default_factory=dict)  # step -> training rows
    lengths: Mapping[str, float] = field(default_factory=dict)  # step -> tokens of a mean row
    answers: float | None = None  # of a comparison
    vocab_size: int | None = None
    model: str | None = None  # shape of a parent that is not here: a directory or a preset
    stage: str | None = None  # of a config that is not a step of its folder's recipe
    step_keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # step -> key -> value


class Seen(NamedTuple):
    """What the rows of a file say: how many there are, and the means over a sample of them."""

    count: float | None
    first: float | None = None
    second: float | None = None


class Facts:
    """Answers from options and files; `assumed` collects in words what had to be assumed, `problems` what would stop a step."""

    def __init__(self, options: Options) -> None:
        self.options, self.assumed, self.problems = options, list[str](), list[str]()
        self.shards: str | None = None  # folder of the recipe's own tokenizer

    def assume(self, text: str) -> None:
        if text not in self.assumed:
            self.assumed.append(text)

    def tokenizer(self, parent: str | None) -> Tokenizer | None:
        """That of the parent or of the shards, where one of them is here already."""
        found = [place for place in (parent, self.shards) if place and (Path(place) / "tokenizer.json").exists()]
        return load_tokenizer(found[0]).with_chat() if found else None

    def look(self, work: Work, c: Mapping[str, Any], measure: Callable[[Tokenizer, Row], tuple[float, float]]) -> Seen:
        """The step's training rows: --rows, else those of its file; and means of what `measure` finds in some of them."""
        source, given = Path(str(c.get("train_data"))), self.options.rows.get(work.step)
        if not source.exists() or sum(f.stat().st_size for f in [source, *source.rglob("*")] if f.is_file()) > LARGE:
            return Seen(given)
        rows, tokenizer = read_rows(str(source)), self.tokenizer(c.get("parent"))
        held_out = c["eval_fraction"] if work.stage in ("sft", "reward") and c["eval_data"] is None else 0
        count = given or round(len(rows) * (1 - held_out))
        if not given:
            self.assume(f"{work.step}: {count:,.0f} rows, those of {source} as it is now")
        if not tokenizer:
            return Seen(count)
        try:
            found = [measure(tokenizer, row) for row in random.Random(0).sample(rows, min(SAMPLE, len(rows)))]
        except (InputError, KeyError) as error:
            raise InputError(f"{source}: a row cannot be read: {error}") from None
        return Seen(count, *(sum(column) / len(found) for column in zip(*found, strict=True)))

    def mean(self, work: Work, found: float | None, longest: str = "") -> float:
        """Tokens of the mean row: --length, what the rows say, or the longest allowed."""
        mean = self.options.lengths.get(work.step, found)
        if mean is None:
            self.assume(
                f"{work.step}: all rows taken as {longest or work.length} tokens, the most allowed; else --length {work.step}=N"
            )
        return min(work.length, mean or work.length)
