"""The same weights from one process, 2x2 accumulation, two processes under DDP, and ZeRO-1, -2, -3:
every stage, whole runs.

This file is also the job that the processes run: accelerate launch --config_file CONFIG FILE
WORDS_OF_job
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from common.program.errors import Interrupted
from common.text.tokenizer import Tokenizer
from common.train import placement
from common.train.run import Run
from stages.rl import train as rl
from tests.conftest import SENTENCES

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 5, 8  # of each run, in rows over all processes
RARE = {"zero1", "zero2", "zero3_offload"}  # beside DDP and ZeRO-3 they find little
STAGES = {
    "pretrain": "pretrain",
    "pretrain with muon": "pretrain",
    "sft": "sft",
    "sft with lora": "sft",
    "reward": "reward",
    "rl": "rl",
}
# Rows of a micro-batch, micro-batches; all but the first in two processes.
PLACES = {
    "2x2": (4, 2),
    "ddp": (2, 2),
    "zero1": (2, 2),
    "zero2": (4, 1),
    "zero3": (2, 2),
    "zero3_offload": (4, 1),
}


def job(settings: str, out: str, micro: str, accumulation: str, stop_before: str = "") -> None:
    """Every run of `settings`, each for itself; stop_before: told to end by a signal when it comes
    to that step."""
    torch.set_num_threads(1)
    checkpoint = Run.checkpoint

    def stopping(self: Run, step: int, kept: dict | None = None) -> None:
        if stop_before and step == int(stop_before):
            os.kill(os.getpid(), signal.SIGTERM)
        checkpoint(self, step, kept)

    split: list[bool] = []  # for each rollout, whether the policy sampled from is in pieces

    def noted(*words: object) -> torch.nn.Module:
        policy = placement.sampler(*words)
        split.append(any(hasattr(p, "ds_status") for p in policy.parameters()))
        return policy

    Run.checkpoint, rl.sampler = stopping, noted
    for name, keys in json.loads(Path(settings).read_text()).items():
        AcceleratorState._reset_state(True)
        module = import_module(f"stages.{STAGES[name]}.train")
        batch = {
            "per_device_train_batch_size": int(micro),
            "gradient_accumulation_steps": int(accumulation),
        }
        with suppress(Interrupted):
            module.main(module.Config(**keys | batch, output_dir=f"{out}/{name}"))
            assert not stop_before
    Run.checkpoint, rl.sampler = checkpoint, placement.sampler
    Path(out, "split.json").write_text(json.dumps(split))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def settings(setting, tmp_path_factory, tiny_gpt, stage_dir) -> Path:
    """Ragged rows, no dropout (its draws are each process's own), a gradient that is clipped, saves
    on the way; the last batch of an epoch has fewer rows than the others."""
    file, runs = tmp_path_factory.mktemp("placement") / "settings.json", {}
    for name, stage in STAGES.items():
        runs[name] = setting(
            stage, max_steps=STEPS, learning_rate=1e-3, max_grad_norm=0.5, save_steps=2
        )
        runs[name] |= {"dropout": 0.0} if stage in ("pretrain", "sft") else {}
        runs[name] |= (
            {"optimizer": "muon" if "muon" in name else "adamw"} if stage == "pretrain" else {}
        )
        if "lora" in name:  # over a parent without the chat format: rows learn too
            foreign = Tokenizer.train_bpe(SENTENCES * 3, 300)
            runs[name] |= {"lora_r": 2, "parent": stage_dir(tiny_gpt("llama", seed=1), foreign)}
        runs[name] |= {"gradient_checkpointing": stage == "reward"}
    file.write_text(json.dumps(runs))
    return file


def launch(place: str | None, *words: object) -> None:
    """job(*words) in two processes as `place` says; without it in this one."""
    if place is None:
        job(*map(str, words))
        AcceleratorState._reset_state(True)
        return
    if "zero" in place and not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles an extension at its first start, and there is no g++")
    start = [
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        f"configs/accelerate/{place}.yaml",
        "--main_process_port",  # one that is free, as other tests launch at the same time
        "0",
    ]
    command = [sys.executable, *start, "--num_processes", "2", __file__, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=220
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="session")
def whole(settings, tmp_path_factory) -> Path:
    """Folder of all runs in one process, each batch in one piece."""
    out = tmp_path_factory.mktemp("whole")
    launch(None, settings, out, BATCH, 1)
    return out


@pytest.fixture(scope="session")
def runs(settings, tmp_path_factory) -> Callable[[str], Path]:
    """runs(place) -> folder of all runs there, made once."""
    made: dict[str, Path] = {}

    def make(place: str) -> Path:
        if place not in made:
            made[place] = tmp_path_factory.mktemp(place)
            launch(None if place == "2x2" else place, settings, made[place], *PLACES[place])
        return made[place]

    return make


def distance(one: Path, other: Path) -> float:
    """The largest difference of two weights of the same name."""
    worst = 0.0
    for file in ["model.safetensors"] + ["critic/model.safetensors"] * (one / "critic").exists():
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        worst = max(worst, *(float((a[key] - b[key]).abs().max()) for key in a))
    return worst


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.slow] * (p in RARE)) for p in PLACES]
)
def test_same_weights(place, name, runs, whole):
    far = distance(whole / name, runs(place) / name)
    print(f"{far:.1e} {place}: {name}")
    assert far < 1e-5
    logs = [
        [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
        for out in (whole, runs(place))
    ]
    for row, same in zip(*logs, strict=True):
        for key in row.keys() - {
            "tokens/s",
            "mfu",
            "seconds_sampling",
            "seconds_scoring",
            "seconds_training",
        }:
            assert same[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key


def test_zero3_gathers_the_policy_once_a_rollout(runs):
    """Sampling from a module in pieces would gather them at each token."""
    assert json.loads((runs("zero3") / "split.json").read_text()) == [False] * STEPS
    assert json.loads((runs("ddp") / "split.json").read_text()) == [False] * STEPS


def test_the_runs_move_the_weights(whole, settings):
    """What the comparison above would miss if nothing trained."""
    for name, keys in json.loads(settings.read_text()).items():
        if parent := keys.get("parent"):
            start, end = (
                load_file(f"{parent}/model.safetensors"),
                load_file(whole / name / "model.safetensors"),
            )
            assert (
                max(float((start[key] - end[key]).abs().max()) for key in start.keys() & end.keys())
                > 1e-3
            ), name


@pytest.mark.slow
def test_a_run_goes_on_wherever_it_is_started_again(settings, whole, tmp_path):
    """One process, then ZeRO-3, DDP, ZeRO-2 on two, one again; the accumulation gives way where the
    processes double."""
    for step, place in enumerate([None, "zero3", "ddp", "zero2", None], 1):
        launch(place, settings, tmp_path, 2, 4, *([step] if step < STEPS else []))
    for name in STAGES:
        assert distance(whole / name, tmp_path / name) < 1e-5, name


@pytest.mark.slow
def test_zero3_goes_on_bit_for_bit(settings, runs, tmp_path):
    for stop_before in (3, ""):
        launch("zero3", settings, tmp_path, *PLACES["zero3"], stop_before)
    for name in STAGES:
        assert distance(runs("zero3") / name, tmp_path / name) == 0, name


if __name__ == "__main__":
    job(*sys.argv[1:])
