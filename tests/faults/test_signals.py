"""A signal anywhere: saved as of the start of the step, exit code 75, and the same command ends as
if nothing had been."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from children import FULL, STAGES, child, on_call, same, signal_self, uninterrupted

import common.train.resume
import common.train.run
import stages.rl.rollout
from common.program.files import verify
from common.train.resume import newest_state

TERM, INT = signal.SIGTERM, signal.SIGINT
# name: (stage, what is called there, which call of it, saved step then). Steps are saved every 2 of
# 7, evaluated every 3.
PLACES = {
    "update": ("sft", (common.train.run, "update"), 2, 3),
    "last update": ("rl", (common.train.run, "update"), 4 * 7 - 1, 7),
    "rollout": ("rl", (stages.rl.rollout, "sample"), 3, 3),
    "scoring": ("rl", (stages.rl.rollout, "evaluate"), 3, 3),
    "evaluation in pretrain": ("pretrain", (STAGES["pretrain"], "evaluate"), 1, 3),
    "evaluation in sft": ("sft", (STAGES["sft"], "evaluate"), 1, 3),
    "evaluation in reward": ("reward", (STAGES["reward"], "evaluate"), 1, 6),
    "last evaluation": ("reward", (STAGES["reward"], "evaluate"), 3, 7),
    "save": ("sft", (common.train.resume, "save_file"), 4, 4),
    "between saves": ("reward", (common.train.run.Run, "checkpoint"), 3, 3),
}
BEFORE = {  # where nothing has begun: nothing is saved
    "tokenising in sft": ("sft", (STAGES["sft"], "parse")),
    "tokenising in reward": ("reward", (STAGES["reward"], "ranked")),
    "tokenising in rl": ("rl", (STAGES["rl"], "parse")),
    "loading": ("pretrain", (STAGES["pretrain"], "load_tokenizer")),
    "preparing": ("pretrain", (common.train.run.Run, "prepare")),
}


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (p, k)
        for n, p in enumerate(PLACES)
        for m, k in enumerate((TERM, INT))
        if FULL or (n + m) % 2
    ],
)
def test_one_signal(place, kind, setting, tmp_path):
    stage, where, number, step = PLACES[place]
    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    whole, _ = uninterrupted(tmp_path, stage, keys)
    ended = child(stage, keys, lambda: on_call(*where, number, signal_self(kind)))
    assert ended.code == 75, ended
    assert re.fullmatch(
        rf"interrupted: {stage} after step {step}, saved in \S+; the same command .*\n", ended.err
    )
    assert newest_state(tmp_path / "cut" / "state")[1]["step"] == step
    ended = child(stage, keys)
    assert ended.code == 0 and f"step-{step}\n" in ended.out, ended.err
    same(tmp_path / "cut", whole)


@pytest.mark.parametrize("place", BEFORE)
def test_a_signal_before_the_loop(place, setting, tmp_path):
    """In a new run, and in one that goes on, whose state stays as it is."""
    stage, where = BEFORE[place]
    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    stop = lambda: on_call(*where, 0, signal_self(TERM))  # noqa: E731
    ended = child(stage, keys, stop)
    assert (
        ended.code == 75
        and ended.err == f"interrupted: {stage}, not begun; the same command starts it\n"
    ), ended
    assert not (tmp_path / "cut" / "state").exists()
    child(stage, keys, lambda: on_call(common.train.run, "save_state", 2, lambda: os._exit(9)))
    before = contents(tmp_path / "cut")
    assert (tmp_path / "cut" / "state" / "step-4").exists()
    assert child(stage, keys, stop).code == 75
    assert contents(tmp_path / "cut") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_signal_while_it_publishes(stage, setting, tmp_path):
    """All training is done: it ends as if nothing had been."""
    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    whole, _ = uninterrupted(tmp_path, stage, keys)
    for name, number in (("publish", 0), ("whole", 0)):
        ended = child(
            stage, keys, lambda n=name, k=number: on_call(common.train.run, n, k, signal_self(TERM))
        )
        assert ended.code == 0, ended.err
        verify(tmp_path / "cut")
        same(tmp_path / "cut", whole)
        assert not (tmp_path / "cut" / "state").exists()


def hang_in_save(*kinds: int) -> Callable[[], None]:
    """Signals between two files of the save of step 4; the save is long, as the next file is never
    written."""
    return lambda: on_call(
        common.train.resume,
        "save_file",
        4,
        lambda: [os.kill(os.getpid(), kind) for kind in kinds] and wait(),
    )


def wait() -> None:
    while True:
        signal.pause()


@pytest.mark.parametrize("stage", STAGES if FULL else ["sft"])
@pytest.mark.parametrize(
    ("kinds", "code"),
    [((TERM, TERM), -TERM), ((INT, INT), 130), ((INT, TERM), -TERM), ((TERM, INT), 130)],
)
def test_a_second_signal_ends_it_at_once(stage, kinds, code, setting, tmp_path):
    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    whole, _ = uninterrupted(tmp_path, stage, keys)
    ended = child(stage, keys, hang_in_save(*kinds))
    assert ended.code == code and "Traceback" not in ended.err
    assert newest_state(tmp_path / "cut" / "state")[1]["step"] == 2
    ended = child(stage, keys, lambda: on_call(common.train.run, "update", 3, signal_self(*kinds)))
    assert ended.code == code and "Traceback" not in ended.err
    ended = child(stage, keys)
    assert ended.code == 0 and "going on from" in ended.out, ended.err
    same(tmp_path / "cut", whole)
