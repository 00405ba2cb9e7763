"""Splits a file of instructions by prompt: demonstrations, prompts to compare answers on, prompts
for PPO, held-out prompts.

    python -m data.alpaca.prepare --config configs/alpaca/data.yaml --instructions alpaca_5000.json

No prompt is in two splits. Rows without an instruction or an answer are left out, counted, and
named.
"""

import time
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from common.config.schema import OutputDir, RowsPath, cli, stage_config
from common.handoff.ownership import claim
from common.handoff.report import Gate, publish_rows, stage_report
from common.program.errors import InputError
from common.program.terminal import one_line
from common.rows.sources import read_rows
from common.text.chat import rows_to_messages

FILES = tuple(
    f"{name}.jsonl" for name in ("sft_eval", "collect", "rl_prompts", "heldout_prompts", "sft")
)


@stage_config
class Config:
    """Split instructions for the four stages."""

    instructions: RowsPath
    """Alpaca-like file: rows with instruction, (input,) output; or prompt, completion; or
    messages."""
    output_dir: OutputDir
    """Where the splits go."""
    eval_rows: Annotated[int, Field(gt=0)] = 200
    """Demonstrations held out."""
    collect_rows: Annotated[int, Field(gt=0)] = 600
    """Prompts on which the assistant's answers are compared with the reference."""
    rl_rows: Annotated[int, Field(gt=0)] = 1000
    """Prompts for PPO."""
    heldout_rows: Annotated[int, Field(gt=0)] = 100
    """Prompts for the comparison at the end."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split."""


class Instructions(NamedTuple):
    """The rows of the file, sorted out."""

    rows: int  # that were read
    by_prompt: dict[str, list[dict]]  # {"messages": ...} of each prompt
    left_out: list[str]  # rows that cannot be used, each with its place and the reason


def read(file: str) -> Instructions:
    """The usable rows by their prompt, and what is wrong with the others."""
    by_prompt: dict[str, list[dict]] = {}
    left_out: list[str] = []
    rows = read_rows(file)
    for row in rows:
        try:
            messages = rows_to_messages(row.data)
        except InputError as error:
            left_out.append(f"{row.origin}: {error}")
            continue
        by_prompt.setdefault(str(messages[:-1]), []).append({"messages": messages})
    return Instructions(len(rows), by_prompt, left_out)


def split(by_prompt: dict[str, list[dict]], cfg: Config) -> dict[str, list[dict]]:
    """The rows of each file, no prompt in two of them; sft gets what the others leave.

    Raises InputError when they leave nothing.
    """
    sizes = {
        "sft_eval": cfg.eval_rows,
        "collect": cfg.collect_rows,
        "rl_prompts": cfg.rl_rows,
        "heldout_prompts": cfg.heldout_rows,
    }
    prompts, taken = sorted(by_prompt), sum(sizes.values())
    if len(prompts) <= taken:
        found = f"{cfg.instructions}: {len(prompts)} usable prompts"
        raise InputError(f"{found}, but the splits besides sft take {taken}")
    order = [prompts[i] for i in np.random.default_rng(cfg.seed).permutation(len(prompts))]
    splits, start = {}, 0
    for name, size in [*sizes.items(), ("sft", len(order))]:
        chosen = order[start : start + size]
        splits[name] = [row for prompt in chosen for row in by_prompt[prompt]]
        start += size
    return splits


def main(cfg: Config) -> None:
    """Write the splits, stage.json and the manifest."""
    started, folder = time.perf_counter(), claim(cfg, "data", FILES)
    found = read(cfg.instructions)
    splits = split(found.by_prompt, cfg)
    for line in found.left_out[:5]:
        print(one_line(f"left out: {line}"))
    counts = {name: len(rows) for name, rows in splits.items()}
    read_in = f"{found.rows} rows, {len(found.left_out)} left out, {len(found.by_prompt)} prompts"
    gate = Gate(True, f"{read_in}: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    print(gate.line("data"))
    facts = {"metrics": counts, "left_out": found.left_out}
    seconds = time.perf_counter() - started
    files = {f"{name}.jsonl": rows for name, rows in splits.items()}
    publish_rows(folder, files, stage_report("data", cfg, gate, seconds, **facts))


if __name__ == "__main__":
    cli(Config, main)
