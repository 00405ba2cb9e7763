"""What a recipe will cost, before anything runs: parameters, tokens, FLOPs, memory, disk, hours,
money, and what does not fit.

    python -m tools.plan configs/demo --gpus 8 --gpu h100
    python -m tools.plan configs/demo --gpus 8 --gpu a100-80 --sft.rows=16000 --sft.length=42 --rl.rows=6000 --mfu 0.3 --price 2.2
    python -m tools.plan configs/demo/sft.yaml --gpu 4090 --sft.max_length=2048 --json

Reads the configs and, where they exist, the files that they name; says what it had to assume.
--STEP.KEY=VALUE sets a key of a step, also what only its data will tell: rows (to train on), length
(tokens of a mean row, in collect and rl with its answer), answers (of a comparison). The formulas
and their sources are in common/costs.py, the stages' loops in common/workload.py. Memory without
ZeRO is that of our code (fp32 weights under autocast), under ZeRO 1-3 that of DeepSpeed in bf16.
Hours rest on --mfu, money on --price: both are assumptions.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.overrides import Overrides, split_overrides
from common.config.schema import load, stage_config
from common.model.costs import GPU, GPUS, MFU
from common.program.entry import guard
from tools.plan.planner import Plan
from tools.plan.recipe import MODULES
from tools.plan.workload import Memory, Work, disk, flops, memory, seconds

MOST_GPUS = 65536  # no advice goes beyond
Above0 = Annotated[float, Field(gt=0)]


@stage_config
class Options:
    """Plan the costs of a recipe."""

    recipe: str
    """Folder of a recipe, or the config of one of its steps (also without --recipe)."""
    gpus: Annotated[int, Field(gt=0)] = 1
    """Number of GPUs."""
    gpu: Literal[tuple(GPUS)] = "h100"
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
    stage: Literal[tuple(MODULES)] | None = None
    """Stage of a config that is not a step of its folder's recipe."""
    json: bool = False
    """Everything as JSON, in bytes, FLOPs, seconds and dollars."""


def parse(argv: Sequence[str]) -> tuple[Options, Overrides]:
    """Return (the options, {step: {key: text}} from `--step.key=value`)."""
    words, overrides = split_overrides(argv)
    named = ["--recipe"] if words and not words[0].startswith("-") else []
    return load(Options, [*named, *words]), overrides


