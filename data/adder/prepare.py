"""All sums of two n-digit numbers as prompt and completion, the digits of the sum reversed
(minGPT's adder).

python -m data.adder.prepare --config configs/adder/data.yaml --output_dir runs/adder/data
"""

import random
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.program.errors import InputError
from common.program.files import dump, write_atomically, write_jsonl


@stage_config
class Config:
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


def main(cfg: Config) -> None:
    started, size, rng = time.perf_counter(), 10**cfg.digits, random.Random(cfg.seed)
    count = min(cfg.sums, size * size) if cfg.digits > 2 else size * size
    if cfg.held_out >= count:
        raise InputError(f"held_out {cfg.held_out}: there are only {count} sums")
    rows = [row(*divmod(pair, size), cfg.digits) for pair in rng.sample(range(size * size), count)]
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "eval.jsonl", rows[: cfg.held_out])
    write_jsonl(folder / "train.jsonl", rows[cfg.held_out :])
    text = f"{count - cfg.held_out:,} sums to learn from, {cfg.held_out:,} held out"
    print(f"gate data: PASS  {text}")
    stage = {
        "stage": "data",
        "kind": "data",
        "gate": {"passed": True, "text": text},
        "config": to_dict(cfg),
    }
    write_atomically(
        folder / "stage.json", dump(stage | {"wall_time": round(time.perf_counter() - started, 2)})
    )


if __name__ == "__main__":
    cli(Config, main)
