"""The memory that tools.plan foretells, beside what our own runs take on this machine's CPU.

    python -m benchmarks.plan                      # every run: half an hour on two slow cores
    python -m benchmarks.plan sft "rl zero3"       # two of them

Each run is a stage as anyone starts it, by itself or in two processes, of two updates on random
weights of 0.2 to 0.4 GB, and grows by more than 1 GB. `grown` is the most that a process has held
(VmHWM) less what it held when all was imported; of two processes, that of the one with more.
`planned` is tools/plan/process.py's. For Linux.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.memory import held_mb, peak_mb
from benchmarks.side_by_side import ROOT, ended
from benchmarks.workload import letters, random_llama, write_model, write_rows
from common.config.schema import cli
from common.model.gpt import RewardModel
from common.model.shape import GPTConfig
from common.text.tokenizer import Tokenizer
from common.train.placement import has_bf16
from stages.pretrain import train as pretrain
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft
from tools.plan.planner import Plan
from tools.plan.process import process_bytes

STAGES: dict[str, Any] = {"pretrain": pretrain, "sft": sft, "reward": reward, "rl": rl}
VOCABULARY = 4096  # ids of the models
# 88 million parameters
SHAPE: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": 2048}
LORA = {"lora_r": 8}
TRAIN = {
    "max_steps": 2,
    "save_steps": None,
    "mixed_precision": "no",
    "per_device_train_batch_size": 2,
}


class Case(NamedTuple):
    """One run."""

    name: str
    """What is printed, and what words on the command line choose by."""
    stage: str
    """pretrain, sft, reward or rl."""
    place: str | None = None
    """A file of configs/accelerate, for two processes; None = one process."""
    keys: dict[str, Any] = {}
    """Of the stage's config, beside those that `settings` gives."""


CASES = [
    Case("pretrain", "pretrain"),
    Case("pretrain checkpointing", "pretrain", keys={"gradient_checkpointing": True}),
    Case("pretrain muon zero2", "pretrain", "zero2", {"optimizer": "muon"}),
    Case("pretrain zero3", "pretrain", "zero3"),
    Case("pretrain gpt2", "pretrain", keys={"family": "gpt2"}),
    Case("sft", "sft"),
    Case("sft lora", "sft", keys=LORA),
    Case("sft ddp", "sft", "ddp"),
    Case("sft zero1", "sft", "zero1"),
    Case("sft zero2", "sft", "zero2"),
    Case("sft zero3", "sft", "zero3"),
    Case("sft lora zero3", "sft", "zero3", LORA),
    Case("reward", "reward"),
    Case("reward lora zero2", "reward", "zero2", LORA),
    Case("reward zero3", "reward", "zero3"),
    Case("rl", "rl"),
    Case("rl lora", "rl", keys=LORA),
    Case("rl zero2", "rl", "zero2"),
    Case("rl zero3", "rl", "zero3"),
]


class Measured(NamedTuple):
    """What a run took, beside what was foretold: bytes a process."""

    grown: float
    planned: float


def inside(result: str, stage: str, *words: str) -> None:
    """What the processes of a run do: import all, note the memory, run the stage, and write to the
    file `result`, with the process's id at its end, by how many MB it grew at most."""
    import deepspeed  # noqa: F401 (stages import it when they need it, as the next two)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    before, module = held_mb(), STAGES[stage]
    sys.argv = [f"stages.{stage}.train", *words]
    try:
        cli(module.Config, module.main)
    finally:
        Path(f"{result}-{os.getpid()}").write_text(str(peak_mb() - before))


def shards(folder: Path, tokenizer: Tokenizer) -> str:
    """Random tokens as stages.pretrain.prepare would write them."""
    tokenizer.save(folder)
    draw = np.random.default_rng(0)
    for split in ("train", "eval"):
        tokens = draw.integers(5, VOCABULARY - 5, 6_000).astype("uint16")
        tokens.tofile(folder / f"{split}-00000.bin")
    meta = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "fingerprint": "x"}
    (folder / "shards.json").write_text(json.dumps(meta))
    return str(folder)


