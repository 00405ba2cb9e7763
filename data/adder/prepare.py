"""All sums of two n-digit numbers as prompt and completion, the digits of the sum reversed
(minGPT's adder).

python -m data.adder.prepare --config configs/adder/data.yaml --output_dir runs/adder/data
"""

import random
import time
from typing import Annotated

from pydantic import Field

from common.config.schema import OutputDir, cli, stage_config
from common.handoff.ownership import claim
from common.handoff.report import Gate, publish_rows, stage_report
from common.program.errors import InputError

FILES = ("eval.jsonl", "train.jsonl")


@stage_config
class Config:
    """The sums of the adder."""

    output_dir: OutputDir = "runs/adder/data"
    """Where train.jsonl and eval.jsonl go."""
    digits: Annotated[int, Field(ge=1, le=6)] = 2
    """Digits of each number; all 100^digits sums are made up to 2 digits, else `sums` of them."""
    sums: Annotated[int, Field(gt=0)] = 50_000
    """Number of different sums drawn where there are more."""
    held_out: Annotated[int, Field(gt=0)] = 500
    """Sums kept for evaluation."""
    seed: int = 0
    """Draws the sums and the split."""


def row(a: int, b: int, digits: int) -> dict[str, str]:
    """The carry runs from the last digit to the first: said in that order, each digit needs only
    what was said before it."""
    return {"prompt": f"{a:0{digits}}+{b:0{digits}}=", "completion": f"{a + b:0{digits + 1}}"[::-1]}


def sums(cfg: Config) -> list[dict[str, str]]:
    """The rows in the order of the seed. Raises InputError when none is left to learn from."""
    rng, size = random.Random(cfg.seed), 10**cfg.digits
    count = min(cfg.sums, size * size) if cfg.digits > 2 else size * size
    if cfg.held_out >= count:
        raise InputError(f"held_out {cfg.held_out}: there are only {count} sums")
    pairs = rng.sample(range(size * size), count)
    return [row(pair // size, pair % size, cfg.digits) for pair in pairs]


def main(cfg: Config) -> None:
    """Write train.jsonl, eval.jsonl, stage.json and the manifest."""
    started, folder = time.perf_counter(), claim(cfg, "data", FILES)
    rows = sums(cfg)
    held_out, train = rows[: cfg.held_out], rows[cfg.held_out :]
    gate = Gate(True, f"{len(train):,} sums to learn from, {len(held_out):,} held out")
    print(gate.line("data"))
    report = stage_report("data", cfg, gate, time.perf_counter() - started, kind="data")
    publish_rows(folder, {"eval.jsonl": held_out, "train.jsonl": train}, report)


if __name__ == "__main__":
    cli(Config, main)
