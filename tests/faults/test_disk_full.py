"""A disk that is full: what was saved stays, one line says so, exit code 1, and the same command
goes on afterwards."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from children import FULL, STAGES, child, on_call, same, uninterrupted

import common.train.log
import common.train.run
from common.train.resume import newest_state

ROOT = Path(__file__).resolve().parents[2]


def limit(size: int) -> Callable[[], None]:
    """Files of this process cannot grow beyond `size` bytes from now on."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_room() -> None:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)


def in_save(fill: Callable[[], None]) -> None:
    on_call(common.train.run, "save_state", 1, fill)


def in_publish(fill: Callable[[], None]) -> None:
    on_call(common.train.run.Run, "publish", 0, fill)


def in_log(fill: Callable[[], None]) -> None:
    on_call(common.train.log.Log, "log", 3, fill)


def cases() -> Iterator[tuple[Callable, Callable, int]]:
    yield from ((in_save, no_room, 2), (in_publish, no_room, 6))
    for size in (0, 3000):  # not even the first byte, and in the midst of a file
        yield from ((in_save, limit(size), 2), (in_publish, limit(size), 6))
    yield in_log, limit(0), 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(stage, setting, tmp_path):
    keys = setting(stage, lora_r=0 if stage == "pretrain" else 2)
    whole, _ = uninterrupted(tmp_path, stage, keys)
    for number, (place, fill, saved) in enumerate(cases()):
        if not FULL and stage != "sft" and number not in (2, 5):
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = keys | {"output_dir": str(folder / "cut")}
        ended = child(stage, cut, lambda p=place, f=fill: p(f))
        assert ended.code == 1, ended.err
        assert re.fullmatch(
            r"error: \S+: could not be (saved|written).* the same command goes on\n", ended.err
        ), ended.err
        state, loop = newest_state(Path(cut["output_dir"], "state"))
        assert loop["step"] >= saved
        assert not list(state.parent.glob("*.tmp"))
        ended = child(stage, cut)
        assert ended.code == 0 and f"going on from {state}" in ended.out, ended.err
        same(cut["output_dir"], whole)


def test_the_whole_program(setting, tmp_path):
    keys = setting("reward", output_dir=str(tmp_path / "cut"))
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(keys))
    command = [
        sys.executable,
        "-m",
        "stages.reward.train",
        "--config",
        str(tmp_path / "reward.yaml"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        preexec_fn=limit(50_000),
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: \S+/state/step-2: could not be saved: .*; nothing was saved before\. .*\n",
        done.stderr,
    )
