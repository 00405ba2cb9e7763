"""Curves of runs: the table's figures, bigrams counted by hand, and a model without layers that
learns them."""

import json
import math
from pathlib import Path

import pytest

from common.config.schema import load
from common.program.errors import InputError
from stages.pretrain import prepare, train
from tools import curves as curves

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def run_dir(stage_dir, tiny_gpt):
    """run_dir([(step, loss), ...], **GPTConfig fields) -> a published directory with that curve."""

    def make(curve, **shape) -> str:
        folder = stage_dir(tiny_gpt(**shape), step=curve[-1][0], tokens_seen=1000, wall_time=2.4)
        lines = [{"step": step, "eval_loss": loss} for step, loss in curve]
        lines[1:1] = [{"step": 5, "loss": 9.0, "lr": 0.1}]
        Path(folder, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def report(tmp_path, *runs, **keys):
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    out = tmp_path / "out"
    curves.main(load(curves.Config, ["--runs", *runs, "--output_dir", str(out), *words]))
    return json.loads((out / "curves.json").read_text()), json.loads(
        (out / "stage.json").read_text()
    )["gate"]


def test_the_table(tmp_path, run_dir, capsys):
    first = run_dir([(0, 5.0), (10, 3.5), (20, 3.25)])
    second = run_dir([(0, 5.5), (20, 2.75)], family="gpt2", n_layer=1)
    result, gate = report(tmp_path, first, second, improving="true")
    rows = list(result["runs"].values())
    assert rows[0]["curve"] == [[0, 5.0], [10, 3.5], [20, 3.25]] and rows[0]["loss"] == 3.25
    # gpt2, 300 ids, 64 positions, 1 layer of width 32 and 64 inside: embeddings, two norms,
    # attention, MLP, last norm
    wanted = (
        300 * 32
        + 64 * 32
        + 4 * 32
        + (32 * 96 + 96)
        + (32 * 32 + 32)
        + (32 * 64 + 64)
        + (64 * 32 + 32)
        + 2 * 32
    )
    assert (rows[1]["parameters"], rows[1]["steps"], rows[1]["seconds"]) == (wanted, 20, 2.4)
    assert gate["passed"] and "3.250" in gate["text"] and "2.750" in gate["text"]
    shown = capsys.readouterr().out
    assert f"{wanted:,}" in shown and "gpt2 1 x 4 x 32" in shown and "gate curves: PASS" in shown
    page = (tmp_path / "out" / "curves.html").read_text()
    assert "data:image/png;base64," in page and f"{wanted:,}" in page
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_no_better_fails_the_gate(tmp_path, run_dir):
    _, gate = report(
        tmp_path, run_dir([(0, 5.0), (9, 3.0)]), run_dir([(0, 5.0), (9, 3.0)]), improving="true"
    )
    assert not gate["passed"] and "is 0.000, not > 0" in gate["text"]
    _, gate = report(tmp_path, run_dir([(0, 5.0), (9, 3.0)]), run_dir([(0, 5.0), (9, 3.5)]))
    assert gate["passed"]


def test_different_vocabularies_are_named(tmp_path, run_dir, capsys):
    report(tmp_path, run_dir([(0, 5.0), (9, 3.0)]), run_dir([(0, 5.0), (9, 3.0)], vocab_size=400))
    assert "different vocabularies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"step": 9, "eval_loss": NaN}', "metrics.jsonl:4: step is 9, eval_loss nan"),
        ('{"step": 9, "eval_loss": 1e999}', "metrics.jsonl:4: step is 9, eval_loss inf"),
        (
            '{"step": 9, "eval_loss": 1' + "0" * 400 + "}",
            "metrics.jsonl:4: step is 9, eval_loss 1000",
        ),
        ('{"step": null, "eval_loss": 3}', "metrics.jsonl:4: step is None"),
        ('{"step": 9, "eval_loss": "low"}', "metrics.jsonl:4: step is 9, eval_loss 'low'"),
        ('{"step": 9, "eval', "metrics.jsonl:4"),
        ("[1]", "metrics.jsonl:4"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_named(tmp_path, run_dir, row, said):
    folder = run_dir([(0, 5.0), (9, 3.0)])
    with Path(folder, "metrics.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError, match=said):
        report(tmp_path, folder)


def test_facts_of_a_foreign_stage_are_left_out(tmp_path, run_dir):
    folder = run_dir([(0, 5.0), (9, 3.0)])
    facts = {"wall_time": float("nan"), "tokens_seen": 10**400, "step": 9}
    Path(folder, "stage.json").write_text(json.dumps(facts))
    Path(folder, "manifest.json").write_text("{}")
    run = next(iter(report(tmp_path, folder)[0]["runs"].values()))
    assert (run["seconds"], run["tokens_seen"], run["steps"]) == (None, None, 9)


def text_folder(tmp_path, text: str, eval_fraction: float) -> str:
    (tmp_path / "text.txt").write_text(text)
    cfg = prepare.Config(
        train_data=[str(tmp_path / "text.txt")],
        output_dir=str(tmp_path / "shards"),
        tokenizer="characters",
        eval_fraction=eval_fraction,
    )
    prepare.main(cfg)
    return cfg.output_dir


@pytest.mark.parametrize("smoothing", [1.0, 0.25])
def test_bigrams_counted_by_hand(tmp_path, smoothing):
    """abaab|ba: training pairs ab ba aa ab b$, held-out pairs ba a$; 7 ids (a, b and five control
    tokens)."""
    folder = text_folder(tmp_path, "abaabba", 2 / 7)
    after_b, after_a = 2 + 7 * smoothing, 3 + 7 * smoothing  # b is followed by a, $; a by b, a, b
    wanted = -(math.log((1 + smoothing) / after_b) + math.log(smoothing / after_a)) / 2
    assert curves.bigram_loss(folder, smoothing) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.heavy
def test_a_model_without_layers_learns_the_bigrams(tmp_path, capsys):
    folder = text_folder(tmp_path, "the cat sat on the mat and the rat ran at the cat. " * 60, 0.2)
    cfg = train.Config(
        train_data=folder,
        output_dir=str(tmp_path / "bigram"),
        n_layer=0,
        n_head=1,
        n_embd=32,
        tie_embeddings=False,
        max_length=32,
        max_steps=250,
        learning_rate=0.03,
        adam_beta2=0.95,
        mixed_precision="no",
        eval_rows=10_000,
    )
    train.main(cfg)
    result, gate = report(
        tmp_path, cfg.output_dir, bigram=folder, smoothing=0.01
    )  # the text is short
    assert result["checks"][0]["passed"] and gate["passed"]
    assert result["runs"]["bigram"]["loss"] == pytest.approx(result["bigram"]["loss"], abs=0.02)
    assert "added to each" in capsys.readouterr().out
    _, gate = report(
        tmp_path, cfg.output_dir, bigram=folder, smoothing=100
    )  # counts that say nothing any more
    assert not gate["passed"] and "distance from the bigram counts" in gate["text"]


def test_errors_name_the_fix(tmp_path, run_dir, stage_dir, tiny_gpt):
    with pytest.raises(InputError, match="no finished stage there"):
        report(tmp_path, str(tmp_path / "nothing"))
    folder = run_dir([(0, 5.0)])
    with pytest.raises(InputError, match="one is named twice"):
        report(tmp_path, folder, folder)
    Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(InputError, match="no eval_loss"):
        report(tmp_path, folder)


def test_a_report_does_not_go_into_the_run_that_it_reads(run_dir):
    run = run_dir([(0, 5.0), (10, 3.5)])
    before = Path(run, "stage.json").read_bytes()
    with pytest.raises(InputError, match="is runs too, which would be overwritten"):
        curves.main(load(curves.Config, ["--runs", run, "--output_dir", run]))
    assert Path(run, "stage.json").read_bytes() == before
