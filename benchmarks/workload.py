"""What the benchmarks work on: a small random Llama and its tokenizer, real rows; and our stages,
run as anyone runs them."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_mb
from benchmarks.side_by_side import ROOT, Missing, child, ended
from common.handoff.publish import publish
from common.model.costs import forward_flops
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.text.tokenizer import Tokenizer

MIXED = {"bf16": "bf16", "fp32": "no"}  # our names for the precision of the arithmetic


def shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the shape of the Llama."""
    parser.add_argument("--n_layer", type=int, default=4, help="layers of the Llama")
    parser.add_argument("--n_embd", type=int, default=256, help="its width, in heads of 64")
    parser.add_argument(
        "--vocab_size", type=int, default=2048, help="its ids, control tokens included"
    )


def llama(args: argparse.Namespace, max_length: int) -> GPTConfig:
    """Its shape: 3.7 million parameters unless the arguments say otherwise."""
    heads = max(1, args.n_embd // 64)
    inner = 43 * args.n_embd // 16  # 688 of 256, as small Llamas have it
    sizes = {"vocab_size": args.vocab_size, "n_layer": args.n_layer, "n_embd": args.n_embd}
    return GPTConfig(family="llama", max_length=max_length, n_head=heads, n_inner=inner, **sizes)


def random_llama(config: GPTConfig) -> GPT:
    """A model of this shape with random weights, always the same."""
    torch.manual_seed(0)
    return GPT(config).eval()


def endless(model: GPT, tokenizer: Tokenizer) -> GPT:
    """The same, but end and padding are never sampled, so that every answer runs to its full length
    on both sides.

    All tokens get a direction that they share, which changes no probability among them; these two
    get its opposite.
    """
    with torch.no_grad():
        weight = model.trunk.wte.weight
        direction = torch.full(weight.shape[1:], 0.04)  # twice as long as the embeddings are
        weight.add_(direction)
        weight[[tokenizer.eot_id, tokenizer.pad_id]] = -10 * direction
    return model


def letters(vocab_size: int) -> Tokenizer:
    """One id a character and the control tokens, so many in all: text of any exact number of tokens
    can be written."""
    return Tokenizer.characters(chr(0x4E00 + i) for i in range(vocab_size - 5)).with_chat()


def write_model(folder: Path, model: GPT | RewardModel, tokenizer: Tokenizer) -> str:
    """A directory that our stages and transformers read."""
    kind = "lm" if isinstance(model, GPT) else "reward"
    report: dict[str, Any] = {"stage": "benchmark", "kind": kind, "parent": None, "metrics": {}}
    publish(folder, model, tokenizer, report)
    return str(folder)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write the rows as .jsonl; the path as text."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def training_flops(config: GPTConfig, rows: Sequence[int], head_tokens: int) -> float:
    """Model FLOPs of training on one token of rows of these lengths, with logits at `head_tokens`
    of them in all."""
    tokens = sum(rows)
    # Of the row that a token finds itself in, on average.
    length = sum(row * row for row in rows) / tokens
    return 3 * forward_flops(config, tokens, length, head_tokens) / tokens


def launch(module: str, config: Mapping[str, Any], folder: Path) -> list[dict[str, float]]:
    """`python -m module --config ...` to its end -> of each line of metrics the second `at` which
    it was printed, and `peak_mb`, the most memory that the process had held until then."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", module, "--config", str(file)]
    line = re.compile(rf"{module.split('.')[1]} +\d+  ")
    moments: list[dict[str, float]] = []
    said: list[str] = []
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None  # a pipe
        for text in process.stdout:
            if line.match(text):
                moments.append({"at": time.perf_counter(), "peak_mb": peak_mb(process.pid)})
            said.append(text)
        if process.wait():
            errors.seek(0)
            output = "".join(said)[-1500:] + errors.read()[-3000:]
            raise ended(command, process.returncode, output)
    return moments


def run_stage(
    module: str, config: Mapping[str, Any], scratch: str
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """A stage in a new folder under `scratch` -> (lines of its metrics.jsonl, each with what
    `launch` says; its stage.json)."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    moments = launch(module, {**config, "output_dir": str(folder / "out")}, folder)
    rows = [json.loads(row) for row in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    rows = [row | moment for row, moment in zip(rows, moments, strict=True)]
    return rows, json.loads((folder / "out" / "stage.json").read_text())


def tokens_per_second(rows: Sequence[Mapping[str, float]], uncounted: int) -> float:
    """Of the training intervals that the stage logged after `uncounted` steps: their tokens/s, each
    weighed by its seconds."""
    logged = [row for row in rows if "tokens/s" in row]
    tokens = seconds = 0.0
    for before, row in pairwise(logged):
        if row["step"] > uncounted:
            lasted = row["at"] - before["at"]
            tokens += row["tokens/s"] * lasted
            seconds += lasted
    return tokens / seconds


def by_precision(name: str, precisions: Sequence[str], run: Any) -> dict[str, Any]:
    """{"<name> bf16": run("bf16"), ...} not yet called, for side_by_side."""
    return {f"{name} {precision}": partial(run, precision) for precision in precisions}


def peer(name: str, **spec: Any) -> dict[str, Any]:
    """What benchmarks/peers/<name>.py says of a run."""
    return child([sys.executable, "-m", f"benchmarks.peers.{name}", json.dumps(spec)])


def trl_name() -> str:
    """TRL with its version, as it stands in the table."""
    try:
        return "TRL " + ".".join(version("trl").split(".")[:2])
    except PackageNotFoundError:
        return "TRL"


def trl_trainer(**spec: Any) -> dict[str, Any]:
    """What benchmarks.peers.trl_trainers says of a run."""
    if trl_name() == "TRL":
        raise Missing("not installed: pip install trl")
    return peer("trl_trainers", **spec)
