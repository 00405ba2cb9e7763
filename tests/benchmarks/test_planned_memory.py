"""The benchmark of the planner's memory: its parts, and two runs of it."""

import json
import sys

import pytest

from benchmarks import plan
from benchmarks.workload import letters
from stages.sft import train as sft

CASES = {case.name: case for case in plan.CASES}


@pytest.fixture
def small(monkeypatch):
    """Models that are written at once."""
    monkeypatch.setattr(plan, "SHAPE", {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_inner": 32})


def test_rows_are_as_long_as_the_plan_takes_them(small, tmp_path):
    """Every row of finetuning is cut at max_length, which its plan rests on."""
    keys = plan.settings(CASES["sft"], tmp_path)
    tokenizer = letters(plan.VOCABULARY)
    for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()):
        ids, _ = sft.parse(tokenizer, row)
        assert len(ids) > keys["max_length"]


@pytest.mark.parametrize("name", ["pretrain gpt2", "sft zero2", "reward zero3", "rl zero3"])
def test_what_is_run_can_be_planned(name, small, tmp_path):
    case = CASES[name]
    config = tmp_path / f"{case.stage}.yaml"
    config.write_text(json.dumps(plan.settings(case, tmp_path) | {"output_dir": "out"}))
    assert 1e6 < plan.planned(case, config) < 1e8
    words = plan.command(case, tmp_path / "grown", config)
    assert words[-2:] == ["--config", str(config)]
    assert ("launch" in words) == (case.place is not None)


def test_a_line_for_each_run(monkeypatch, capsys):
    monkeypatch.setattr(plan, "measure", lambda case, folder: plan.Measured(2e9, 1.9e9))
    plan.main(["sft", "rl zero3"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["run", "grown", "GB", "planned", "GB", "planned/grown"]
    assert [line.split() for line in lines] == [
        ["sft", "2.00", "1.90", "0.95"],
        ["rl", "zero3", "2.00", "1.90", "0.95"],
    ]


def test_a_run_that_is_none_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        plan.main(["sfd"])
    assert "'sfd' is no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["sft lora", "reward zero3"])
def test_the_plan_is_within_15_percent_of_a_real_run(name, tmp_path):
    found = plan.measure(CASES[name], tmp_path)
    assert found.grown > 1e9 and found.planned == pytest.approx(found.grown, rel=0.15)
