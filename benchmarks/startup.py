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

from benchmarks.side_by_side import ROOT, Missing, arguments, pin, side_by_side

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

args = SFTConfig(output_dir=sys.argv[4], max_steps=1, logging_steps=1, per_device_train_batch_size=4, max_length=48,
                 report_to=[], save_strategy="no", use_cpu=True)
rows = load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[4])
SFTTrainer(sys.argv[1], args=args, train_dataset=rows, callbacks=[Note()]).train()
"""


def write_rows(folder: Path) -> None:
    rows = {
        "documents": [
            {"text": f"The fox number {n % 10} met the bird number {n % 7} by the river."}
            for n in range(200)
        ],
        "sft": [{"prompt": f"Is it {n}?", "completion": ANSWERS[n % 3]} for n in range(40)],
        "reward": [
            {"prompt": f"Is it {n}?", "answers": ANSWERS, "ranks": [n % 2, 1, 2]} for n in range(40)
        ],
        "rl": [{"prompt": f"Is it {n}?"} for n in range(40)],
    }
    for name, group in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in group))


def command(stage: str, folder: Path, output_dir: Path, launcher: str = "python") -> list[str]:
    """The launch of a stage with the keys of a tiny run of one step."""
    keys = {
        "output_dir": output_dir,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
    }
    keys["train_data"] = folder / (f"{stage}.jsonl" if stage != "pretrain" else "shards")
    if stage == "pretrain":
        keys |= {"n_layer": 2, "n_head": 2, "n_embd": 32, "max_length": 64, "eval_rows": 8}
    elif stage == "rl":
        keys |= {
            "parent": folder / "sft",
            "reward_model": folder / "reward",
            "max_prompt_length": 32,
            "max_new_tokens": 8,
        }
    else:
        keys |= {"parent": folder / ("pretrain" if stage == "sft" else "sft"), "max_length": 48}
    flags = [str(part) for key, value in keys.items() for part in (f"--{key}", value)]
    return [*LAUNCHERS[launcher], "-m", f"stages.{stage}.train", *flags]


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
                    raise RuntimeError(
                        f"{' '.join(line)} ended with {process.returncode}:\n{said.read()[-3000:].decode()}"
                    )
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def make_parents(folder: Path, stages: Sequence[str]) -> None:
    """The shards, and the models that these stages start from."""
    write_rows(folder)
    prepare = [
        "--train_data",
        str(folder / "documents.jsonl"),
        "--output_dir",
        str(folder / "shards"),
    ]
    lines = [
        [
            sys.executable,
            "-m",
            "stages.pretrain.prepare",
            *prepare,
            "--vocab_size",
            "290",
            "--eval_fraction",
            "0.1",
        ]
    ]
    lines += [
        command(stage, folder, folder / stage) for stage in STAGES[: max(map(STAGES.index, stages))]
    ]
    for line in lines:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="python", help="accelerate: `accelerate launch`"
    )
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--no_peer", action="store_true", help="without TRL")
    options = parser.parse_args()
    pin(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_parents(folder, options.stages if options.no_peer else STAGES)
        seconds: dict[str, list[float]] = {stage: [] for stage in options.stages}
        medians: dict[str, float] = {}

        def ours() -> float:
            for stage in options.stages:
                shutil.rmtree(folder / "run", ignore_errors=True)
                line = command(stage, folder, folder / "run", options.launcher)
                seconds[stage].append(first_step(line, folder / "run" / "metrics.jsonl"))
                medians[stage] = round(
                    statistics.median(seconds[stage][1:] or seconds[stage]), 3
                )  # the first is warm-up
                print(f"  {stage:10} {seconds[stage][-1]:6.2f} s", flush=True)
            return max(times[-1] for times in seconds.values())

        def trl() -> float:
            if not find_spec("trl"):
                raise Missing("pip install trl")
            shutil.rmtree(folder / "trl", ignore_errors=True)
            (folder / "trl").mkdir()
            places = [
                folder / "pretrain",
                folder / "sft.jsonl",
                folder / "trl" / "metrics.jsonl",
                folder / "trl",
            ]
            return first_step(
                [sys.executable, "-c", TRL, *map(str, places)], folder / "trl" / "metrics.jsonl"
            )

        side_by_side(
            "startup",
            "s to the first step",
            {"ours": ours} | ({} if options.no_peer else {"trl sft": trl}),
            runs=options.runs,
            lower_is_better=True,
            bar=BAR,
            stages=medians,
            launcher=options.launcher,
        )


if __name__ == "__main__":
    main()
