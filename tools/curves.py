"""Runs side by side: parameters, seconds, held-out loss, and how the loss fell.

    python -m tools.curves runs/lecture/one_head runs/lecture/four_heads --output_dir runs/x
    python -m tools.curves runs/lecture/bigram --output_dir runs/x --bigram runs/lecture/prepare

Reads stage.json and metrics.jsonl of any stages that measure a held-out loss; writes curves.json,
curves.png, curves.html.
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.handoff.locate import read_stage
from common.handoff.publish import load_config
from common.handoff.report import provenance
from common.model.gpt import GPT
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.rows.shards import Shards
from tools import page, plots
from tools.compare.checks import failures, want

BIGRAM_WITHIN = (
    0.02  # nats: a model without layers that has learned its table is this near to the counts
)
LARGEST_TABLE = 4096  # tokens of a vocabulary whose bigrams are counted
HEADER = ("run", "shape", "parameters", "tokens", "seconds", "loss")


@stage_config
class Config:
    """Compare runs by their held-out loss."""

    runs: Annotated[list[str], Field(min_length=1)]
    """Stage directories, in the order of the table."""
    output_dir: OutputDir
    """Where curves.json, curves.png, curves.html and stage.json go."""
    bigram: str | None = None
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
        raise InputError(
            f"{path}: no finished stage there (stage.json and metrics.jsonl are needed)"
        )
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    curve = [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row]
    if not curve:
        raise InputError(
            f"{path}: its metrics.jsonl has no eval_loss, which is what runs are compared by"
        )
    config = load_config(path)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT(config).parameters())
    facts = {
        "path": path,
        "family": config.family,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
    }
    facts |= {
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "parameters": parameters,
        "curve": curve,
    }
    keys = {
        "steps": "step",
        "tokens_seen": "tokens_seen",
        "seconds": "wall_time",
        "commit": "commit",
        "parent": "parent",
    }
    return facts | {name: stage.get(key) for name, key in keys.items()} | {"loss": curve[-1][1]}


def names_of(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where two would be the same."""
    last = [Path(path).name for path in paths]
    if len(set(paths)) < len(paths):
        raise InputError(f"runs: {', '.join(paths)}: one is named twice")
    return last if len(set(last)) == len(last) else list(paths)


def pairs(folder: str, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(first, second) token of every pair of neighbours in a split, and the size of the
    vocabulary."""
    shards = Shards(folder, split, 1)
    texts = [stream.read(0, stream.tokens) for stream in shards.streams]
    firsts, seconds = (
        np.concatenate([text[part] for text in texts]) for part in (slice(-1), slice(1, None))
    )
    return firsts, seconds, shards.meta["vocab_size"]


def bigram_loss(folder: str, smoothing: float) -> float:
    """Cross-entropy, in nats a token, of the held-out split under the bigram counts of the training
    split."""
    first, second, size = pairs(folder, "train")
    if size > LARGEST_TABLE:
        raise InputError(
            f"{folder}: {size} tokens; bigrams are counted for at most {LARGEST_TABLE}"
        )
    counts = (
        np.bincount(first * size + second, minlength=size * size).reshape(size, size) + smoothing
    )
    first, second, _ = pairs(folder, "eval")
    return float(-np.log(counts[first, second] / counts.sum(1)[first]).mean())


def draw(runs: dict[str, dict[str, Any]], bigram: float | None) -> Any:
    """Held-out loss against updates. What a run begins with may lie above the picture."""
    figure, axes = plots.new_figure(1, height=3.6)
    axis = axes[0]
    for n, (name, run) in enumerate(runs.items()):
        steps, losses = zip(*run["curve"], strict=True)
        axis.plot(
            steps,
            losses,
            "o-",
            ms=3,
            lw=1.4,
            label=name,
            color=plots.COLOURS[n % len(plots.COLOURS)],
        )
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
    shape = f"{run['family']} {run['n_layer']} x {run['n_head']} x {run['n_embd']}"
    seen = "-" if run["tokens_seen"] is None else f"{run['tokens_seen'] / 1e6:.2f} M"
    seconds = "-" if run["seconds"] is None else f"{run['seconds']:.0f}"
    return [name, shape, f"{run['parameters']:,}", seen, seconds, f"{run['loss']:.4f}"]


def main(cfg: Config) -> None:
    started, folder = time.perf_counter(), Path(cfg.output_dir)
    runs = dict(zip(names_of(cfg.runs), map(read_run, cfg.runs), strict=True))
    checks, remarks = [], []
    if len({run["vocab_size"] for run in runs.values()}) > 1:
        remarks.append(
            "The runs have different vocabularies, so their losses, which are means over tokens, do not compare."
        )
    bigram = None if cfg.bigram is None else bigram_loss(cfg.bigram, cfg.smoothing)
    if bigram is not None:
        remarks.append(
            f"Bigram counts: {bigram:.4f} nats a token (cross-entropy of the held-out split under the counts of the training "
            f"split, {cfg.smoothing:g} added to each)."
        )
        for name, run in runs.items():
            if run["n_layer"] == 0:
                apart = run["loss"] - bigram
                remarks.append(
                    f"{name}, which sees one token only: {run['loss']:.4f}, that is {apart:+.4f}."
                )
                checks.append(
                    want(
                        f"{name}, distance from the bigram counts",
                        abs(apart),
                        at_most=BIGRAM_WITHIN,
                    )
                )
    if cfg.improving:
        for before, after in itertools.pairwise(runs):
            checks.append(
                want(
                    f"loss, {before} - {after}", runs[before]["loss"] - runs[after]["loss"], above=0
                )
            )

    table = Table(title=cfg.output_dir, title_justify="left")
    for column in HEADER:
        table.add_column(column, justify="left" if column in HEADER[:2] else "right")
    rows = [cells(name, run) for name, run in runs.items()]
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for remark in remarks:
        console.print(remark, soft_wrap=True)

    failed = failures(checks)
    losses = ", ".join(f"{name} {run['loss']:.3f}" for name, run in runs.items())
    text = "; ".join(
        [
            f"held-out loss {losses}",
            *([f"bigram counts {bigram:.3f}"] if bigram is not None else []),
            *failed,
        ]
    )
    print(f"gate curves: {'FAIL' if failed else 'PASS'}  {text}")
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "runs": runs,
        "bigram": None if bigram is None else {"loss": bigram, "smoothing": cfg.smoothing},
        "checks": checks,
    }
    write_atomically(folder / "curves.json", dump(result))
    about = "shape: layers x heads x width; tokens trained on; held-out loss in nats a token"
    what = "held-out loss of each run against updates"
    picture = plots.picture(lambda: draw(runs, bigram), folder / "curves.png", what)
    content = page.render(
        "curves.html",
        title=" / ".join(runs),
        runs=page.Table(HEADER, rows, about),
        remarks=remarks,
        picture=picture,
    )
    write_atomically(folder / "curves.html", content.encode())
    stage = {
        "stage": "curves",
        "kind": "report",
        "config": to_dict(cfg),
        "metrics": {n: run["loss"] for n, run in runs.items()},
    }
    stage |= {
        "gate": {"passed": not failed, "text": text},
        "wall_time": round(time.perf_counter() - started, 2),
    }
    write_atomically(folder / "stage.json", dump(stage | provenance()))


if __name__ == "__main__":
    cli(Config, main, words="runs")
