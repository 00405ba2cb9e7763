"""Splits a file of instructions by prompt: demonstrations, prompts to compare answers on, prompts
for PPO, held-out prompts.

    python -m data.alpaca.prepare --config configs/alpaca/data.yaml --instructions alpaca_5000.json

No prompt is in two splits. Rows without an instruction or an answer are left out, counted, and
named.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.handoff.report import provenance
from common.program.errors import InputError
from common.program.files import dump, write_atomically, write_jsonl
from common.rows.sources import read_rows
from common.text.chat import rows_to_messages


@stage_config
class Config:
    """Split instructions for the four stages."""

    instructions: str
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


def main(cfg: Config) -> None:
    started = time.perf_counter()
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    by_prompt: dict[str, list[dict]] = {}
    bad: list[str] = []
    rows = read_rows(cfg.instructions)
    for row in rows:
        try:
            messages = rows_to_messages(row.data)
        except InputError as error:
            bad.append(f"{row.origin}: {error}")
            continue
        by_prompt.setdefault(str(messages[:-1]), []).append({"messages": messages})
    prompts = sorted(by_prompt)
    sizes = {
        "sft_eval": cfg.eval_rows,
        "collect": cfg.collect_rows,
        "rl_prompts": cfg.rl_rows,
        "heldout_prompts": cfg.heldout_rows,
    }
    if len(prompts) <= sum(sizes.values()):
        raise InputError(
            f"{cfg.instructions}: {len(prompts)} usable prompts, but the splits besides sft take {sum(sizes.values())}"
        )
    order = [prompts[i] for i in np.random.default_rng(cfg.seed).permutation(len(prompts))]
    counts, start = {}, 0
    for name, size in [*sizes.items(), ("sft", len(order))]:
        split = [row for prompt in order[start : start + size] for row in by_prompt[prompt]]
        start += size
        write_jsonl(folder / f"{name}.jsonl", split)
        counts[name] = len(split)
    for line in bad[:5]:
        print(f"  left out: {line}")
    text = f"{len(rows)} rows, {len(bad)} left out, {len(prompts)} prompts: " + ", ".join(
        f"{k} {v}" for k, v in counts.items()
    )
    print(f"gate data: PASS  {text}")
    stage = {
        "stage": "data",
        "config": to_dict(cfg),
        "gate": {"passed": True, "text": text},
        "metrics": counts,
        "left_out": bad,
    }
    stage |= {
        "seed": cfg.seed,
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(stage))


if __name__ == "__main__":
    cli(Config, main)
