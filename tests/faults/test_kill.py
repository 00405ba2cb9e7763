"""SIGKILL at random moments: the same command goes on and ends with the weights of a run that
nobody killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from children import FULL, STAGES, Child, child, run, same, uninterrupted

ROOT = Path(__file__).resolve().parents[2]
KILLS = 25 if FULL else 2  # of each stage


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage, setting, tmp_path):
    keys = setting(stage, save_steps=1)
    whole, seconds = uninterrupted(tmp_path, stage, keys)
    rng, kills = random.Random(stage), 0
    while kills < KILLS:
        folder = tmp_path / str(kills)
        folder.mkdir(exist_ok=True)
        cut = keys | {"output_dir": str(folder / "cut")}
        for _ in range(
            rng.randint(1, 4)
        ):  # the same run several times, as states of a run that went on can be hit, too
            job = Child(run, stage, cut)
            time.sleep(rng.uniform(0, seconds))
            job.kill()
            kills += job.wait().code == -signal.SIGKILL  # else it was done before
        ended = child(stage, cut)
        assert ended.code == 0, f"{folder}: {ended.err}"
        same(cut["output_dir"], whole)


def test_a_real_process_is_killed(setting, tmp_path):
    """The same with a command line and a new interpreter, killed in the fourth step."""
    keys = setting("reward", save_steps=1, output_dir=str(tmp_path / "cut"))
    whole, _ = uninterrupted(tmp_path, "reward", keys)
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(keys))
    command = [
        sys.executable,
        "-m",
        "stages.reward.train",
        "--config",
        str(tmp_path / "reward.yaml"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    metrics, until = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    job.kill()
    job.wait()
    ended = child("reward", keys)
    assert ended.code == 0 and "going on from" in ended.out, ended.err
    same(tmp_path / "cut", whole)
