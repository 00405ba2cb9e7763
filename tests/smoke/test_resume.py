"""RLHF.md's invariant 7: a run that was interrupted, by a crash or by a signal, ends bit for bit as
one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from common.program.errors import InputError
from common.train import run as run_module
from stages.pretrain import train as pretrain
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "rl": rl}
TIMES = {
    "tokens/s",
    "mfu",
    "seconds_sampling",
    "seconds_scoring",
    "seconds_training",
}  # what a clock says, and no seed can repeat


class Crash(Exception):
    pass


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def run(stage: str, keys: dict) -> None:
    AcceleratorState._reset_state(True)
    module = STAGES[stage]
    module.main(module.Config(**keys))


def results(folder: str) -> dict[str, object]:
    """What must be equal: every weight file byte for byte, every log line but its clock, and
    stage.json's figures."""
    found: dict[str, object] = {}
    for file in sorted(Path(folder).rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [
                {key: value for key, value in row.items() if key not in TIMES} for row in rows
            ]
        elif name == "stage.json":
            stage = json.loads(file.read_text())
            found[name] = {
                key: stage.get(key)
                for key in ("step", "gate", "accuracy", "tokens_seen", "episodes")
            }
            found[name]["metrics"] = {
                key: value for key, value in stage["metrics"].items() if key not in TIMES
            }
    return found


def crash_in_update(monkeypatch, number: int) -> None:
    """The next run dies in its update number `number` (from 0), without a chance to clean up."""
    calls = []
    real = run_module.update

    def update(*args, **kwargs):
        calls.append(1)
        if len(calls) > number:
            raise Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "update", update)


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_crashed_run_ends_as_one_that_did_not_crash(
    stage, lora_r, setting, tmp_path, monkeypatch, capsys
):
    if lora_r and stage == "pretrain":
        pytest.skip("pretraining has no LoRA")
    updates = 4 if stage == "rl" else 1  # of a step
    run(stage, setting(stage, output_dir=str(tmp_path / "whole"), lora_r=lora_r))
    keys = setting(stage, output_dir=str(tmp_path / "cut"), lora_r=lora_r)
    for crash_after, saved in ((3, 2), (2, 4)):  # steps; the second time counted from step 2
        with monkeypatch.context() as patch:
            crash_in_update(patch, crash_after * updates)
            with pytest.raises(Crash):
                run(stage, keys)
        assert (tmp_path / "cut" / "state" / f"step-{saved}" / "manifest.json").exists()
        assert not (tmp_path / "cut" / "model.safetensors").exists()
    capsys.readouterr()
    run(stage, keys)
    assert (
        f"{stage}: going on from {tmp_path / 'cut' / 'state' / 'step-4'}" in capsys.readouterr().out
    )
    cut, whole = results(str(tmp_path / "cut")), results(str(tmp_path / "whole"))
    assert cut.keys() == whole.keys()
    assert len(whole["metrics.jsonl"]) >= 7
    for name in whole:
        assert cut[name] == whole[name], name
    assert not (tmp_path / "cut" / "state").exists()  # done: nothing to go on from


def test_dropout_and_random_generators_matter_here(setting, tmp_path):
    """What the comparison above would miss if nothing depended on the generators."""
    run("pretrain", setting("pretrain", output_dir=str(tmp_path / "a"), max_steps=2))
    run("pretrain", setting("pretrain", output_dir=str(tmp_path / "b"), max_steps=2, dropout=0.0))
    assert (
        results(str(tmp_path / "a"))["model.safetensors"]
        != results(str(tmp_path / "b"))["model.safetensors"]
    )


def interrupted(keys: dict, tmp_path, monkeypatch, after: int = 5) -> None:
    with monkeypatch.context() as patch:
        crash_in_update(patch, after)
        with pytest.raises(Crash):
            run("pretrain", keys)


def test_a_state_of_another_run_is_refused_by_name(setting, tmp_path, monkeypatch):
    keys = setting("pretrain", output_dir=str(tmp_path / "cut"))
    interrupted(keys, tmp_path, monkeypatch)
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    with pytest.raises(
        InputError,
        match=r"step-4: is of a run with learning_rate = 0\.01, this one has 0\.5; give it back",
    ):
        run("pretrain", keys | {"learning_rate": 0.5})
    with monkeypatch.context() as patch:  # the shards have become other ones
        patch.setattr("stages.pretrain.train.fingerprint", lambda meta: "of other shards")
        with pytest.raises(InputError, match=r"is of a run with data = .* has of other shards"):
            run("pretrain", keys)
    assert {
        path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()
    } == before
    run("pretrain", keys | {"save_steps": 3, "save_total_limit": 1})  # how often it saves is free


def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    setting, tmp_path, monkeypatch, capsys
):
    run("pretrain", setting("pretrain", output_dir=str(tmp_path / "whole")))
    keys = setting("pretrain", output_dir=str(tmp_path / "cut"))
    interrupted(keys, tmp_path, monkeypatch)
    file = tmp_path / "cut" / "state" / "step-4" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "cut" / "state" / "step-6.tmp").mkdir()  # a save that was cut short
    with pytest.warns(UserWarning, match=r"step-4.weights\.safetensors: damaged"):
        run("pretrain", keys)
    assert "step-2" in capsys.readouterr().out
    assert results(str(tmp_path / "cut")) == results(str(tmp_path / "whole"))


@pytest.fixture(scope="module")
def uninterrupted(setting, tmp_path_factory) -> dict[str, object]:
    """Results of the run below that nothing stops; how often it saves is no part of them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("rl", setting("rl", output_dir=str(folder), max_steps=12))
    return results(str(folder))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it_saved_and_the_same_command_goes_on(
    kind, setting, uninterrupted, tmp_path
):
    keys = setting(
        "rl",
        output_dir=str(tmp_path / "cut"),
        max_steps=12,
        save_steps=1 if kind == signal.SIGKILL else None,
    )
    config = tmp_path / "rl.yaml"
    config.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "stages.rl.train", "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(kind)
    _, err = job.communicate(timeout=60)
    if kind == signal.SIGKILL:
        assert job.returncode == -kind
    else:
        assert job.returncode == 75
        assert "the same command goes on from there" in err
        assert "Traceback" not in err
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    again = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=100
    )
    assert again.returncode == 0, again.stderr
    assert "rl: going on from" in again.stdout
    assert results(str(tmp_path / "cut")) == uninterrupted
