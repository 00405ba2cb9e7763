"""The memory that tools.plan foretells, beside what our own runs take on this machine's CPU.

    python -m benchmarks.plan                      # every run: half an hour on two slow cores
    python -m benchmarks.plan sft "rl zero3"       # those whose names have one of these words

Each run is a stage as anyone starts it, by itself or in two processes under DeepSpeed, of two
updates on a random Llama whose weights are 0.3 to 0.5 GB. It grows by 1 GB or more. `grown` is the
most that a process has held (VmHWM) less what it held when all was imported; of several processes,
that of the one with the most.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.memory import held_mb, peak_mb
from benchmarks.side_by_side import ROOT, ended
from benchmarks.workload import letters, random_llama, write_model, write_rows
from common.model.gpt import RewardModel
from common.model.shape import GPTConfig
from common.text.tokenizer import Tokenizer
from common.train.placement import has_bf16
from tools.plan.planner import Plan
from tools.plan.workload import memory

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


def inside(result: str, module: str, *words: str) -> None:
    """What the processes of a run do: import all, note the memory, run the stage, and write to the
    file `result`, with the process's id at its end, by how many bytes it grew at most."""
    stage = importlib.import_module(module)
    for library in ("peft", "transformers", "deepspeed"):  # what stages import when they need it
        importlib.import_module(library)
    from common.config.schema import cli

    before = held_mb()
    sys.argv = [module, *words]
    try:
        cli(stage.Config, stage.main)
    finally:
        import os

        Path(f"{result}-{os.getpid()}").write_text(str(peak_mb() - before))


def shards(folder: Path, tokenizer: Tokenizer) -> str:
    """Random tokens as stages.pretrain.prepare would write them."""
    import numpy as np

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
    config = GPTConfig(family="llama", vocab_size=VOCABULARY, max_length=256, **SHAPE)
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
    words = ["-m", "benchmarks.plan", "--inside", str(result), f"stages.{case.stage}.train"]
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
    return memory(plan.works[-1], zero, on_cpu=True).peak


def measure(case: Case, scratch: Path) -> Measured:
    """Run it to its end in a new folder under `scratch`. Raises Failure when it fails."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    keys = settings(case, folder) | {"output_dir": str(folder / "out")}
    config = folder / f"{case.stage}.yaml"
    config.write_text(json.dumps(keys))  # JSON is YAML
    words = command(case, folder / "grown", config)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ended(words, done.returncode, done.stdout[-1500:] + done.stderr[-3000:])
    grown = [float(file.read_text()) for file in folder.glob("grown-*")]
    return Measured(max(grown) * 1e6, planned(case, config))


def chosen(words: Sequence[str]) -> list[Case]:
    """The cases whose names start with one of the words; all of them where there are none."""
    return [case for case in CASES if not words or any(case.name == word for word in words)]


def main(argv: Sequence[str], measure: Callable[[Case, Path], Measured] = measure) -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="runs to make; all of them unless named")
    args = parser.parse_args(argv)
    print(f"{'run':<26}{'grown GB':>10}{'planned GB':>12}{'planned/grown':>15}")
    with tempfile.TemporaryDirectory() as scratch:
        for case in chosen(args.names):
            found = measure(case, Path(scratch))
            figures = f"{found.grown / 1e9:>10.2f}{found.planned / 1e9:>12.2f}"
            print(f"{case.name:<26}{figures}{found.planned / found.grown:>15.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(*sys.argv[2:])
    else:
        main(sys.argv[1:])
