"""A finetuning stage beside TRL's trainer of the same kind, on the same work."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.side_by_side import arguments, side_by_side
from benchmarks.workload import (
    MIXED,
    by_precision,
    random_llama,
    run_stage,
    shape_arguments,
    tokens_per_second,
    trl_name,
    trl_trainer,
    write_model,
    write_rows,
)
from common.model.shape import GPTConfig
from common.text.tokenizer import Tokenizer

LENGTH = 512  # tokens in a row at most


class Work(NamedTuple):
    """What both sides do."""

    stage: str  # "sft" or "reward"
    model: str  # directory
    train: str  # .jsonl
    held_out: str  # .jsonl
    steps: int  # updates
    uncounted: int  # updates that the clock leaves out at the beginning
    batch: int  # rows in an update
    rate: float  # learning rate, falling to 0


def options(description: str, data: str, batch: int) -> argparse.ArgumentParser:
    """A parser with the options of a finetuning benchmark; `data` tells of the file."""
    parser = arguments(description)
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument(
        "--steps", type=int, default=20, help="counted updates; a quarter as many come before"
    )
    parser.add_argument("--batch", type=int, default=batch, help="rows (or pairs) in an update")
    shape_arguments(parser)
    return parser


def uncounted_steps(args: argparse.Namespace) -> int:
    """How many updates come before those that count."""
    return max(1, args.steps // 4)


def write_work(
    folder: Path,
    config: GPTConfig,
    tokenizer: Tokenizer,
    train: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
) -> tuple[str, str, str]:
    """Write the model and the rows; where they are: model, train and held_out of Work."""
    return (
        write_model(folder / "model", random_llama(config), tokenizer),
        write_rows(folder / "train.jsonl", train),
        write_rows(folder / "eval.jsonl", held_out),
    )


def compare(work: Work, args: argparse.Namespace, scratch: str, **line: Any) -> None:
    """Run both sides and print the line. `line` goes to `side_by_side`: flops_per_unit, and what
    the line has beside steps, batch and losses."""
    losses: dict[str, float] = {}
    held_out_losses: dict[str, float] = {}

    def ours(precision: str) -> float:
        """Tokens a second of our stage."""
        log, _ = run_stage(f"stages.{work.stage}.train", stage_config(work, precision), scratch)
        logged = [row["loss"] for row in log if "loss" in row]
        losses[f"ours {precision}"] = sum(logged) / len(logged)
        evaluated = [row["eval_loss"] for row in log if "eval_loss" in row]
        held_out_losses[f"ours {precision}"] = evaluated[-1]
        return tokens_per_second(log, work.uncounted)

    def trl(precision: str) -> float:
        """Tokens a second of TRL's trainer."""
        done = trl_trainer(**trainer_spec(work, precision))
        losses[f"{trl_name()} {precision}"] = done["loss"]
        held_out_losses[f"{trl_name()} {precision}"] = done["eval_loss"]
        return done["tokens_per_second"]

    sides = by_precision("ours", args.precisions, ours)
    sides |= by_precision(trl_name(), args.precisions, trl)
    line |= {"loss": losses, "eval_loss": held_out_losses}
    line |= {"steps": work.steps, "batch": work.batch}
    side_by_side(work.stage, "tokens/s", sides, runs=args.runs, alone=args.alone, **line)


def stage_config(work: Work, precision: str) -> dict[str, Any]:
    """The config of our stage."""
    config = {
        "parent": work.model,
        "train_data": work.train,
        "eval_data": work.held_out,
        "max_length": LENGTH,
        "max_steps": work.steps,
        "per_device_train_batch_size": work.batch,
        "learning_rate": work.rate,
        "lr_scheduler_type": "linear",
        "mixed_precision": MIXED[precision],
        "logging_steps": 1,
        "save_steps": None,
    }
    return config | ({"samples": 0} if work.stage == "sft" else {})


def trainer_spec(work: Work, precision: str) -> dict[str, Any]:
    """The same for benchmarks.peers.trl_trainers."""
    return {
        "trainer": work.stage,
        "model": work.model,
        "train": work.train,
        "eval": work.held_out,
        "steps": work.steps,
        "uncounted": work.uncounted,
        "batch": work.batch,
        "length": LENGTH,
        "rate": work.rate,
        "bf16": precision == "bf16",
    }