def text_of(tokens: int, first: int) -> str:
    """A text of so many tokens of `letters`, another one for each `first`."""
    return "".join(chr(0x4E00 + (first * 31 + i * 7) % (VOCABULARY - 5)) for i in range(tokens))


def settings(case: Case, folder: Path) -> dict[str, Any]:
    """Keys of the run: its data and models are written to `folder`."""
    tokenizer, length = letters(VOCABULARY), 128
    if case.stage == "pretrain":
        data = {"train_data": shards(folder / "shards", tokenizer), "eval_rows": 2, **SHAPE}
        return {**TRAIN, **data, "max_length": length, **case.keys}
    shape = SHAPE | ({"n_layer": 6} if case.stage == "rl" else {})  # there are four models
    config = GPTConfig(family="llama", vocab_size=VOCABULARY, max_length=256, **shape)
    model = random_llama(config)
    keys: dict[str, Any] = {"parent": write_model(folder / "parent", model, tokenizer)}
    if case.stage == "rl":
        judge = RewardModel(config, model.trunk)
        keys["reward_model"] = write_model(folder / "judge", judge, tokenizer)
        keys |= {"max_prompt_length": 64, "max_new_tokens": 32, "num_ppo_epochs": 1}
        rows = [{"prompt": text_of(56, n)} for n in range(8)]
    elif case.stage == "sft":
        keys |= {"max_length": length, "eval_fraction": 0.25, "samples": 1, "sample_tokens": 4}
        rows = [{"prompt": text_of(9, n), "completion": text_of(length, n)} for n in range(8)]
    else:
        keys |= {"max_length": length, "eval_fraction": 0.25, "per_device_train_batch_size": 1}
        rows = [
            {"prompt": text_of(9, n), "chosen": text_of(112, n), "rejected": text_of(112, -n - 1)}
            for n in range(8)
        ]
    keys["train_data"] = write_rows(folder / "rows.jsonl", rows)
    return {**TRAIN, **keys, **case.keys}


def command(case: Case, result: Path, config: Path) -> list[str]:
    """What starts the run."""
    words = ["-m", "benchmarks.plan", "--inside", str(result), case.stage]
    words += ["--config", str(config)]
    if case.place is None:
        return [sys.executable, *words]
    file = f"configs/accelerate/{case.place}.yaml"
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", file]
    return [sys.executable, *launcher, "--main_process_port", "0", *words]


def planned(case: Case, config: Path) -> float:
    """Bytes a process, as tools.plan foretells them."""
    zero = int(found[1]) if (found := re.match(r"zero(\d)", case.place or "")) else 0
    plan = Plan(config, 2 if case.place else 1, bf16=has_bf16())
    return process_bytes(plan.works[-1], zero)


def measure(case: Case, folder: Path) -> Measured:
    """Run it to its end in `folder`. Raises RuntimeError when it fails."""
    keys = settings(case, folder) | {"output_dir": str(folder / "out")}
    config = folder / f"{case.stage}.yaml"
    config.write_text(json.dumps(keys))  # JSON is YAML
    words = command(case, folder / "grown", config)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ended(words, done.returncode, done.stdout[-1500:] + done.stderr[-3000:])
    grown = [float(file.read_text()) for file in folder.glob("grown-*")]
    return Measured(max(grown) * 1e6, planned(case, config))


def line(name: str, found: Measured) -> str:
    """A line of the table."""
    figures = f"{found.grown / 1e9:>10.2f}{found.planned / 1e9:>12.2f}"
    return f"{name:<26}{figures}{found.planned / found.grown:>15.2f}"


def main(argv: Sequence[str]) -> None:
    """Print a line for each run."""
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(cases)}; all of them unless named")
    names = parser.parse_args(argv).names or list(cases)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"{unknown[0]!r} is no run; there are {', '.join(cases)}")
    print(f"{'run':<26}{'grown GB':>10}{'planned GB':>12}{'planned/grown':>15}")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            print(line(name, measure(cases[name], Path(scratch))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        main(sys.argv[1:])
