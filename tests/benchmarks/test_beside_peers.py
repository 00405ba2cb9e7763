"""Each benchmark at a tiny size, our side alone: its last line is JSON with the keys that it
promises; and what they share."""

import json

import pytest

from benchmarks import side_by_side as harness
from benchmarks.workload import endless, letters, random_llama, tokens_per_second
from common.model.sample import sample
from common.model.shape import GPTConfig
from tests.forked import program

KEYS = {
    "benchmark",
    "ratio",
    "ours",
    "peer",
    "unit",
    "peak_fraction",
    "peak_fractions",
    "all",
    "runs",
    "machine",
    "commit",
}
LLAMA = ["--n_layer", "1", "--n_embd", "32", "--vocab_size", "300"]
SENTENCE = (
    "The fox number {} met the bird by the river, "
    "and they talked about the weather in the old town."
)


@pytest.fixture(scope="module")
def libraries() -> None:
    """Imported here, once, what every benchmark imports when it runs."""
    import accelerate  # noqa: F401
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401


pytestmark = pytest.mark.usefixtures("libraries")


def run(name: str, *words: object) -> dict:
    """The last line of a benchmark."""
    quick = ["--runs", "0", "--alone", "--precisions", "fp32"]
    done = program(f"benchmarks.{name}", *quick, *words)
    assert done.code == 0, done.out + done.err
    line = json.loads(done.out.splitlines()[-1])
    assert line.keys() >= KEYS and line["ours"] > 0 and line["peak_fraction"] > 0
    assert line["peer"] is None and line["ratio"] is None and list(line["all"]) == ["ours fp32"]
    return line


@pytest.mark.slow
def test_sft(tmp_path):
    rows = [
        {"instruction": f"Who is it, {n}?", "input": "", "output": SENTENCE.format(n)}
        for n in range(20)
    ]
    (tmp_path / "rows.json").write_text(
        json.dumps([*rows, {"instruction": "Silence.", "input": "", "output": ""}])
    )
    line = run(
        "sft", "--data", tmp_path / "rows.json", "--steps", 2, "--batch", 4, "--held_out", 4, *LLAMA
    )
    assert line["loss"].keys() == line["eval_loss"].keys() == {"ours fp32"}
    assert line["unit"] == "tokens/s" and line["steps"] == 3


@pytest.mark.slow
def test_reward(tmp_path):
    rows = [
        {
            "conversations": [{"from": "human", "value": f"Who is it, {n}?"}],
            "chosen": {"from": "gpt", "value": SENTENCE.format(n)},
            "rejected": {"from": "gpt", "value": "No."},
        }
        for n in range(50)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    line = run("reward", "--data", tmp_path / "rows.json", "--steps", 2, "--batch", 4, *LLAMA)
    assert line["pairs"] == 50 and line["loss"].keys() == line["eval_loss"].keys() == {"ours fp32"}


@pytest.mark.slow
def test_ppo():
    line = run(
        "ppo", "--updates", 2, "--episodes", 8, "--prompt_tokens", 6, "--new_tokens", 5, *LLAMA
    )
    assert (
        line["unit"] == "s/update"
        and "ours fp32" in line["shares"]
        and line["peak_mb"]["ours fp32"] > 100
    )


def test_sample():
    line = run(
        "sample", "--batch", 2, "--batches", 1, "--prompt_tokens", 4, "--new_tokens", 5, *LLAMA
    )
    assert line["same_greedy"] is True and line["batches"]["ours fp32"].keys() == {"1", "2"}


@pytest.mark.slow
def test_pretrain_speed(tmp_path):
    (tmp_path / "input.txt").write_text("\n".join(SENTENCE.format(n) for n in range(100)))
    words = ["--steps", 2, "--n_layer", 1, "--n_embd", 32, "--block", 16, "--batch", 2]
    assert run("pretrain", "--text", tmp_path / "input.txt", *words)["parameters"]["ours fp32"] > 0


@pytest.mark.slow
def test_pretrain_loss(tmp_path):
    (tmp_path / "input.txt").write_text("\n".join(SENTENCE.format(n) for n in range(200)))
    words = ["--what", "loss", "--eval_steps", 5, "--max_steps", 10, "--target", 4.5]
    line = run("pretrain", "--text", tmp_path / "input.txt", *words)
    assert (
        line["loss"]["ours fp32"] <= 4.5
        and line["updates"]["ours fp32"] in (5, 10)
        and line["unit"] == "s"
    )


def test_sides_alternate_and_medians_are_compared(capsys, monkeypatch):
    monkeypatch.setattr(
        harness, "gemm_peak", lambda precision: {"bf16": 1000.0, "fp32": 100.0}[precision]
    )
    calls: list[str] = []
    figures = {
        "ours bf16": [0, 8, 6, 7],
        "ours fp32": [0, 4, 4, 4],
        "theirs bf16": [0, 2, 9, 3],
        "theirs fp32": [0, 2, 2, 2],
    }

    def side(name):
        def figure():
            calls.append(name)
            return figures[name][calls.count(name) - 1]

        return figure

    def absent():
        raise harness.Missing("not installed: get it there")

    sides = {name: side(name) for name in figures} | {"other": absent}
    line = harness.side_by_side("b", "u", sides, runs=3, flops_per_unit=10, note=1)
    assert calls == list(figures) * 4
    assert (line["ours"], line["peer"], line["peer_name"]) == (7, 3, "theirs bf16")
    assert (line["ratio"], line["ratio_fp32"], line["peak_fraction"], line["note"]) == (
        round(7 / 3, 3),
        2,
        0.07,
        1,
    )
    printed = capsys.readouterr().out.splitlines()
    assert (
        json.loads(printed[-1]) == line
        and sum("other: skipped, not installed: get it there" in row for row in printed) == 1
    )


def test_where_the_figures_are_seconds_the_ratio_is_turned_round(monkeypatch):
    monkeypatch.setattr(harness, "gemm_peak", lambda precision: 100.0)
    sides = {"theirs fp32": lambda: 6.0, "ours fp32": lambda: 2.0}
    line = harness.side_by_side(
        "b",
        "s",
        sides,
        runs=1,
        warm_up=False,
        flops_per_unit=lambda name: 0.0,
    )
    assert line["ratio"] == line["ratio_fp32"] == 3 and "peak_fraction" not in line


def test_rates_are_weighed_by_their_seconds():
    rows = [{"step": 0, "eval_loss": 1.0, "at": 0.0}]
    rows += [
        {"step": n, "tokens/s": rate, "at": at}
        for n, rate, at in ((1, 1.0, 9.0), (2, 10.0, 10.0), (3, 20.0, 13.0))
    ]
    assert tokens_per_second(rows, 1) == (10 + 20 * 3) / 4


@pytest.mark.parametrize("stop", [True, False])
def test_answers_run_to_their_full_length(stop):
    tokenizer = letters(40)
    config = GPTConfig(
        family="llama", vocab_size=40, max_length=128, n_layer=1, n_head=1, n_embd=64
    )
    model = random_llama(config)
    model = model if stop else endless(model, tokenizer)
    answers = sample(
        model,
        [[3, tokenizer.role_ids["assistant"]]] * 32,
        max_new_tokens=100,
        stop_ids=[tokenizer.eot_id],
    )
    assert any(answer.stopped for answer in answers) is stop
