"""What a recipe will cost, before anything runs: parameters, tokens, FLOPs, memory, disk, hours, money, and what does not fit.

    python plan.py configs/demo --gpus 8 --gpu h100
    python plan.py configs/demo --gpus 8 --gpu a100-80 --rows sft=16000 rl=6000 --length sft=42 --mfu 0.3 --price 2.2
    python plan.py configs/demo/sft.yaml --gpu 4090 --sft.max_length=2048 --json

Reads the configs and, where they exist, the files that they name; says what it had to assume. The formulas and their sources
are in common/costs.py, the stages' loops in common/workload.py. Memory without ZeRO is that of our code (fp32 weights under
autocast), under ZeRO 1-3 that of DeepSpeed in bf16. Hours rest on --mfu, money on --price: both are assumptions.
"""

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from common.config import InputError, Parser, did_you_mean, guard
from common.costs import GPU, GPUS, MFU
from common.facts import Options
from common.planning import MODULES, Plan
from common.strict_yaml import Loader
from common.workload import Memory, Work, disk, flops, memory, seconds

PHASES = ("weights", "gradients", "optimizer", "frozen", "buffers", "activations", "logits", "rollout", "peak")
MOST_GPUS = 65536  # no advice goes beyond


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`step_keys` of the result is {step: {key: value}} from `--step.key=value`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("plan.py", "%(prog)s RECIPE|CONFIG [options]", __doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("path", metavar="RECIPE|CONFIG", type=Path, help="folder of a recipe, or the config of one of its steps")
    add("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default 1)")
    add("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default h100)")
    add("--memory", type=float, metavar="GB", help="memory of a GPU, if it is not the data sheet's")
    add("--price", type=float, metavar="$", help="US dollars a GPU and hour, instead of the assumed one")
    why = "published large runs have .21 (GPT-3) to .55 (LLaMA 13B); ours is not measured on a GPU yet"
    add(
        "--mfu", type=float, default=MFU, metavar="X", help=f"share of peak FLOP/s that training reaches (default {MFU}: {why})"
    )
    add("--checkpointing", action="store_true", help="as if activations were recomputed (no stage does that yet)")
    add("--rows", nargs="*", default=[], metavar="STEP=N", help="training rows of a step whose file is not here yet")
    add("--length", nargs="*", default=[], metavar="STEP=N", help="tokens of a mean row; for collect and rl prompt and answer")
    add("--answers", type=float, metavar="K", help="answers of a comparison, for reward")
    add("--vocab_size", type=int, metavar="N", help="ids of the tokenizer, where no config tells")
    add("--model", metavar="X", help="shape of a parent that is not here: a model directory or a preset (gpt2, gpt3-175b, ...)")
    add("--stage", choices=sorted(MODULES.values()), help="the stage of a CONFIG that is not a step of its folder's recipe")
    add("--json", action="store_true", help="everything as JSON, in bytes, FLOPs, seconds and dollars")
    options, rest = parser.parse_known_args(argv)
    options.step_keys = {}
    for word in rest:
        match = re.fullmatch(r"--([\w-]+)\.(\w+)=(.*)", word)
        if not match:
            hint = did_you_mean(word.removeprefix("--").split("=")[0], [*vars(options)])
            raise InputError(f"command line: unknown option {word}; {hint} (a key of a step is set by --<step>.<key>=value)")
        try:
            value = Loader(match[3]).get_single_data()
        except yaml.YAMLError:
            value = match[3]
        options.step_keys.setdefault(match[1], {})[match[2]] = value
    if options.gpu not in GPUS:
        known = ", ".join(GPUS)
        raise InputError(f"command line: --gpu {options.gpu} is not among {known}; name the nearest, with --memory and --price")
    for name, value in (("gpus", options.gpus), ("mfu", options.mfu), ("price", options.price), ("memory", options.memory)):
        if value is not None and (value < 0 or (value == 0 and name != "price") or (name == "mfu" and value > 1)):
            wanted = "between 0 and 1" if name == "mfu" else "above 0"
            raise InputError(f"command line: --{name} {value} is refused; it must be {wanted}")
    return options


def pairs(words: Sequence[str], option: str) -> dict[str, float]:
    """["sft=16000"] -> {"sft": 16000.0}"""
    found = {}
    for word in words:
        match = re.fullmatch(r"([\w-]+)=(\d+(?:\.\d+)?(?:e\d+)?)", word)
        if not match or float(match[2]) <= 0:
            raise InputError(f"command line: --{option} {word} is refused; it is written --{option} STEP=N, as in sft=16000")
        found[match[1]] = float(match[2])
    return found


def alternatives(work: Work, factor: int = 1) -> list[tuple[Work, int, list[str]]]:
    """(changed work, ZeRO stage, the changes in words) on `factor` times as many GPUs, the smallest change first.

    The global batch stays as long as each GPU has a row of it: smaller micro-batches are made up for by accumulation.
    """
    fewer = min(factor, work.accumulation)
    spread = dataclasses.replace(
        work, gpus=work.gpus * factor, accumulation=work.accumulation // fewer, micro=max(1, work.micro * fewer // factor)
    )
    found = []
    for zero, halvings, recompute in itertools.product(spread.zero_stages, range(spread.micro.bit_length()), (False, True)):
        if recompute and work.checkpointing:
            continue
        changed = dataclasses.replace(
            spread, micro=spread.micro >> halvings, accumulation=spread.accumulation << halvings,
            checkpointing=work.checkpointing or recompute,
        )  # fmt: skip
        words = [f"{changed.gpus:,} GPUs"] if factor > 1 else []
        words += [f"ZeRO stage {zero}"] if zero else []
        if (changed.micro, changed.accumulation) != (work.micro, work.accumulation):
            words += [f"per_device_train_batch_size {changed.micro}, gradient_accumulation_steps {changed.accumulation}"]
        words += ["recomputed activations (gradient checkpointing, which no stage does yet)"] if recompute else []
        found.append((changed, zero, words))
    return sorted(found, key=lambda entry: (len(entry[2]), entry[0].checkpointing, -entry[0].micro, entry[1]))


def advice(work: Work, room: float) -> str:
    """What does not fit, and the smallest change that makes it fit."""

    def largest(need: Memory) -> str:
        parts = sorted(((getattr(need, name), name) for name in PHASES[:-1]), reverse=True)
        return ", ".join(f"{name} {size / 1e9:,.1f}" for size, name in parts[:3] if size)

    need = memory(work)
    text = f"{work.step} needs {need.peak / 1e9:,.1f} GB a GPU, there are {room / 1e9:,.0f} (largest: {largest(need)}). "
    if work.stage == "collect":
        sizes = [n for n in range(work.micro - 1, 0, -1) if memory(dataclasses.replace(work, micro=n)).peak <= room]
        return text + (f"Smallest change that fits: batch_size {sizes[0]}" if sizes else "The model alone is too large for it")
    factor, best = 1, need
    while work.gpus * factor <= MOST_GPUS:
        for changed, zero, words in alternatives(work, factor):
            if (found := memory(changed, zero)).peak <= room:
                return f"{text}Smallest change that fits: {' and '.join(words)} ({found.peak / 1e9:,.1f} GB)"
            best = min(best, found, key=lambda memory: memory.peak)
        factor *= 2
    whole = " Reference and reward model lie whole on every GPU." if work.frozen else ""
    text += f"No number of GPUs helps: {best.peak / 1e9:,.1f} GB at least ({largest(best)}).{whole}"
    return f"{text} A larger GPU, or lora_r, may"


def step_of(work: Work, gpu: GPU, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a step, as --json prints them."""
    needs = {zero: memory(work, zero) for zero in range(4)}
    fits = [zero for zero in work.zero_stages if needs[zero].peak <= gpu.memory]
    zero = fits[0] if fits else work.zero_stages[-1]
    counted, time = flops(work), seconds(work, gpu, options.mfu, zero)
    kept, most = disk(work, zero)
    hours = time[0] / 3600 if time else None
    trains = work.stage in ("pretrain", "sft", "reward")
    return {
        "step": work.step, "stage": work.stage, "gpus": work.gpus, "parameters": work.parameters, "trainable": work.trainable,
        "steps": work.steps, "tokens": work.tokens, "flops": sum(counted) if counted else None,
        "flops_by_kind": counted._asdict() if counted else None, "seconds": time[0] if time else None,
        "bound_by": time[1] if time else None, "dollars": hours * options.gpus * gpu.price if hours is not None else None,
        "tokens_per_second_per_gpu": work.tokens / time[0] / work.gpus if time and work.tokens and trains else None,
        "disk_kept": kept, "disk_most": most, "zero": zero, "fits": fits,
        "memory": {stage: need._asdict() for stage, need in needs.items()},
        "peak_checkpointed": {s: memory(dataclasses.replace(work, checkpointing=True), s).peak for s in range(4)},
        "advice": None if fits else advice(work, gpu.memory),
    }  # fmt: skip


def short(value: float | None) -> str:
    """1 234 567 -> "1.23 M"."""
    if value is None:
        return "?"
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value / size < 1000 else f"{value / size:,.0f}{letter}"
    return f"{value:.3g}"


def lasting(time: float | None) -> str:
    if time is None:
        return "?"
    units = ((172800, 86400, "days"), (7200, 3600, "h"), (120, 60, "min"))
    return next((f"{time / unit:.1f} {name}" for least, unit, name in units if time >= least), f"{time:.2g} s")


def gigabytes(size: float) -> str:
    return "-" if not size else f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.1g}"


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=report["title"], title_justify="left")
    for name in ("step", "params", "steps", "tokens", "FLOPs", "time", "bound by", "$", "tok/s/GPU", "disk GB: kept", "most"):
        table.add_column(name, justify="left" if name in ("step", "bound by") else "right")
    steps = report["steps"]
    for s in steps:
        cost = "?" if s["dollars"] is None else f"{s['dollars']:,.2f}" if s["dollars"] < 1000 else f"{s['dollars']:,.0f}"
        count = "?" if s["flops"] is None else f"{s['flops']:.2e}"
        table.add_row(
            s["step"], short(s["parameters"]), "?" if s["steps"] is None else f"{s['steps']:,}", short(s["tokens"]), count,
            lasting(s["seconds"]), s["bound_by"] or "?", cost, "-" if s["tokens_per_second_per_gpu"] is None else
            f"{s['tokens_per_second_per_gpu']:,.0f}", gigabytes(s["disk_kept"]), gigabytes(s["disk_most"]),
        )  # fmt: skip
    total = report["total"]
    partly = " (what is known)" * any(s["seconds"] is None for s in steps)
    table.add_section()
    table.add_row(f"all{partly}", "", "", short(total["tokens"]), f"{total['flops']:.2e}", lasting(total["seconds"]), "",
                  f"{total['dollars']:,.2f}", "", gigabytes(total["disk_kept"]), gigabytes(total["disk_most"]))  # fmt: skip
    console.print(table)
    table = Table(
        title="Memory of one GPU in GB; not all parts are alive together: `peak` is what must fit", title_justify="left"
    )
    for name in ("step", "ZeRO", *PHASES, "fits", "peak, checkpointed"):
        table.add_column(name, justify="left" if name in ("step", "fits") else "right")
    for s in steps:
        for zero, need in s["memory"].items():
            if s["stage"] == "collect" and zero:
                continue
            sizes = [gigabytes(need[name]) for name in Memory._fields]
            fit = "yes" if need["peak"] <= report["gpu"]["memory"] else "NO"
            kept = "-" if s["stage"] == "collect" else gigabytes(s["peak_checkpointed"][zero])
            table.add_row("" if zero else s["step"], str(zero or "none"), *sizes, fit, kept)
        table.add_section()
    console.print(table)
    for title, lines in (
        ("Does not fit", report["does_not_fit"]),
        ("Would stop", report["problems"]),
        ("Assumed", report["assumed"]),
    ):
        for line in lines:
            console.print(f"{title}: {line}", soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    given = {"memory": options.memory and options.memory * 1e9, "price": options.price}
    gpu = GPUS[options.gpu]._replace(**{key: value for key, value in given.items() if value is not None})
    plan = Plan(
        options.path,
        Options(options.gpus, gpu, options.checkpointing, pairs(options.rows, "rows"), pairs(options.length, "length"),
                options.answers, options.vocab_size, options.model, options.stage, options.step_keys),
    )  # fmt: skip
    steps = [step_of(work, gpu, options) for work in plan.works]
    sums = {key: sum(s[key] or 0 for s in steps) for key in ("tokens", "flops", "seconds", "dollars", "disk_kept")}
    # The states of a step are gone before the next one starts.
    sums["disk_most"] = max(s["disk_most"] - s["disk_kept"] for s in steps) + sums["disk_kept"]
    price = f"${gpu.price:g} an hour" + ("" if options.price is not None else " assumed")
    report = {
        "title": f"{options.path} on {options.gpus:,} x {options.gpu} ({gpu.memory / 1e9:g} GB, {gpu.flops / 1e12:g} TFLOP/s, "
        f"{price}), MFU {options.mfu:.0%}" + " assumed" * (options.mfu == MFU),
        "gpu": {"name": options.gpu, **gpu._asdict()}, "gpus": options.gpus, "mfu": options.mfu, "steps": steps, "total": sums,
        "does_not_fit": [s["advice"] for s in steps if s["advice"]], "problems": plan.facts.problems,
        "assumed": plan.facts.assumed,
    }  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        console = Console(highlight=False, markup=False)
        show(report, console if console.is_terminal else Console(highlight=False, markup=False, width=150))


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
