"""Runs side by side: parameters, seconds, held-out loss, and how the loss fell.

    python -m tools.curves runs/lecture/one_head runs/lecture/four_heads --output_dir runs/x
    python -m tools.curves runs/lecture/bigram --output_dir runs/x --bigram runs/lecture/prepare

Reads stage.json and metrics.jsonl of any stages that measure a held-out loss; writes curves.json,
curves.png, curves.html.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.schema import InputPath, OutputDir, cli, stage_config
from common.handoff.locate import read_stage
from common.handoff.ownership import claim
from common.handoff.publish import load_config
from common.handoff.report import Gate, stage_report, write_stage_report
from common.model.gpt import GPT
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.rows.shards import Shards
from common.rows.sources import read_rows
from tools import page, plots
from tools.compare.checks import Check, failures, want
from tools.compare.measure import is_finite, noted
from tools.names import names_of

BIGRAM_WITHIN = 0.02  # nats a token: so near a model that has learned its table is to the counts
LARGEST_TABLE = 4096  # tokens of a vocabulary whose bigrams are counted
HEADER = ("run", "shape", "parameters", "tokens", "seconds", "loss")
NOTED = {
    "steps": "step",
    "tokens_seen": "tokens_seen",
    "seconds": "wall_time",
    "commit": "commit",
    "parent": "parent",
}  # facts of a run, by their keys in stage.json

Runs = dict[str, dict[str, Any]]  # what `read_run` tells of each, by its short name


@stage_config
class Config:
    """Compare runs by their held-out loss."""

    runs: Annotated[list[InputPath], Field(min_length=1)]
    """Stage directories, in the order of the table."""
    output_dir: OutputDir
    """Where curves.json, curves.png, curves.html and stage.json go."""
    bigram: InputPath | None = None
    """Folder of stages.pretrain.prepare whose bigrams are counted, for runs without layers to be
    compared with."""
    smoothing: Annotated[float, Field(gt=0)] = 1.0
    """Added to the count of every bigram (1: Laplace)."""
    improving: bool = False
    """The gate: every run must end with a lower loss than the run before it."""
    seed: int = 0
    """Nothing is drawn by chance here."""


def read_run(path: str) -> dict[str, Any]:
    """Facts of a finished stage, and its curve: [[step, held-out loss in nats a token], ...]."""
    stage, file = read_stage(path), Path(path) / "metrics.jsonl"
    if not stage or not file.exists():
        needed = "stage.json and metrics.jsonl are needed"
        raise InputError(f"{path}: no finished stage there ({needed})")
    measured = [row for row in read_rows(str(file)) if "eval_loss" in row.data]
    curve = [[row.data.get("step"), row.data["eval_loss"]] for row in measured]
    for row, point in zip(measured, curve, strict=True):
        if not all(map(is_finite, point)):
            what = f"{row.origin}: step is {point[0]!r}, eval_loss {point[1]!r}"
            raise InputError(f"{what}; finite numbers are needed")
    if not curve:
        why = "which is what runs are compared by"
        raise InputError(f"{path}: its metrics.jsonl has no eval_loss, {why}")
    config = load_config(path)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT(config).parameters())
    return {
        "path": path,
        "family": config.family,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "parameters": parameters,
        "curve": curve,
        **{name: noted(stage.get(key)) for name, key in NOTED.items()},
        "loss": curve[-1][1],
    }


def pairs(folder: str, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(first, second) token of every pair of neighbours in a split, and the size of the
    vocabulary."""
    shards = Shards(folder, split, 1)
    texts = [stream.read(0, stream.tokens) for stream in shards.streams]
    firsts = np.concatenate([text[:-1] for text in texts])
    seconds = np.concatenate([text[1:] for text in texts])
    return firsts, seconds, shards.meta["vocab_size"]


def bigram_loss(folder: str, smoothing: float) -> float:
    """Cross-entropy, in nats a token, of the held-out split under the bigram counts of the training
    split."""
    first, second, size = pairs(folder, "train")
    if size > LARGEST_TABLE:
        most = f"bigrams are counted for at most {LARGEST_TABLE}"
        raise InputError(f"{folder}: {size} tokens; {most}")
    found = np.bincount(first * size + second, minlength=size * size)
    counts = found.reshape(size, size) + smoothing
    first, second, _ = pairs(folder, "eval")
    return float(-np.log(counts[first, second] / counts.sum(1)[first]).mean())


def draw(runs: Runs, bigram: float | None) -> Any:
    """Held-out loss against updates. What a run begins with may lie above the picture."""
    figure, axes = plots.new_figure(1, height=3.6)
    axis = axes[0]
    for n, (name, run) in enumerate(runs.items()):
        steps, losses = zip(*run["curve"], strict=True)
        colour = plots.COLOURS[n % len(plots.COLOURS)]
        axis.plot(steps, losses, "o-", ms=3, lw=1.4, label=name, color=colour)
    if bigram is not None:
        axis.axhline(bigram, color=plots.ink(), lw=1, ls="--", label="bigram counts")
    ends = [run["loss"] for run in runs.values()]
    early = [loss for run in runs.values() for _, loss in run["curve"][1:]] or ends
    margin = 0.06 * (max(early) - min(ends) + 0.1)
    axis.set(
        xlabel="updates",
        ylabel="held-out loss, nats a token",
        ylim=(min(ends) - margin, max(early) + margin),
    )
    plots.legend_above(figure, axis)
    return figure


