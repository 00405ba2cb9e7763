"""The over-optimisation report on made-up samples whose gold turns, and does not turn."""

import json
import sys
import types

import pytest
import torch

from common.config.schema import load
from common.handoff.publish import publish
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.text.tokenizer import Tokenizer
from tools import overoptimise as overoptimise


@pytest.fixture(autouse=True)
def fake_gold(monkeypatch):
    """Gold is written in the answer."""
    module = types.ModuleType("fake_gold")

    def judge(prompt, answer, stopped):
        score = float(answer) if answer.replace(".", "").isdigit() else 0.0
        return types.SimpleNamespace(score=score, correct=score > 0.5, family=prompt.split()[0])

    module.judge = judge
    monkeypatch.setitem(sys.modules, "fake_gold", module)


def make_run(folder, golds, parent="base", **config):
    folder.mkdir()
    rows = [
        {
            "step": step,
            "prompt": f"{family} <b>{i}",
            "answer": f"{gold + 0.01 * (i % 3):.2f}",
            "score": step / 2 + 0.1 * i,
            "kl": float(step**2),
            "stopped": True,
        }
        for step, gold in enumerate(golds, 1)
        for i, family in enumerate(["sum", "fact"] * 4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "step": len(golds),
        "config": {"parent": str(parent), "reference": None, "reward_model": "rm"} | config,
    }
    (folder / "stage.json").write_text(json.dumps(stage))
    return str(folder)


def report(tmp_path, *runs, **keys):
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    out = tmp_path / "out"
    overoptimise.main(
        load(
            overoptimise.Config,
            ["--runs", *runs, "--output_dir", str(out), "--gold", "fake_gold", *words],
        )
    )
    return json.loads((out / "overoptimise.json").read_text()), json.loads(
        (out / "stage.json").read_text()
    )


RISE_AND_FALL = [0.3, 0.4, 0.6, 0.7, 0.5, 0.3, 0.1]


def test_gold_turns(tmp_path):
    result, stage = report(tmp_path, make_run(tmp_path / "rl", RISE_AND_FALL), window=2)
    points = result["ppo"]
    assert [(p["first_step"], p["last_step"]) for p in points] == [
        (1, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]  # the last one is whole
    assert points[1]["gold"]["mean"] == pytest.approx(
        (0.4 + 0.6) / 2 + 0.00875, abs=1e-6
    )  # i % 3 over 8 rows: 7/8
    assert points[1]["kl"] == (4 + 9) / 2 and points[1]["gold"]["n"] == 16
    assert points[1]["proxy"]["mean"] == pytest.approx((1 + 1.5) / 2 + 0.35, abs=1e-6)
    assert result["peak"] == points[2] and result["end"] == points[3]
    assert points[2]["correct"] == {
        "fact": 0.875,
        "sum": 0.75,
    }  # right above .5: all at .7; at .5 those with i % 3 > 0
    assert stage["gate"]["passed"] and "\n" not in stage["gate"]["text"]
    page = (tmp_path / "out" / "overoptimise.html").read_text()
    assert (
        'src="data:image/png;base64,' in page
        and "<b>" not in page
        and (tmp_path / "out" / "overoptimise.png").exists()
    )


@pytest.mark.heavy
@pytest.mark.parametrize("golds", [[0.1, 0.3, 0.5, 0.7], [0.7, 0.7, 0.7, 0.7]])
def test_gold_that_keeps_up_is_no_over_optimisation(tmp_path, golds):
    _, stage = report(tmp_path, make_run(tmp_path / "rl", golds), window=1)
    assert (
        not stage["gate"]["passed"]
        and "gold, its interval at the peak above that at the end is" in stage["gate"]["text"]
    )


def test_runs_that_go_on(tmp_path):
    first, then = (
        make_run(tmp_path / "a", [0.3, 0.6]),
        make_run(tmp_path / "b", [0.5, 0.1], parent=tmp_path / "a", reference="base"),
    )
    result, _ = report(tmp_path, first, then, window=1)
    assert [p["first_step"] for p in result["ppo"]] == [1, 2, 3, 4] and result[
        "reference"
    ] == "base"
    other = make_run(tmp_path / "c", [0.5], parent=tmp_path / "a")  # its KL is measured from a
    with pytest.raises(InputError, match="references differ"):
        report(tmp_path, first, other)


def test_errors(tmp_path):
    run = make_run(tmp_path / "rl", [0.5])
    (tmp_path / "rl" / "samples.jsonl").write_text('{"step": 1, "prompt": "sum", "sample": "x"}\n')
    with pytest.raises(InputError, match=r"samples.jsonl:1: answer is None"):
        report(tmp_path, run)
    with pytest.raises(InputError, match="no finished PPO run"):
        report(tmp_path, str(tmp_path))


@pytest.mark.parametrize("column", ["score", "kl", "step"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 10**400, True])
def test_what_is_no_number_is_named(tmp_path, column, value):
    run = make_run(tmp_path / "rl", [0.5])
    row = {"step": 1, "prompt": "sum", "answer": "1", "score": 0.0, "kl": 0.0, "stopped": True}
    (tmp_path / "rl" / "samples.jsonl").write_text(json.dumps(row | {column: value}))
    with pytest.raises(InputError, match=rf"samples.jsonl:1: {column} is .*a PPO run's samples"):
        report(tmp_path, run)


@pytest.mark.heavy
def test_best_of_n_beside_it(tmp_path):
    tokenizer = Tokenizer.train_bpe(["0.1 0.2 0.3 sum"], 262).with_chat()
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, max_length=32, n_layer=1, n_head=2, n_embd=16
    )
    torch.manual_seed(0)
    publish(tmp_path / "sft", GPT(config), tokenizer, {})
    publish(tmp_path / "rm", RewardModel(config), tokenizer, {})
    (tmp_path / "p.txt").write_text("sum 1\nsum 2\nsum 3\n")
    run = make_run(
        tmp_path / "rl", RISE_AND_FALL, parent=tmp_path / "sft", reward_model=str(tmp_path / "rm")
    )
    keys = {"prompts": tmp_path / "p.txt", "best_of": 8, "best_of_prompts": 2, "max_new_tokens": 5}
    result, _ = report(tmp_path, run, **keys)
    assert list(result["best_of_n"]) == ["1", "2", "4", "8"] and result["best_of_prompts"] == 2
    rewards = [row["reward"]["mean"] for row in result["best_of_n"].values()]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
