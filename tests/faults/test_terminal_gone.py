"""What happens around a run, in one process and in two: the terminal is closed, the reader of its
output goes, the disk behind its output is full, the launcher is killed. All is saved, and the same
command ends as if nothing had been. FAULTS=1 runs all 40 cases."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from children import FULL, STAGES, Child, Ended, on_call, result, run, same

import common.train.run
import stages.rl.rollout
from common.program.entry import guard
from common.program.lock import held
from common.train.interruption import Interruption
from common.train.resume import newest_state
from common.train.run import Run

# When it happens, of 7 steps; every second one is saved.
PLACES = {
    "pretrain": ("pretrain", (common.train.run, "update"), 3),
    "sft": ("sft", (common.train.run, "update"), 2),
    "reward": ("reward", (STAGES["reward"], "evaluate"), 1),
    "rl": ("rl", (common.train.run, "update"), 6),
    "rollout": ("rl", (stages.rl.rollout, "sample"), 3),
}
STOPPED = 5  # the step at which those are stopped that went on
Rank = Callable[[], Any]
WHOLE: dict[tuple[str, int], dict[str, Any]] = {}


def to_launcher(*kinds: int) -> Rank:
    """Signals to the launcher, by the first of its processes, which waits until it is told itself:
    all then stop at this step. Without a launcher signals to this process."""
    if "RANK" not in os.environ:
        return lambda: [os.kill(os.getpid(), kind) for kind in kinds]
    told: list[bool] = []
    on_call(Interruption, "handle", 0, lambda: told.append(True))

    def send() -> None:
        if os.environ["RANK"] != "0":
            return
        for kind in kinds:
            os.kill(os.getppid(), kind)
        while not told:
            time.sleep(0.01)

    return send


def lead_output_to(number: int) -> None:
    """stdout and stderr are this file from now on."""
    os.dup2(number, 1), os.dup2(number, 2)


def closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lead_output_to(writer)


def full_disk() -> None:
    lead_output_to(os.open("/dev/full", os.O_WRONLY))


def later(kind: int) -> None:
    on_call(Run, "checkpoint", STOPPED, to_launcher(kind))


def prepare(way: str, where: tuple[Any, str], number: int) -> None:
    """In the process that is hit: what will happen to it."""
    if way == "hangup":  # shell and kernel each send it
        on_call(*where, number, to_launcher(signal.SIGHUP, signal.SIGHUP))
    elif way == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        on_call(*where, number, lambda: os.kill(os.getpid(), signal.SIGHUP))
        later(signal.SIGTERM)
    elif way == "closed pipe":  # `| tee log`, then Ctrl-C: tee dies first
        on_call(*where, number, closed_pipe)
        later(signal.SIGINT)
    elif way == "full disk":
        on_call(*where, number, full_disk)
        later(signal.SIGTERM)
    elif way == "dead launcher":
        on_call(*where, number, to_launcher(signal.SIGKILL))


def launch(processes: int, work: Callable[[], None]) -> Ended:
    """work() in one process; or in two, by a launcher that hands signals on as torch's does."""
    if processes == 1:
        return Child(work).wait()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}

    def launcher() -> int:
        ranks = []
        for rank in ("0", "1"):
            ranks.append(os.fork())
            if not ranks[-1]:
                os.environ.update(world, RANK=rank, LOCAL_RANK=rank)
                guard(work)
                os._exit(0)
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(kind, lambda kind, _: [os.kill(rank, kind) for rank in ranks])
        return max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks)

    return Child(launcher).wait()  # the end of its output is that of the last process


def stage(name: str, keys: dict[str, Any], before: Rank = lambda: None) -> Callable[[], None]:
    def work() -> None:
        torch.set_num_threads(1)
        before()
        with held(keys["output_dir"]):
            run(name, keys)

    return work


@pytest.fixture
def whole(setting, tmp_path):
    """whole(stage, processes) -> the result of the run that nothing disturbs; made once."""

    def of(name: str, processes: int) -> dict[str, Any]:
        if (name, processes) not in WHOLE:
            keys = setting(name, output_dir=str(tmp_path / "whole"))
            ended = launch(processes, stage(name, keys))
            assert ended.code == 0, ended.err
            WHOLE[name, processes] = result(tmp_path / "whole")
        return WHOLE[name, processes]

    return of


WAYS = [("hangup", 1), ("closed pipe", 1), ("nohup", 1), ("full disk", 1)]
WAYS += [("hangup", 2), ("closed pipe", 2), ("nohup", 2), ("dead launcher", 2)]


@pytest.mark.parametrize(
    ("way", "processes", "place"),
    [
        (way, processes, place)
        for n, (way, processes) in enumerate(WAYS)
        for m, place in enumerate(PLACES)
        if FULL or n % len(PLACES) == m
    ],
)
def test_saved_and_resumed_to_the_bit(way, processes, place, setting, whole, tmp_path):
    name, where, number = PLACES[place]
    expected = whole(name, processes)
    cut = tmp_path / "cut"
    keys = setting(name, output_dir=str(cut))
    hit = stage(name, keys, lambda: prepare(way, where, number))
    ended = launch(processes, hit)
    assert ended.code == (-signal.SIGKILL if way == "dead launcher" else 75), ended
    assert "Traceback" not in ended.err
    step = newest_state(cut / "state").loop["step"]
    assert step == STOPPED or (way in ("hangup", "dead launcher") and 0 < step < 7)
    assert not (cut / ".lock").exists()
    ended = launch(processes, stage(name, keys))
    assert ended.code == 0 and f"step-{step}\n" in ended.out, ended
    same(cut, expected)
