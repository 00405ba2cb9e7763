"""Whole runs of pretraining against the same runs written out in plain PyTorch, one row at a time:
whatever key does not get to the maths shows in the weights."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.rows.shards import Shards
from stages.pretrain import train
from stages.pretrain.train import Config, main
from tests import by_hand

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

LENGTH, STRIDE, EVAL_ROWS = 16, 6, 5


@pytest.fixture
def setting(tmp_path, shards, monkeypatch):
    """setting(**keys) -> (a Config, the list that will hold the model as it was at the start)."""
    starts, real = [], train.build_model

    def noted(*args):
        starts.append(copy.deepcopy(real(*args)))
        return copy.deepcopy(starts[-1])

    monkeypatch.setattr(train, "build_model", noted)

    def make(**keys) -> tuple[Config, list]:
        given = {
            "train_data": shards,
            "output_dir": str(tmp_path / "base"),
            "mixed_precision": "no",
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "max_length": LENGTH,
            "row_stride": STRIDE,
            "eval_rows": EVAL_ROWS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
        }
        return Config(**given | by_hand.KEYS | keys), starts

    return make


def log(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def mean_loss(model, rows: torch.Tensor, eot_id: int | None) -> torch.Tensor:
    """Over the last STRIDE tokens of each row; with eot_id a token sees its own document alone."""
    terms = []
    for row in rows.tolist():
        inner = range(1, LENGTH) if eot_id is not None else ()
        starts = [0, *(n for n in inner if row[n] == eot_id), LENGTH]
        parts = [
            by_hand.logprobs(model, row[start : end + 1])
            for start, end in itertools.pairwise(starts)
        ]
        terms.append(torch.cat(parts)[-STRIDE:])
    return -torch.cat(terms).mean()


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_whole_run_is_that_written_out_by_hand(setting, document_mask):
    cfg, starts = setting(document_mask=document_mask)
    main(cfg)
    eot_id = load_tokenizer(cfg.train_data).eot_id if document_mask else None
    stream = Shards(cfg.train_data, "train", LENGTH, STRIDE)
    updates = [stream.batch(by_hand.KEYS["seed"], 4 * step, 4) for step in range(4)]
    model, losses = copy.deepcopy(starts[0]), []

    def loss_of(rows):
        def loss(net):
            found = mean_loss(net, rows, eot_id)
            losses.append(float(found.detach()))
            return found

        return loss

    norms = by_hand.train(model, [loss_of(rows) for rows in updates])
    assert min(norms) > by_hand.KEYS["max_grad_norm"]  # it had something to clip
    said = log(cfg.output_dir)
    logged = [row for row in said if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-3)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=1e-3)
    assert by_hand.apart(model, cfg.output_dir, starts[0]) < 1e-3
    heldout = Shards(cfg.train_data, "eval", LENGTH, STRIDE)
    rows = torch.cat([heldout.batch(0, n, 1) for n in range(EVAL_ROWS)])
    with torch.no_grad():
        expected = [float(mean_loss(net, rows, eot_id)) for net in (starts[0], model)]
    evaluated = [row["eval_loss"] for row in said if "eval_loss" in row]
    assert evaluated == pytest.approx(expected, rel=1e-3)


def test_muon_gets_the_keys_of_the_config(setting, tmp_path, monkeypatch):
    """A step of AdamW's part is written out; of Muon's part the decay and the rate are seen alone:
    with a rate k times as large a matrix moves k times as far."""
    ends = {}
    for name, keys in {
        "plain": {},
        "rate": {"muon_learning_rate": 0.02},
        "decay": {"weight_decay": 0.0},
        "beta2": {"adam_beta2": 0.9},
    }.items():
        given = {"optimizer": "muon", "muon_learning_rate": 0.01, "max_steps": 2}
        given |= {"warmup_steps": 0, "lr_scheduler_type": "constant"}
        cfg, starts = setting(output_dir=str(tmp_path / name), **given | keys)
        main(cfg)
        ends[name] = load_model(cfg.output_dir).state_dict()
    start = starts[0].state_dict()
    assert all(torch.equal(weight, starts[-1].state_dict()[name]) for name, weight in start.items())
    matrix, table = "trunk.blocks.0.mlp.up.weight", "trunk.wte.weight"
    one, two = ((ends[name][matrix] - start[matrix]).norm() for name in ("plain", "rate"))
    assert 1.8 < float(two / one) < 2.2
    assert torch.equal(ends["plain"][table], ends["rate"][table]) is False  # it sees other states
    for name, changed in (("decay", {matrix, table}), ("beta2", {table})):
        for key in changed:
            assert float((ends[name][key] - ends["plain"][key]).abs().max()) > 1e-5, (name, key)
    lost = start[matrix] * (1 - (1 - 0.01 * 0.5) ** 2)  # by two steps of decay at the rate of Muon
    found = ends["decay"][matrix] - ends["plain"][matrix]
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), lost.flatten(), dim=0)
    assert float(cosine) > 0.9


def test_the_order_of_the_rows_follows_the_seed(setting, tmp_path):
    rows = []
    for seed in (3, 4):
        cfg, _ = setting(seed=seed, learning_rate=0.0, output_dir=str(tmp_path / f"{seed}"))
        read, real = [], Shards.batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Shards, "batch", lambda s, *at, r=read, f=real: (r.append(f(s, *at)), r[-1])[1]
            )
            main(cfg)
        rows.append([batch.tolist() for batch in read if len(batch) > 1])
    assert len(rows[0]) == 8 and rows[0] != rows[1]


def test_dropout_acts_in_training_alone(setting, tmp_path):
    """Also that of a parent; the evaluation before the first step leaves it on, and no evaluation
    sees it."""
    first, _ = setting(output_dir=str(tmp_path / "parent"))
    main(first)
    rows = {}
    for dropout in (0.0, 0.5):
        keys = {"dropout": dropout, "learning_rate": 0.0, "parent": first.output_dir}
        cfg, _ = setting(output_dir=str(tmp_path / f"{dropout}"), **keys)
        main(cfg)
        rows[dropout] = log(cfg.output_dir)
    evaluated = [[row["eval_loss"] for row in rows[d] if "eval_loss" in row] for d in rows]
    assert evaluated[0] == evaluated[1] and len(set(evaluated[0])) == 1
    trained = [[row["loss"] for row in rows[d] if "loss" in row] for d in rows]
    assert all(abs(a - b) > 1e-3 for a, b in zip(*trained, strict=True))


def test_initial_weights_follow_the_seed(setting):
    starts = []
    for seed in (3, 4):
        cfg, starts = setting(seed=seed, max_steps=1)
        main(cfg)
    assert not torch.equal(starts[0].trunk.wte.weight, starts[1].trunk.wte.weight)
