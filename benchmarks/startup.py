"""Seconds from the launch of a stage to the end of its first training step, for each of the four
stages.

    python -m benchmarks.startup --threads 2

A chain of tiny models is made in a temporary folder by the stages themselves. Then each stage is
launched anew (`python -m stages.X.train`, logging_steps 1) and metrics.jsonl is watched for the
first line of a step above 0: it is written when the update is done. In it: imports, config, the
check of the parent's checksums, data, the evaluation before the first step, and one update (for rl
one rollout, its scores and PPO's updates). Ours is the slowest of the four; the bar is 8 s on 2
cores. The peer is TRL's SFTTrainer on the base model and the rows of our sft stage, to its first
logged loss.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import ROOT, Missing, arguments, ended, flags, pin, side_by_side

BAR = 8.0  # seconds
STAGES = ("pretrain", "sft", "reward", "rl")
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"],
}
ANSWERS = ["Yes.", "No, it is not.", "The fox."]

TRL = """
import json, sys
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

class Note(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            with open(sys.argv[3], "a") as file:
                file.write(json.dumps({"step": state.global_step} | logs) + "\\n")

args = SFTConfig(output_dir=sys.argv[4], max_steps=1, logging_steps=1, max_length=48,
                 per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True)
rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[4])
SFTTrainer(sys.argv[1], args=args, train_dataset=rows, callbacks=[Note()]).train()
"""


def write_rows(folder: Path) -> None:
    """A few rows for each stage."""
    numbers = range(40)
    sentence = "The fox number {} met the bird number {} by the river."
    rows: dict[str, list[dict[str, Any]]] = {
        "documents": [{"text": sentence.format(n % 10, n % 7)} for n in range(200)],
        "sft": [{"prompt": f"Is it {n}?", "completion": ANSWERS[n % 3]} for n in numbers],
        "reward": [
            {"prompt": f"Is it {n}?", "answers": ANSWERS, "ranks": [n % 2, 1, 2]} for n in numbers
        ],
        "rl": [{"prompt": f"Is it {n}?"} for n in numbers],
    }
    for name, group in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in group))


def command(stage: str, folder: Path, output_dir: Path, launcher: str = "python") -> list[str]:
    """The launch of a stage with the keys of a tiny run of one step."""
    keys: dict[str, Any] = {
        "output_dir": output_dir,
        "train_data": folder / (f"{stage}.jsonl" if stage != "pretrain" else "shards"),
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
    }
    if stage == "pretrain":
        keys |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "max_length": 64, "eval_rows": 8}
    elif stage == "rl":
        keys |= {"parent": folder / "sft", "reward_model": folder / "reward"}
        keys |= {"max_prompt_length": 32, "max_new_tokens": 8}
    else:
        keys |= {"parent": folder / ("pretrain" if stage == "sft" else "sft"), "max_length": 48}
    return [*LAUNCHERS[launcher], "-m", f"stages.{stage}.train", *flags(keys)]


def first_step(line: list[str], metrics: Path) -> float:
    """Seconds until `metrics` has a line of a step above 0; then the program, and what it has
    started, is killed."""
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            line, cwd=ROOT, stdout=said, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            while True:
                rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
                if any(json.loads(row)["step"] for row in rows if row.endswith("\n")):
                    return time.perf_counter() - started
                if process.poll() is not None:
                    said.seek(0)
                    raise ended(line, process.returncode, said.read()[-3000:].decode())
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def make_parents(folder: Path, stages: Sequence[str]) -> None:
    """The shards, and the models that these stages start from."""
    write_rows(folder)
    places = {"train_data": folder / "documents.jsonl", "output_dir": folder / "shards"}
    keys = places | {"vocab_size": 290, "eval_fraction": 0.1}
    lines = [[sys.executable, "-m", "stages.pretrain.prepare", *flags(keys)]]
    parents = STAGES[: max(map(STAGES.index, stages))]
    lines += [command(stage, folder, folder / stage) for stage in parents]
    for line in lines:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ended(line, done.returncode, done.stdout + done.stderr)


class Bench:
    """The launches, in a folder with the rows and the parents, and our seconds of each stage."""

    def __init__(self, folder: Path, stages: Sequence[str], launcher: str) -> None:
        """`stages` are those to launch, with a key of LAUNCHERS."""
        self.folder, self.launcher = folder, launcher
        self.seconds: dict[str, list[float]] = {stage: [] for stage in stages}
        self.medians: dict[str, float] = {}

    def ours(self) -> float:
        """Seconds of the slowest stage."""
        for stage, seconds in self.seconds.items():
            shutil.rmtree(self.folder / "run", ignore_errors=True)
            line = command(stage, self.folder, self.folder / "run", self.launcher)
            seconds.append(first_step(line, self.folder / "run" / "metrics.jsonl"))
            counted = seconds[1:] or seconds  # the first is warm-up
            self.medians[stage] = round(statistics.median(counted), 3)
            print(f"  {stage:10} {seconds[-1]:6.2f} s", flush=True)
        return max(seconds[-1] for seconds in self.seconds.values())

    def trl(self) -> float:
        """Seconds of TRL's SFTTrainer."""
        if not find_spec("trl"):
            raise Missing("pip install trl")
        out = self.folder / "trl"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        metrics = out / "metrics.jsonl"
        places = [self.folder / "pretrain", self.folder / "sft.jsonl", metrics, out]
        return first_step([sys.executable, "-c", TRL, *map(str, places)], metrics)


def main() -> None:
    """Make the parents, launch the stages and the peer."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="python", help="accelerate: `accelerate launch`"
    )
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--no_peer", action="store_true", help="without TRL")
    options = parser.parse_args()
    pin(options.threads)
    with tempfile.TemporaryDirectory() as name:
        make_parents(Path(name), options.stages if options.no_peer else STAGES)
        bench = Bench(Path(name), options.stages, options.launcher)
        sides = {"ours": bench.ours} | ({} if options.no_peer else {"trl sft": bench.trl})
        side_by_side(
            "startup",
            "s to the first step",
            sides,
            runs=options.runs,
            bar=BAR,
            stages=bench.medians,
            launcher=options.launcher,
        )


if __name__ == "__main__":
    main()