def cells(name: str, run: dict[str, Any]) -> list[str]:
    """A run's row of the table."""
    shape = f"{run['family']} {run['n_layer']} x {run['n_head']} x {run['n_embd']}"
    seen = "-" if run["tokens_seen"] is None else f"{run['tokens_seen'] / 1e6:.2f} M"
    seconds = "-" if run["seconds"] is None else f"{run['seconds']:.0f}"
    return [name, shape, f"{run['parameters']:,}", seen, seconds, f"{run['loss']:.4f}"]


def remarks_on(runs: Runs, bigram: float | None, smoothing: float) -> list[str]:
    """What a reader must know of the losses."""
    remarks = []
    if len({run["vocab_size"] for run in runs.values()}) > 1:
        remarks.append(
            "The runs have different vocabularies, so their losses, which are means over tokens, "
            "do not compare."
        )
    if bigram is None:
        return remarks
    remarks.append(
        f"Bigram counts: {bigram:.4f} nats a token (cross-entropy of the held-out split under the "
        f"counts of the training split, {smoothing:g} added to each)."
    )
    for name, run in runs.items():
        if run["n_layer"] == 0:
            loss, apart = run["loss"], run["loss"] - bigram
            remarks.append(f"{name}, which sees one token only: {loss:.4f}, that is {apart:+.4f}.")
    return remarks


def checks_of(runs: Runs, bigram: float | None, improving: bool) -> list[Check]:
    """What the gate asks: models without layers are near the bigram counts; where runs are to be
    `improving`, each ends lower than the one before."""
    checks = []
    if bigram is not None:
        for name, run in runs.items():
            if run["n_layer"] == 0:
                apart = abs(run["loss"] - bigram)
                title = f"{name}, distance from the bigram counts"
                checks.append(want(title, apart, at_most=BIGRAM_WITHIN))
    if improving:
        for before, after in itertools.pairwise(runs):
            gain = runs[before]["loss"] - runs[after]["loss"]
            checks.append(want(f"loss, {before} - {after}", gain, above=0))
    return checks


def gate_of(runs: Runs, bigram: float | None, checks: Sequence[Check]) -> Gate:
    """Whether all checks passed, and the losses in one line."""
    failed = failures(checks)
    losses = ", ".join(f"{name} {run['loss']:.3f}" for name, run in runs.items())
    counted = [] if bigram is None else [f"bigram counts {bigram:.3f}"]
    return Gate(not failed, "; ".join([f"held-out loss {losses}", *counted, *failed]))


def show(title: str, runs: Runs, remarks: Sequence[str]) -> None:
    """The table and the remarks on the terminal."""
    table = Table(title=title, title_justify="left")
    for column in HEADER:
        table.add_column(column, justify="left" if column in HEADER[:2] else "right")
    for name, run in runs.items():
        table.add_row(*cells(name, run))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for remark in remarks:
        console.print(remark, soft_wrap=True)


def write_page(folder: Path, runs: Runs, bigram: float | None, remarks: Sequence[str]) -> None:
    """curves.png, and curves.html with it."""
    caption = "shape: layers x heads x width; tokens trained on; held-out loss in nats a token"
    about = "held-out loss of each run against updates"
    content = page.render(
        "curves.html",
        title=" / ".join(runs),
        runs=page.Table(HEADER, [cells(name, run) for name, run in runs.items()], caption),
        remarks=remarks,
        picture=plots.picture(lambda: draw(runs, bigram), folder / "curves.png", about),
    )
    write_atomically(folder / "curves.html", content.encode())


def main(cfg: Config) -> None:
    """Compare the runs: a table, curves.json, curves.png, curves.html, stage.json."""
    started = time.perf_counter()
    folder = claim(cfg, "curves", ("curves.json", "curves*.png", "curves.html"))
    runs = dict(zip(names_of(cfg.runs, "runs"), map(read_run, cfg.runs), strict=True))
    bigram = None if cfg.bigram is None else bigram_loss(cfg.bigram, cfg.smoothing)
    remarks = remarks_on(runs, bigram, cfg.smoothing)
    checks = checks_of(runs, bigram, cfg.improving)
    gate = gate_of(runs, bigram, checks)
    show(cfg.output_dir, runs, remarks)
    print(gate.line("curves"))

    counted = None if bigram is None else {"loss": bigram, "smoothing": cfg.smoothing}
    result = {"runs": runs, "bigram": counted, "checks": checks}
    write_atomically(folder / "curves.json", dump(result))
    write_page(folder, runs, bigram, remarks)
    losses = {name: run["loss"] for name, run in runs.items()}
    seconds = time.perf_counter() - started
    facts = {"kind": "report", "metrics": losses}
    write_stage_report(folder, stage_report("curves", cfg, gate, seconds, **facts))


if __name__ == "__main__":
    cli(Config, main, words="runs")
