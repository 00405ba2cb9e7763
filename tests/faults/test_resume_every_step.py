"""Told to stop in each step of a run, it ends as one that nobody told: weights, optimizer,
generators, log, figures."""

import signal
from pathlib import Path

import pytest
from children import FULL, STAGES, child, on_call, same, signal_self, uninterrupted

import common.train.run

STEPS = 12
UPDATES = {"rl": 4}  # of a step, where it is more than one


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_every_step(stage, setting, tmp_path):
    keys = setting(stage, max_steps=STEPS, save_steps=None)
    whole, _ = uninterrupted(tmp_path, stage, keys)
    stops = range(STEPS) if FULL else (4, STEPS - 1)
    for step in stops:
        folder = tmp_path / str(step)
        folder.mkdir()
        cut = keys | {"output_dir": str(folder / "cut")}
        number, kind = step * UPDATES.get(stage, 1), signal.SIGINT if step % 2 else signal.SIGTERM
        ended = child(
            stage,
            cut,
            lambda n=number, k=kind: on_call(common.train.run, "update", n, signal_self(k)),
        )
        assert ended.code == 75, ended.err
        assert sorted(path.name for path in Path(cut["output_dir"], "state").iterdir()) == [
            f"step-{step + 1}"
        ]
        ended = child(stage, cut)
        assert ended.code == 0, ended.err
        assert f"{stage}: going on from" in ended.out
        same(cut["output_dir"], whole)