def alternatives(work: Work, factor: int = 1) -> list[tuple[Work, int, list[str]]]:
    """(changed work, ZeRO stage, the changes in words) on `factor` times as many GPUs, the smallest
    change first.

    The global batch stays as long as each GPU has a row of it: smaller micro-batches are made up
    for by accumulation.
    """
    rows, found = max(1, work.micro * work.accumulation // factor), []
    spread = replace(work, gpus=work.gpus * factor)
    for zero, micro in itertools.product(spread.zero_stages, range(1, work.micro + 1)):
        if rows % micro == 0:
            changed = replace(spread, micro=micro, accumulation=rows // micro)
            words = [f"{changed.gpus:,} GPUs"] * (factor > 1) + [f"ZeRO stage {zero}"] * (zero > 0)
            if (micro, rows // micro) != (work.micro, work.accumulation):
                words += [
                    f"per_device_train_batch_size {micro}, gradient_accumulation_steps {rows // micro}"
                ]
            found.append((changed, zero, words))
    return sorted(found, key=lambda entry: (len(entry[2]), -entry[0].micro, entry[1]))


def advice(work: Work, room: float) -> str:
    """What does not fit, and the smallest change that makes it fit."""

    def said(need: Memory, words: str) -> str:
        parts = sorted(zip(need[:-1], need._fields, strict=False), reverse=True)
        largest = ", ".join(f"{name} {size / 1e9:,.1f}" for size, name in parts[:3] if size)
        return f"{need.peak / 1e9:,.1f} GB {words} (largest: {largest}). "

    text = f"{work.step} needs " + said(memory(work), f"a GPU, there are {room / 1e9:,.0f}")
    if work.stage == "collect":
        sizes = (
            n for n in range(work.micro - 1, 0, -1) if memory(replace(work, micro=n)).peak <= room
        )
        size = next(sizes, None)
        return text + (
            f"Smallest change that fits: batch_size {size}"
            if size
            else "The model alone is too large for it"
        )
    factors = [2**n for n in range(MOST_GPUS.bit_length()) if work.gpus * 2**n <= MOST_GPUS]
    tried = [
        (memory(changed, zero), words)
        for n in factors
        for changed, zero, words in alternatives(work, n)
    ]
    for need, words in tried:
        if need.peak <= room:
            return f"{text}Smallest change that fits: {' and '.join(words)} ({need.peak / 1e9:,.1f} GB)"
    text += "No number of GPUs helps: " + said(
        min((need for need, _ in tried), key=lambda need: need.peak), "at least"
    )
    whole = "Reference and reward model lie whole on every GPU. " if work.stage == "rl" else ""
    others = ["gradient_checkpointing"] * (not work.checkpointing) + ["lora_r"] * (
        work.stage != "pretrain"
    )
    return f"{text}{whole}What may: {', '.join(['a larger GPU', *others])}"


def step_of(work: Work, gpu: GPU, o: Options) -> dict[str, Any]:
    """All figures of a step, as --json prints them."""
    needs = {zero: memory(work, zero) for zero in range(4)}
    fits = [zero for zero in work.zero_stages if needs[zero].peak <= gpu.memory]
    zero = fits[0] if fits else work.zero_stages[-1]
    counted, (time, bound) = flops(work), seconds(work, gpu, o.mfu, zero) or (None, None)
    kept, most = disk(work, zero)
    speed = (
        work.tokens / time / work.gpus
        if time and work.stage in ("pretrain", "sft", "reward")
        else None
    )
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
        "dollars": time and time / 3600 * o.gpus * gpu.price,
        "tokens_per_second_per_gpu": speed,
        "disk_kept": kept,
        "disk_most": most,
        "zero": zero,
        "fits": fits,
        "memory": {
            stage: need._asdict()
            for stage, need in needs.items()
            if not (stage and work.stage == "collect")
        },
        "advice": None if fits else advice(work, gpu.memory),
    }


def short(value: float | None) -> str:
    """1 234 567 -> "1.23 M"."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value and value >= size:
            return (
                f"{value / size:.3g}{letter}"
                if value / size < 1000
                else f"{value / size:,.0f}{letter}"
            )
    return form(value, ".3g")


def lasting(time: float | None) -> str:
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    return next(
        (f"{time / unit:.1f} {name}" for unit, name in units if time and time >= 2 * unit),
        form(time, ".2g", " s"),
    )


def form(value: float | None, how: str, unit: str = "") -> str:
    return "?" if value is None else f"{value:{how}}{unit}"


def gigabytes(size: float) -> str:
    return "-" if not size else f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.1g}"


def show(report: dict[str, Any], console: Console) -> None:
    def table_of(title: str, columns: Sequence[str]) -> Table:
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(
                name, justify="left" if name in ("step", "bound by", "fits") else "right"
            )
        return table

    table = table_of(
        report["title"],
        (
            "step",
            "params",
            "steps",
            "tokens",
            "FLOPs",
            "time",
            "bound by",
            "$",
            "tok/s/GPU",
            "disk GB: kept",
            "most",
        ),
    )
    memories = table_of(
        "Memory of one GPU in GB; not all parts are alive together: `peak` is what must fit",
        ("step", "ZeRO", *Memory._fields, "fits"),
    )
    for s in report["steps"]:
        speed = s["tokens_per_second_per_gpu"]
        table.add_row(
            s["step"],
            short(s["parameters"]),
            form(s["steps"], ","),
            short(s["tokens"]),
            form(s["flops"], ".2e"),
            lasting(s["seconds"]),
            s["bound_by"] or "?",
            form(s["dollars"], ",.2f"),
            "-" if speed is None else f"{speed:,.0f}",
            gigabytes(s["disk_kept"]),
            gigabytes(s["disk_most"]),
        )
        for zero, need in s["memory"].items():
            fit = "yes" if need["peak"] <= report["gpu"]["memory"] else "NO"
            memories.add_row(
                "" if zero else s["step"], str(zero or "none"), *map(gigabytes, need.values()), fit
            )
        memories.add_section()
    total = report["total"]
    partly = " (what is known)" * any(s["seconds"] is None for s in report["steps"])
    table.add_section()
    table.add_row(
        f"all{partly}",
        "",
        "",
        short(total["tokens"]),
        f"{total['flops']:.2e}",
        lasting(total["seconds"]),
        "",
        f"{total['dollars']:,.2f}",
        "",
        gigabytes(total["disk_kept"]),
        gigabytes(total["disk_most"]),
    )
    console.print(table)
    console.print(memories)
    for title, key in (
        ("Does not fit", "does_not_fit"),
        ("Would stop", "problems"),
        ("Assumed", "assumed"),
    ):
        for line in report[key]:
            console.print(f"{title}: {line}", soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    o, keys = parse(argv)
    gpu = GPUS[o.gpu]
    gpu = gpu._replace(
        memory=o.memory * 1e9 if o.memory else gpu.memory,
        price=gpu.price if o.price is None else o.price,
    )
    plan = Plan(
        Path(o.recipe),
        o.gpus,
        keys,
        bf16=gpu.bf16,
        vocab_size=o.vocab_size,
        model=o.model,
        stage=o.stage,
    )
    steps = [step_of(work, gpu, o) for work in plan.works]
    sums = {
        key: sum(s[key] or 0 for s in steps)
        for key in ("tokens", "flops", "seconds", "dollars", "disk_kept")
    }
    # The states of a step are gone before the next one starts.
    sums["disk_most"] = max(s["disk_most"] - s["disk_kept"] for s in steps) + sums["disk_kept"]
    card = (
        f"{gpu.memory / 1e9:g} GB, {gpu.flops / 1e12:g} TFLOP/s, ${gpu.price:g} an hour"
        + " assumed" * (o.price is None)
    )
    report = {
        "title": f"{o.recipe} on {o.gpus:,} x {o.gpu} ({card}), MFU {o.mfu:.0%}"
        + " assumed" * (o.mfu == MFU),
        "gpu": {"name": o.gpu, **gpu._asdict()},
        "gpus": o.gpus,
        "mfu": o.mfu,
        "steps": steps,
        "total": sums,
        "does_not_fit": [s["advice"] for s in steps if s["advice"]],
        "problems": plan.problems,
        "assumed": plan.assumed,
    }
    if o.json:
        print(json.dumps(report, indent=2))
    else:
        console = Console(highlight=False, markup=False)
        show(
            report,
            console if console.is_terminal else Console(highlight=False, markup=False, width=150),
        )


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
