"""Whole runs of the SFT stage against the same runs written out in plain PyTorch, one unpadded row
at a time: whatever key does not get to the maths shows in the weights."""

import copy
import json
from pathlib import Path

import pytest
import torch

from common.handoff.publish import load_model
from common.rows.batches import Order
from common.text.chat import prompt_ids
from stages.sft import train
from stages.sft.train import Config, main
from tests import by_hand

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ANSWERS = ["The fox is an animal.", "Five.", "In the old town, by the river.", "ok"]
ROWS = [{"prompt": f"Say {n}?", "completion": ANSWERS[n % 4]} for n in range(14)]
HELD_OUT = 4  # .3 of the prompts


@pytest.fixture
def setting(tmp_path, tiny_gpt, stage_dir):
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parent = stage_dir(tiny_gpt(seed=1))

    def make(**keys) -> Config:
        given = {
            "parent": parent,
            "train_data": str(file),
            "output_dir": str(tmp_path / "sft"),
            "mixed_precision": "no",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_length": 20,
            "eval_fraction": 0.3,
            "logging_steps": 1,
            "samples": 0,
        }
        return Config(**given | by_hand.KEYS | keys)

    return make


def log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def example(tokenizer, row: dict, limit: int) -> tuple[list[int], int]:
    """(ids of a row, where its answer begins)."""
    start = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
    return [*start, *tokenizer.encode(row["completion"]), tokenizer.eot_id][:limit], len(start)


def mean_loss(model, examples) -> torch.Tensor:
    """Over the answers' tokens of all examples."""
    return -torch.cat([by_hand.logprobs(model, ids)[at - 1 :] for ids, at in examples]).mean()


def test_a_whole_run_is_that_written_out_by_hand(setting, tokenizer):
    cfg = setting()
    main(cfg)
    every = [example(tokenizer, row, cfg.max_length) for row in ROWS]
    assert max(len(ids) for ids, _ in every) == cfg.max_length  # some are cut
    training, heldout = every[:-HELD_OUT], every[-HELD_OUT:]
    order = Order([len(ids) for ids, _ in training], 4, by_hand.KEYS["seed"])
    chosen = [[training[n] for n in order.rows(step)] for step in range(4)]
    model, start, losses = load_model(cfg.parent), load_model(cfg.parent), []

    def loss_of(part):
        def loss(net):
            found = mean_loss(net, part)
            losses.append(float(found.detach()))
            return found

        return loss

    norms = by_hand.train(model, [loss_of(part) for part in chosen])
    assert min(norms) > by_hand.KEYS["max_grad_norm"]  # it had something to clip
    said = log(cfg.output_dir)
    logged = [row for row in said if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-3)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-3)
    assert by_hand.apart(model, cfg.output_dir, start) < 1e-3
    with torch.no_grad():
        expected = [float(mean_loss(net, heldout)) for net in (start, model)]
    evaluated = [row["eval_loss"] for row in said if "eval_loss" in row]
    assert evaluated == pytest.approx(expected, rel=1e-3)


def test_the_order_of_the_rows_follows_the_seed(setting, tmp_path):
    losses = []
    for seed in (3, 4):
        cfg = setting(seed=seed, learning_rate=0.0, output_dir=str(tmp_path / f"{seed}"))
        main(cfg)
        losses.append([row["loss"] for row in log(cfg.output_dir) if "loss" in row])
    assert losses[0] != losses[1]


def test_gradients_are_clipped_to_the_norm_of_the_config(setting, tmp_path, monkeypatch):
    """With plain descent in AdamW's place the length of a step is that of the clipped gradient."""
    lengths = []
    for norm in (0.05, 0.1, 1e9):
        monkeypatch.setattr(train, "adamw_for", lambda cfg, model: descent(model))
        keys = {"max_grad_norm": norm, "max_steps": 1, "learning_rate": 1.0, "warmup_steps": 0}
        cfg = setting(output_dir=str(tmp_path / f"{norm}"), **keys)
        main(cfg)
        lengths.append(by_hand.distance(load_model(cfg.parent), load_model(cfg.output_dir)))
    (said,) = (row["grad_norm"] for row in log(cfg.output_dir) if "grad_norm" in row)
    assert said > 0.2
    assert lengths == pytest.approx([0.05, 0.1, said], rel=1e-2)


def descent(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.param_groups[0]["peak_lr"] = 1.0
    return optimizer


def test_dropout_acts_in_training_alone(setting, tmp_path):
    """The evaluation before the first step leaves it on; no evaluation sees it."""
    rows = {}
    for dropout in (0.0, 0.5):
        cfg = setting(dropout=dropout, learning_rate=0.0, output_dir=str(tmp_path / f"{dropout}"))
        main(cfg)
        rows[dropout] = log(cfg.output_dir)
    evaluated = [[row["eval_loss"] for row in rows[d] if "eval_loss" in row] for d in rows]
    assert evaluated[0] == evaluated[1] and len(set(evaluated[0])) == 1
    trained = [[row["loss"] for row in rows[d] if "loss" in row] for d in rows]
    assert all(abs(a - b) > 1e-3 for a, b in zip(*trained, strict=True))


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
    cfg = setting(learning_rate=0.0, max_steps=1, **lora)
    main(cfg)
    before, after = load_model(cfg.parent).state_dict(), load_model(cfg.output_dir).state_dict()
    for name, weight in before.items():
        added = alpha / 2 * 2 * 0.1**2 if name.endswith("down.weight") else 0.0
        torch.testing.assert_close(after[name] - weight, torch.full_like(weight, added))


def test_the_gate_wants_a_lower_loss():
    for initial, final, passed in ((2.0, 1.9, True), (2.0, 2.1, False), (2.0, 2.0, False)):
        found = train.Heldout(final, stop=1.0)
        assert train.gate_of(initial, found, 0, None, 4).passed == passed


def test_an_answer_that_does_not_stop_is_not_exact(tiny_gpt, tokenizer, monkeypatch):
    from common.model.sample import Sample
    from common.rows.sources import Row

    said = [("Yes", True), ("Yes", False), ("Yes!", True)]
    answers = [Sample(tokenizer.encode(text), [], stopped) for text, stopped in said]
    monkeypatch.setattr(train, "sample", lambda *args, **keys: copy.copy(answers))
    rows = [Row({"prompt": f"{n}?", "completion": "Yes"}, f"x:{n}") for n in range(3)]
    match = train.exact_match(tiny_gpt(), tokenizer, rows, 5)
    assert match.share == pytest.approx(1 / 3)
    assert [mistake["prompt"] for mistake in match.mistakes] == ["1?", "2?"]
