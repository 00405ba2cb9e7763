"""A loss, gradient, reward or KL that is not finite: no update is applied, and the error names
stage, step and batch."""

import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import FULL, STAGES, child, on_call, result, signal_self

import common.train.run
import stages.rl.rollout
from common.train.update import NonFiniteError

UPDATES = {"rl": 4}  # of a step
LOGGED = r"loss \[.*\]{where}, gradient norm {norm}; no update was applied"


def bad_loss(terms: torch.Tensor) -> torch.Tensor:
    return terms * math.nan


def bad_gradient(terms: torch.Tensor) -> torch.Tensor:
    """The loss is a number, its gradient is not."""
    terms.register_hook(lambda gradient: gradient * math.inf)
    return terms


KINDS = {
    bad_loss: LOGGED.format(where=" from micro-batch 0 of process 0", norm="nan"),
    bad_gradient: LOGGED.format(where="", norm="(nan|inf)"),
}


def spoil(change: Callable, numbers: set[int]) -> None:
    """In a child: the first micro-batch of these updates (from 0) is changed. Checks that a refused
    one changes nothing."""
    real, calls = common.train.run.update, []

    def update(
        accelerator: Any,
        model: torch.nn.Module,
        optimizer: Any,
        batches: Any,
        loss: Callable,
        *rest: Any,
    ) -> Any:
        calls.append(1)
        if len(calls) - 1 not in numbers:
            return real(accelerator, model, optimizer, batches, loss, *rest)

        def spoilt(batch: Any) -> torch.Tensor:
            return change(loss(batch)) if batch is batches[0] else loss(batch)

        before = things(model, optimizer)
        try:
            return real(accelerator, model, optimizer, batches, spoilt, *rest)
        except NonFiniteError:
            after = things(model, optimizer)
            assert len(before) == len(after) and all(map(torch.equal, before, after)), (
                "an update was applied"
            )
            raise

    common.train.run.update = update


def things(model: torch.nn.Module, optimizers: Any) -> list[torch.Tensor]:
    """All weights and moments."""
    moments = [
        value
        for optimizer in (optimizers if isinstance(optimizers, list) else [optimizers])
        for group in optimizer.state_dict()["state"].values()
        for value in group.values()
    ]
    return [torch.as_tensor(thing).detach().clone() for thing in [*model.parameters(), *moments]]


def losses_of(folder: Path) -> list[int]:
    """Steps of the lines that training wrote, evaluations aside."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row or "score" in row]


@pytest.mark.parametrize(
    ("stage", "kind"),
    [(s, k) for s in STAGES for k in KINDS if FULL or s in ("sft", "rl") or k == bad_loss],
)
def test_an_update(stage, kind, setting, tmp_path):
    """Bad ones in steps 3 and 5 of 7 (counted from 1; of PPO's four updates a step the second)."""
    keys, each = setting(stage, output_dir=str(tmp_path / "strict")), UPDATES.get(stage, 1)
    numbers = {step * each + (each > 1) for step in (2, 4)}
    ended = child(stage, keys, lambda: spoil(kind, numbers))
    assert ended.code == 1
    assert re.fullmatch(
        rf"error: {stage}, step 3: {KINDS[kind]}; max_skipped_batches is 0\n", ended.err
    ), ended.err
    assert losses_of(tmp_path / "strict") == [1, 2]
    lenient = keys | {"output_dir": str(tmp_path / "lenient"), "max_skipped_batches": 2}
    ended = child(stage, lenient, lambda: spoil(kind, numbers))
    assert ended.code == 0, ended.err
    said = [line for line in ended.out.splitlines() if "left out" in line and "no update" in line]
    assert len(said) == 2
    for n, (line, step) in enumerate(zip(said, (3, 5), strict=True), 1):
        assert re.fullmatch(
            rf"{stage}, step {step}: {KINDS[kind]}; left out \({n} of at most 2\)", line
        )
    # PPO's step has other updates, whose means its line gives; elsewhere a step without an update
    # has no line.
    assert losses_of(tmp_path / "lenient") == (
        [1, 2, 3, 4, 5, 6, 7] if each > 1 else [1, 2, 4, 6, 7]
    )
    assert json.loads((tmp_path / "lenient" / "stage.json").read_text())["skipped_batches"] == 2
    ended = child(
        stage,
        lenient | {"output_dir": str(tmp_path / "three")},
        lambda: spoil(kind, numbers | {6 * each}),
    )
    assert ended.code == 1
    assert re.fullmatch(
        rf"error: {stage}, step 7: {KINDS[kind]}; max_skipped_batches is 2\n", ended.err
    ), ended.err


@pytest.mark.parametrize("field", ["scores_B", "ref_logprobs_BT", "values_BT"])
def test_a_rollout(field, setting, tmp_path):
    """Reward, KL or value is not a number in the third rollout: nothing is learned from it."""

    def spoil_rollout() -> None:
        real, calls = stages.rl.rollout.evaluate, []

        def evaluate(*args: Any) -> Any:
            calls.append(1)
            found = real(*args)
            if len(calls) == 3:
                getattr(found, field)[0] = math.nan
            return found

        stages.rl.rollout.evaluate = evaluate

    keys = setting("rl", output_dir=str(tmp_path / "strict"))
    line = r"rl, step 3: rollout statistics \{.*nan.*\}; no update was applied; "
    ended = child("rl", keys, spoil_rollout)
    assert ended.code == 1 and re.fullmatch(
        f"error: {line}max_skipped_batches is 0\n", ended.err
    ), ended.err
    ended = child(
        "rl",
        keys | {"output_dir": str(tmp_path / "lenient"), "max_skipped_batches": 1},
        spoil_rollout,
    )
    assert ended.code == 0 and re.search(line + r"left out \(1 of at most 1\)", ended.out), (
        ended.err
    )
    assert losses_of(tmp_path / "lenient") == [1, 2, 4, 5, 6, 7]


def test_no_rollout_is_left(setting, tmp_path):
    keys = setting("rl", output_dir=str(tmp_path / "rl"), max_steps=2, max_skipped_batches=2)

    def all_bad() -> None:
        real = stages.rl.rollout.evaluate
        stages.rl.rollout.evaluate = lambda *args: real(*args)._replace(
            scores_B=torch.tensor([math.nan] * 8)
        )

    ended = child("rl", keys, all_bad)
    assert ended.code == 1 and ended.err.startswith(
        "error: rl: all 2 rollouts were left out as not finite"
    ), ended.err


@pytest.mark.parametrize("stage", STAGES)
def test_a_resume_remembers_what_was_left_out(stage, setting, tmp_path):
    """One bad update before the interruption, two after it: the third is one too many. With one
    after it: as uninterrupted."""
    each = UPDATES.get(stage, 1)
    keys = setting(stage, output_dir=str(tmp_path / "cut"), max_skipped_batches=2)

    def stop() -> None:
        spoil(bad_loss, {each})
        on_call(common.train.run, "update", 3 * each, signal_self(signal.SIGTERM))

    assert child(stage, keys, stop).code == 75
    assert (
        child(
            stage,
            keys | {"output_dir": str(tmp_path / "whole")},
            lambda: spoil(bad_loss, {each, 5 * each}),
        ).code
        == 0
    )
    three = child(stage, keys, lambda: spoil(bad_loss, {each, 2 * each}))
    assert three.code == 1 and f"error: {stage}, step 7: " in three.err, three.err
    ended = child(stage, keys | {"max_skipped_batches": 2}, lambda: None)
    assert ended.code == 0, ended.err
    assert result(tmp_path / "cut")["stage"]["skipped_batches"] == 2
