"""What a recipe will cost, before anything runs: parameters, tokens, FLOPs, memory, disk, hours,
money, and what does not fit.

    python -m tools.plan configs/demo --gpus 8 --gpu h100
    python -m tools.plan configs/demo --gpus 8 --sft.rows=16000 --sft.length=42 --price 2.2
    python -m tools.plan configs/demo/sft.yaml --gpu 4090 --sft.max_length=2048 --json

Reads the configs and, where they exist, the files that they name; says what it had to assume.
--STEP.KEY=VALUE sets a key of a step, also what only its data will tell: rows (to train on), length
(tokens of a mean row, in collect and rl with its answer), answers (of a comparison). The formulas
and their sources are in common/model/costs.py, the stages' loops in tools/plan/workload.py. Memory
is that of our code: fp32 weights, with DeepSpeed too. Hours rest on --mfu, money on --price: both
are assumptions.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console

from common.config.overrides import Overrides, split_overrides
from common.config.schema import load, stage_config
from common.model.costs import GPU, GPUS, MFU
from common.program.entry import guard
from common.program.terminal import print_json
from tools.plan.advice import advice
from tools.plan.planner import Plan
from tools.plan.recipe import MODULES
from tools.plan.tables import show
from tools.plan.workload import Work, disk, flops, memory, seconds

TABLE_WIDTH = 150  # columns, where the output is no terminal
Above0 = Annotated[float, Field(gt=0)]


@stage_config
class Options:
    """Plan the costs of a recipe."""

    recipe: str
    """Folder of a recipe, or the config of one of its steps (also without --recipe)."""
    gpus: Annotated[int, Field(gt=0)] = 1
    """Number of GPUs."""
    gpu: Literal[tuple(GPUS)] = "h100"  # type: ignore[valid-type]
    """Kind of the GPUs; of one that is not listed name the nearest, with --memory and --price."""
    memory: Above0 | None = None
    """GB of a GPU, if not the data sheet's."""
    price: Annotated[float, Field(ge=0)] | None = None
    """US dollars a GPU and hour, instead of the assumed one."""
    mfu: Annotated[float, Field(gt=0, le=1)] = MFU
    """Share of peak FLOP/s that training reaches, compiled or not: published large runs have .21
    (GPT-3) to .55 (LLaMA 13B)."""
    vocab_size: Annotated[int, Field(gt=0)] | None = None
    """Ids of the tokenizer, where no config tells."""
    model: str | None = None
    """Shape of a parent that is not here: a model directory or a preset (gpt2, gpt3-175b, ...)."""
    stage: Literal[tuple(MODULES)] | None = None  # type: ignore[valid-type]
    """Stage of a config that is not a step of its folder's recipe."""
    json: bool = False
    """Everything as JSON, in bytes, FLOPs, seconds and dollars."""


def parse(argv: Sequence[str]) -> tuple[Options, Overrides]:
    """Return (the options, {step: {key: text}} from `--step.key=value`)."""
    words, overrides = split_overrides(argv)
    named = ["--recipe"] if words and not words[0].startswith("-") else []
    return load(Options, [*named, *words]), overrides


def step_of(work: Work, gpu: GPU, options: Options) -> dict[str, Any]:
    """All figures of a step, as --json prints them."""
    needs = {zero: memory(work, zero) for zero in range(4)}
    fits = [zero for zero in work.zero_stages if needs[zero].peak <= gpu.memory]
    zero = fits[0] if fits else work.zero_stages[-1]
    counted = flops(work)
    time, bound = seconds(work, gpu, options.mfu) or (None, None)
    kept, most = disk(work)
    tokens = work.tokens if work.stage in ("pretrain", "sft", "reward") else None
    speed = tokens / time / work.gpus if time and tokens is not None else None
    possible = [0] if work.stage == "collect" else list(needs)
    return {
        "step": work.step,
        "stage": work.stage,
        "gpus": work.gpus,
        "parameters": work.parameters,
        "trainable": work.trainable,
        "steps": work.steps,
        "tokens": work.tokens,
        "flops": counted and sum(counted),
        "flops_by_kind": counted and counted._asdict(),
        "seconds": time,
        "bound_by": bound,
        "dollars": time and time / 3600 * options.gpus * gpu.price,
        "tokens_per_second_per_gpu": speed,
        "disk_kept": kept,
        "disk_most": most,
        "zero": zero,
        "fits": fits,
        "memory": {stage: needs[stage]._asdict() for stage in possible},
        "advice": None if fits else advice(work, gpu.memory),
    }


def total_of(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over the steps, of what is known."""
    keys = ("tokens", "flops", "seconds", "dollars", "disk_kept")
    sums = {key: sum(step[key] or 0 for step in steps) for key in keys}
    # The states of a step are gone before the next one starts.
    states = max(step["disk_most"] - step["disk_kept"] for step in steps)
    return sums | {"disk_most": states + sums["disk_kept"]}


def gpu_of(options: Options) -> GPU:
    """The GPU of the data sheet, with what the command line says instead."""
    gpu = GPUS[options.gpu]
    return gpu._replace(
        memory=options.memory * 1e9 if options.memory else gpu.memory,
        price=gpu.price if options.price is None else options.price,
    )


def title_of(options: Options, gpu: GPU) -> str:
    """What the plan is for, and on which assumptions it rests."""
    card = f"{gpu.memory / 1e9:g} GB, {gpu.flops / 1e12:g} TFLOP/s, ${gpu.price:g} an hour"
    card += " assumed" if options.price is None else ""
    mfu = f"MFU {options.mfu:.0%}" + (" assumed" if options.mfu == MFU else "")
    return f"{options.recipe} on {options.gpus:,} x {options.gpu} ({card}), {mfu}"


def report_of(options: Options, overrides: Overrides) -> dict[str, Any]:
    """The whole plan, as --json prints it."""
    gpu = gpu_of(options)
    plan = Plan(
        Path(options.recipe),
        options.gpus,
        overrides,
        bf16=gpu.bf16,
        vocab_size=options.vocab_size,
        model=options.model,
        stage=options.stage,
    )
    steps = [step_of(work, gpu, options) for work in plan.works]
    return {
        "title": title_of(options, gpu),
        "gpu": {"name": options.gpu, **gpu._asdict()},
        "gpus": options.gpus,
        "mfu": options.mfu,
        "steps": steps,
        "total": total_of(steps),
        "does_not_fit": [step["advice"] for step in steps if step["advice"]],
        "problems": plan.problems,
        "assumed": plan.assumed,
    }


def main(argv: Sequence[str]) -> None:
    """Plan a recipe, and print it as tables or as JSON."""
    options, overrides = parse(argv)
    report = report_of(options, overrides)
    if options.json:
        print_json(report)
        return
    width = None if sys.stdout.isatty() else TABLE_WIDTH
    show(report, Console(highlight=False, markup=False, width=width))


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
