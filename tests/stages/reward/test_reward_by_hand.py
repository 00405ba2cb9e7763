"""Whole runs of the reward stage against the same runs written out in plain PyTorch, one unpadded
answer at a time: whatever key does not get to the maths shows in the weights."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from common.handoff.publish import load_model
from common.rows.batches import Order
from common.text.chat import prompt_ids
from stages.reward import train
from stages.reward.train import Config, main
from tests import by_hand

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ANSWERS = ["The river is cold.", "It is a good day.", "no", "No fox is blue."]
RANKS = [[0, 1, 2], [1, 0, 1], [2, 0, 1]]  # of three answers each; the second has a tie
PROMPTS = 14


def rows() -> list[dict]:
    return [
        {
            "prompt": f"Hi {n}",
            "answers": [ANSWERS[(n + k) % 4] for k in range(3)],
            "ranks": RANKS[n % 3],
            "sources": ["reference", "policy", "policy"],
        }
        for n in range(PROMPTS)
    ]


@pytest.fixture
def setting(tmp_path, tiny_gpt, stage_dir, monkeypatch):
    """setting(**keys) -> (a Config, the list that will hold the model as it was at the start)."""
    file = tmp_path / "comparisons.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    starts, real = [], train.new_reward_model

    def noted(cfg):
        model, tokenizer = real(cfg)
        starts.append(copy.deepcopy(model))
        return model, tokenizer

    monkeypatch.setattr(train, "new_reward_model", noted)

    def make(**keys) -> tuple[Config, list]:
        given = {
            "parent": stage_dir(tiny_gpt(seed=1)),
            "train_data": str(file),
            "output_dir": str(tmp_path / "reward"),
            "mixed_precision": "no",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_length": 60,
            "eval_fraction": 0.3,
            "logging_steps": 1,
        }
        return Config(**given | by_hand.KEYS | keys), starts

    return make


def log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def ids_of(tokenizer, row: dict) -> list[list[int]]:
    start = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
    return [[*start, *tokenizer.encode(text), tokenizer.eot_id] for text in row["answers"]]


def scores(model, tokenizer, row: dict) -> list:
    return [model.values(torch.tensor([ids]))[0, -1] for ids in ids_of(tokenizer, row)]


def loss_by_hand(model, tokenizer, chosen: list[dict], margin: float, centering: float):
    """Mean over prompts of the mean over a prompt's pairs."""
    means = []
    for row in chosen:
        s, ranks, terms = scores(model, tokenizer, row), row["ranks"], []
        for better in range(3):
            for worse in range(3):
                if ranks[better] < ranks[worse]:
                    gap, total = s[better] - s[worse] - margin, s[better] + s[worse]
                    terms.append(torch.log1p(torch.exp(-gap)) + centering * total**2)
        means.append(sum(terms) / len(terms))
    return sum(means) / len(means)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_whole_run_is_that_written_out_by_hand(setting, tokenizer, normalize):
    margin, centering = 0.8, 0.3
    cfg, starts = setting(margin=margin, centering=centering, normalize=normalize)
    main(cfg)
    heldout = 4  # .3 of 14 prompts
    training = rows()[: PROMPTS - heldout]
    lengths = [max(map(len, ids_of(tokenizer, row))) for row in training]
    order = Order(lengths, 4, by_hand.KEYS["seed"])  # 2 x 2 prompts an update
    chosen = [[training[n] for n in order.rows(step)] for step in range(4)]
    model, losses = copy.deepcopy(starts[0]), []

    def loss_of(part):
        def loss(net):
            found = loss_by_hand(net, tokenizer, part, margin, centering)
            losses.append(float(found.detach()))
            return found

        return loss

    norms = by_hand.train(model, [loss_of(part) for part in chosen])
    assert min(norms) > by_hand.KEYS["max_grad_norm"]  # it had something to clip
    logged = [row for row in log(cfg.output_dir) if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-3)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-3)
    rates = [by_hand.KEYS["learning_rate"] * factor for factor in by_hand.FACTORS]
    assert [row["lr"] for row in logged] == pytest.approx(rates)

    with torch.no_grad():  # 0 is the mean of the SFT model's own answers, in training
        own = [float(s) for row in training for s in scores(model, tokenizer, row)[1:]]
    mean = sum(own) / len(own)
    std = math.sqrt(sum((s - mean) ** 2 for s in own) / len(own))
    assert abs(std - 1) > 0.05
    with torch.no_grad():
        model.score.weight /= std if normalize else 1.0
        expected = mean / std if normalize else mean
    found = load_model(cfg.output_dir, "reward")
    assert by_hand.apart(model, cfg.output_dir, starts[0]) < 1e-3
    assert float(found.shift) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_order_of_the_comparisons_follows_the_seed(setting, tmp_path):
    logged = []
    for seed in (3, 4):
        cfg, starts = setting(seed=seed, learning_rate=0.0, output_dir=str(tmp_path / f"{seed}"))
        main(cfg)
        logged.append(log(cfg.output_dir))
    assert not torch.equal(starts[0].score.weight, starts[1].score.weight)
    assert logged[0][0]["loss"] != logged[1][0]["loss"]


@pytest.mark.parametrize("alpha", [5.0, 40.0])
def test_lora_keys_get_to_the_adapters(setting, monkeypatch, alpha):
    """From weights that are given to the adapters, what is published is W + alpha / r B A, in the
    chosen layers only."""
    real = train.add_lora

    def filled(model, *given):
        real(model, *given)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.constant_(parameter, 0.1)

    monkeypatch.setattr(train, "add_lora", filled)
    lora = {"lora_r": 2, "lora_alpha": alpha, "lora_targets": ["down"]}
    cfg, starts = setting(learning_rate=0.0, max_steps=1, normalize=False, **lora)
    main(cfg)
    after = load_model(cfg.output_dir, "reward").state_dict()
    for name, weight in starts[0].state_dict().items():
        name = name.replace(".base_layer", "")
        if name != "shift" and "lora_" not in name:
            added = alpha / 2 * 2 * 0.1**2 if name.endswith("down.weight") else 0.0
            torch.testing.assert_close(after[name] - weight, torch.full_like(weight, added))


@pytest.mark.parametrize(("mean", "half", "passed"), [(0.6, 0.05, True), (0.6, 0.15, False)])
def test_the_gate_wants_more_than_chance(mean, half, passed):
    gate = train.gate_of(mean, half, 40, "SFT answers", -1.5)
    assert gate.passed == passed
    assert f"{mean:.1%} +- {half:.1%} of 40 held-out pairs" in gate.text
