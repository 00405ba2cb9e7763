"""Two real processes under `accelerate launch`: one is killed, or the launcher is. All end, the
same command goes on, and so does one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from children import FULL, child
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def worker(launcher: int, rank: int) -> int:
    """Process id of that rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"RANK={rank}" in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
        except OSError:  # it has ended meanwhile
            continue
    raise AssertionError(f"no process of rank {rank}")


def wait_for_lines(file: Path, number: int, job: subprocess.Popen) -> None:
    until = time.monotonic() + 200
    while not file.exists() or len(file.read_text().splitlines()) < number:
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.002)


def child_of(parent: int) -> int:
    """Process id of its only child."""
    (found,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(found)


def test_the_launcher_is_killed(setting, tmp_path):
    """Its processes save and end; until they have, nobody else may write there."""
    recipe, out = tmp_path / "recipe", tmp_path / "out"
    recipe.mkdir()
    keys = setting("sft", max_steps=40, save_steps=None, eval_steps=None)
    step = {"module": "stages.sft.train", "launch": True}
    launch = yaml.safe_load((ROOT / "configs/accelerate/ddp.yaml").read_text())
    for name, content in {
        "pipeline": {"output_dir": str(out), "steps": {"sft": step}},
        "sft": keys,
        "launch": {**launch, "main_process_port": 0},  # one that is free
    }.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "pipeline.py", str(recipe), "--num_processes", "2"]
    command += ["--launch", str(recipe / "launch.yaml")]
    more = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    job = subprocess.Popen(command, **more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(out / "sft" / "metrics.jsonl", 6, job)
    launcher = child_of(job.pid)
    ranks = [worker(launcher, rank) for rank in (0, 1)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # as if they took long to save
    os.kill(launcher, signal.SIGKILL)
    assert job.wait(timeout=60) == 137
    refused = subprocess.run(command, **more, capture_output=True)
    assert refused.returncode == 2 and "out/sft: another program is running" in refused.stderr
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < until
        time.sleep(0.05)
    (saved,) = (out / "sft" / "state").iterdir()
    again = subprocess.run(command, **more, capture_output=True)
    assert again.returncode == 0 and f"going on from {saved}" in again.stdout, again


def test_one_dies(setting, tmp_path):
    keys = setting(
        "sft",
        output_dir=str(tmp_path / "two"),
        max_steps=40,
        dropout=0.0,
        save_steps=2,
        eval_steps=None,
    )
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(keys))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]  # one that is free
    command = [*launch, "-m", "stages.sft.train", "--config", str(tmp_path / "sft.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_for_lines(tmp_path / "two" / "metrics.jsonl", 6, job)
    os.kill(worker(job.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    err = job.communicate(timeout=60)[1]
    seconds = time.monotonic() - killed
    print(f"{seconds:.1f} s from the death of one process to the end of all")
    assert seconds < 30
    assert job.returncode == 1
    assert (
        "stages.sft.train FAILED" in err and "Signal 9 (SIGKILL)" in err and "rank      : 1" in err
    ), err
    assert not (tmp_path / "two" / "manifest.json").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    if FULL:
        again = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        assert again.returncode == 0 and "sft: going on from" in again.stdout, again.stderr
    ended = child("sft", keys | {"output_dir": str(tmp_path / "one")})
    assert ended.code == 0 and "sft: going on from" in ended.out, ended.err
    whole = child(
        "sft", keys | {"output_dir": str(tmp_path / "whole"), "gradient_accumulation_steps": 2}
    )
    assert whole.code == 0, whole.err
    weights = {
        name: load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "whole", *["two"] * FULL)
    }
    for name in weights.keys() - {"whole"}:
        far = max(
            float((weights[name][key] - tensor).abs().max())
            for key, tensor in weights["whole"].items()
        )
        print(f"interrupted in two processes, ended in {name}: {far:.1e} from one that was not")
        assert far < 1e-5
