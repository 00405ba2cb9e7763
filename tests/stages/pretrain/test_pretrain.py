"""The pretraining stage on a toy corpus: the loss falls, the same seed gives the same bytes."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.presets import new_model
from common.program.errors import InputError
from common.rows.shards import Shards
from common.train.run import Run
from stages.pretrain import prepare
from stages.pretrain.mfu import Hardware
from stages.pretrain.train import Config, evaluate, main, next_token_loss

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    with (folder / "documents.jsonl").open("w") as file:
        for n in range(300):
            file.write(
                json.dumps(
                    {"text": f"The fox number {n % 10} met the bird number {n % 7} by the river."}
                )
                + "\n"
            )
    cfg = prepare.Config(
        train_data=[str(folder / "documents.jsonl")],
        output_dir=str(folder / "shards"),
        vocab_size=290,
        eval_fraction=0.1,
    )
    prepare.main(cfg)
    return cfg.output_dir


@pytest.fixture
def setting(tmp_path, shards):
    def make(**keys) -> Config:
        defaults = {
            "train_data": shards,
            "output_dir": str(tmp_path / "base"),
            "mixed_precision": "no",
            "max_steps": 30,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "max_length": 32,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "adam_beta2": 0.95,
            "logging_steps": 10,
            "eval_rows": 16,
        }
        return Config(**defaults | keys)

    return make


def log(cfg: Config, name: str = "metrics") -> list[dict]:
    return [
        json.loads(line) for line in Path(cfg.output_dir, f"{name}.jsonl").read_text().splitlines()
    ]


def weights(cfg: Config) -> bytes:
    return Path(cfg.output_dir, "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [("llama", "adamw"), ("llama", "muon"), ("gpt2", "adamw"), ("gpt2", "muon")],
)
def test_the_loss_falls(setting, family, optimizer, capsys):
    cfg = setting(
        family=family,
        optimizer=optimizer,
        eval_steps=15,
        sample_prompts=["The fox"],
        sample_tokens=5,
    )
    main(cfg)
    rows = log(cfg)
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(losses) == 3  # before, half-way, at the end
    assert losses[0] == pytest.approx(math.log(290), abs=0.3)  # nothing known yet: uniform
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 2.5
    training = [row["loss"] for row in rows if "loss" in row]
    assert training[-1] < training[0]
    assert all(
        {"grad_norm", "lr", "tokens/s", "mfu"} <= row.keys() for row in rows if "loss" in row
    )
    assert [row["prompt"] for row in log(cfg, "samples")] == ["The fox", "The fox"]
    assert "gate pretrain: PASS" in capsys.readouterr().out
    stage = json.loads(Path(cfg.output_dir, "stage.json").read_text())
    assert stage["tokens_seen"] == 30 * 8 * 32
    assert stage["parameters"] == sum(p.numel() for p in load_model(cfg.output_dir).parameters())
    assert stage["config"]["optimizer"] == optimizer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_same_seed_same_bytes(setting, tmp_path, optimizer):
    runs = [
        setting(
            output_dir=str(tmp_path / name),
            seed=seed,
            optimizer=optimizer,
            max_steps=8,
            dropout=0.1,
        )
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    for cfg in runs:
        main(cfg)
    assert weights(runs[0]) == weights(runs[1])
    assert weights(runs[0]) != weights(runs[2])


def test_accumulation_changes_nothing_but_memory(setting, tmp_path):
    runs = [
        setting(
            output_dir=str(tmp_path / f"{micro}"),
            per_device_train_batch_size=micro,
            max_steps=3,
            learning_rate=1e-3,
            gradient_accumulation_steps=8 // micro,
            logging_steps=1,
        )
        for micro in (8, 2)
    ]
    for cfg in runs:
        main(cfg)
    numbers = [
        [row[key] for row in log(cfg) if "loss" in row for key in ("loss", "grad_norm")]
        for cfg in runs
    ]
    assert len(numbers[0]) == 6
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert numbers[0][0] == pytest.approx(math.log(290), abs=0.3)
    whole, parts = (load_file(f"{cfg.output_dir}/model.safetensors") for cfg in runs)
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 2e-5


def test_losses_equal_brute_force(setting, shards, tiny_gpt):
    model = tiny_gpt(vocab_size=290)
    cfg = setting()
    rows = Shards(shards, "eval", 32)
    batch = rows.batch(0, 0, rows.rows)
    total = 0.0
    with torch.no_grad():
        logits = model(batch[:, :-1]).double()
        for row in range(len(batch)):
            for t in range(32):
                total += float(logits[row, t].logsumexp(0) - logits[row, t, batch[row, t + 1]])
        assert float(next_token_loss(model, batch, None)) == pytest.approx(total, rel=1e-5)
    run = Run(cfg, "pretrain", "lm")
    found = [
        evaluate(run, model, rows, 1000, size, None) for size in (1, 4, 100)
    ]  # more rows than there are: all
    assert found == pytest.approx([total / batch[:, 1:].numel()] * 3, rel=1e-5)


def test_attention_stays_inside_a_document(tiny_gpt):
    model = tiny_gpt(vocab_size=50)
    one, other, third = (
        [7, 8, 9],
        [0, 3, 4, 5],
        [0, 6, 7, 3, 2],
    )  # 0 ends a document and opens the next
    row = torch.tensor([[*one, *other, *third]])
    expected = 0.0
    with torch.no_grad():
        for document, following in ((one, 0), (other, 0), (third, None)):
            logits = model(torch.tensor([document]))[0].double()
            for t, target in enumerate([*document[1:], following]):
                if target is not None:
                    expected += float(logits[t].logsumexp(0) - logits[t, target])
        assert float(next_token_loss(model, row, eot_id=0)) == pytest.approx(expected, rel=1e-5)
        assert float(next_token_loss(model, row, eot_id=None)) != pytest.approx(expected, rel=1e-3)


def test_it_goes_on_from_a_parent(setting, tmp_path):
    first = setting(max_steps=15)
    main(first)
    second = setting(
        output_dir=str(tmp_path / "more"),
        parent=first.output_dir,
        max_steps=5,
        learning_rate=1e-3,
        n_embd=64,
    )
    main(second)
    assert log(second)[0]["eval_loss"] == pytest.approx(log(first)[-1]["eval_loss"], rel=1e-4)
    assert load_model(second.output_dir).config.n_embd == 32  # the parent's
    assert not load_tokenizer(second.output_dir).chat


def test_mistakes_are_told(setting, stage_dir, tiny_gpt, tmp_path):
    with pytest.raises(InputError, match=r"shards\.json|tokenizer"):
        main(setting(train_data=str(tmp_path)))
    with pytest.raises(InputError, match=r"its ids are not those of .*tokenizer"):
        main(setting(parent=stage_dir(tiny_gpt(vocab_size=280))))
    with pytest.raises(InputError, match="eval split"):
        main(setting(max_length=2000))
    with pytest.raises(InputError, match="n_head"):
        main(setting(n_head=3))


def test_eval_only_trains_and_writes_nothing(setting, tmp_path, capsys):
    first = setting(max_steps=5)
    main(first)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    keys = {
        "eval_only": True,
        "sample_prompts": ["The fox"],
        "sample_tokens": 4,
        "eval_rows": 10_000,
    }
    main(setting(parent=first.output_dir, output_dir=str(tmp_path / "new"), **keys))
    said = capsys.readouterr().out
    heldout = Shards(first.train_data, "eval", 32)
    batch = heldout.batch(0, 0, heldout.rows)
    model = load_model(first.output_dir)
    with torch.no_grad():
        loss = (
            float(next_token_loss(model, batch, load_tokenizer(first.output_dir).eot_id))
            / batch[:, 1:].numel()
        )
    assert f"held-out loss {loss:.4f} nats a token" in said
    assert "The fox" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_mfu_is_a_share_of_the_best_rate_seen(monkeypatch):
    hardware = Hardware(torch.device("cpu"), torch.float32)
    timed = hardware.best
    assert timed > 0
    hardware.measure()
    assert hardware.best >= timed  # a noisy moment does not lower it
    timings = []
    monkeypatch.setattr(hardware, "measure", lambda: timings.append(1))
    hardware.best = 100.0
    assert hardware.share(50.0) == 0.5 and not timings
    assert hardware.share(200.0) == 1.0 and timings  # it was timed in a noisy moment
    assert hardware.share(100.0) == 0.5


def test_torch_compile_is_asked_for_the_model_that_trains(setting, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: (compiled.append(model), model)[1])
    main(setting(max_steps=1))
    assert not compiled
    main(setting(max_steps=1, torch_compile=True))
    assert [type(model).__name__ for model in compiled] == ["GPT"]


def test_a_fresh_gpt2_knows_nothing():
    """nanoGPT's check: ln(50257) = 10.82 at the start; tied embeddings of std .02 at width 768 add
    about .15."""
    torch.manual_seed(0)
    model = new_model(
        Config(preset="gpt2", train_data="x", output_dir="y", n_layer=2, max_steps=1), 50257, 64
    )
    ids = torch.randint(0, 50257, (4, 65))
    with torch.no_grad():
        loss = float(next_token_loss(model, ids, None)) / 256
    assert 10.82 - 0.1 < loss < 10.82 + 0.3
