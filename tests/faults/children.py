"""Runs that are killed: children forked from this process, which has everything imported, and what
they leave behind."""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.state import AcceleratorState

from common.program.entry import guard
from common.train.resume import generators, save_state
from common.train.run import Run
from stages.pretrain import train as pretrain
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft

FULL = bool(os.environ.get("FAULTS"))  # the whole sweeps, of which a normal run takes a sample
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "rl": rl}
CLOCK = {
    "tokens/s",
    "mfu",
    "seconds_sampling",
    "seconds_scoring",
    "seconds_training",
}  # what no seed can repeat
FORGET = Run.forget
UNINTERRUPTED: dict[str, tuple[dict[str, Any], float]] = {}
PIPE = 1 << 20  # bytes that a child can say before it has to wait


class Ended(NamedTuple):
    code: int  # exit code, or minus the signal
    out: str
    err: str


def run(stage: str, keys: dict[str, Any]) -> None:
    AcceleratorState._reset_state(True)
    STAGES[stage].main(STAGES[stage].Config(**keys))


class Child:
    """work() as a program of its own, behind the same guard as a stage."""

    def __init__(self, work: Callable[..., Any], *args: Any) -> None:
        self.pipes = os.pipe(), os.pipe()  # no files, which a full disk would hit as well
        for _, end in self.pipes:
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE)
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            # As in a new process, whatever the one before it left.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.alarm(100)  # one that hangs ends
            for number, (_, end) in enumerate(self.pipes, 1):
                os.dup2(end, number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            # pytest's own keeps them to itself.
            warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
            Run.forget = keep_the_end
            code = 0
            try:
                guard(lambda: work(*args))
            except SystemExit as end:
                code = end.code
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(70)

    def kill(self, kind: int = signal.SIGKILL) -> None:
        os.kill(self.pid, kind)

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        said = []
        for start, end in self.pipes:
            os.close(end)
            with os.fdopen(start) as pipe:
                said.append(pipe.read())
        return Ended(code, *said)


def keep_the_end(run: Run) -> None:
    """In place of Run.forget: optimizer and generators of a finished run, too, can be compared, in
    a folder of their own."""
    module, optimizer, _ = run.training
    loop, random = {"step": 10**9, "logs": {}}, generators(run.device)
    save_state(run.accelerator, module, optimizer, run.folder / "end", loop, random, keep=1)
    FORGET(run)


def child(stage: str, keys: dict[str, Any], before: Callable[[], Any] = lambda: None) -> Ended:
    """A run of the stage to its end in a process of its own; `before` may break something in
    there."""

    def work() -> None:
        before()
        run(stage, keys)

    return Child(work).wait()


def result(folder: str | Path) -> dict[str, Any]:
    """sha256 of weights, optimizer moments and generators at the end; log lines without their
    clock; stage.json's figures."""
    folder, found = Path(folder), {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [
                {key: value for key, value in row.items() if key not in CLOCK} for row in rows
            ]
    stage = json.loads((folder / "stage.json").read_text())
    found["stage"] = {
        key: stage.get(key)
        for key in ("step", "gate", "accuracy", "tokens_seen", "episodes", "skipped_batches")
    }
    found["last"] = {key: value for key, value in stage["metrics"].items() if key not in CLOCK}
    return found


def same(folder: str | Path, whole: dict[str, Any]) -> None:
    """The run in `folder` ended as the one whose `result` is `whole`."""
    got = result(folder)
    assert got.keys() == whole.keys()
    for name in whole:
        assert got[name] == whole[name], f"{folder}: {name}"


def uninterrupted(folder: Path, stage: str, keys: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """(result, seconds) of the same run that nothing disturbs; made once, as no path is part of
    it."""
    same_run = json.dumps(
        [stage, *((key, value) for key, value in sorted(keys.items()) if "/" not in str(value))]
    )
    if same_run in UNINTERRUPTED:
        return UNINTERRUPTED[same_run]
    run(
        stage, keys | {"output_dir": str(folder / "warm"), "max_steps": 1}
    )  # what is imported on the way, children need not
    started = time.monotonic()
    ended = child(stage, keys | {"output_dir": str(folder / "whole")})
    assert ended.code == 0, ended.err
    found = result(folder / "whole")
    assert any("moments" in name for name in found)
    UNINTERRUPTED[same_run] = found, time.monotonic() - started
    return UNINTERRUPTED[same_run]


def on_call(owner: Any, name: str, number: int, act: Callable[[], Any]) -> None:
    """In this process: act() right before call `number` (from 0) of owner.name. For children, which
    take it with them."""
    real, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number + 1:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def signal_self(*kinds: int) -> Callable[[], None]:
    return lambda: [os.kill(os.getpid(), kind) for kind in kinds] and None
