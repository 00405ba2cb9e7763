"""What compare says at its end, and how it shows that it is still at work."""

import json
import shlex
from pathlib import Path

from tools.compare import afterwards, progress


def row(prompt: str, family: str | None, *correct: bool) -> dict:
    names = ("base", "sft", "rl")
    answers = {n: {"greedy": {"correct": c}} for n, c in zip(names, correct, strict=True)}
    return {"prompt": prompt, "family": family, "answers": answers}


def test_examples_are_those_where_only_the_last_model_is_right_of_different_families():
    rows = [
        row("sft can do it", "sum", False, True, True),
        row("nobody can", "fact", False, False, False),
        row("one", "sum", False, False, True),
        row("another", "sum", False, False, True),
        row("two\nlines", "letter", False, False, True),
        row("it's a fact", "fact", False, False, True),
    ]
    found = afterwards.examples(rows, ["base", "sft", "rl"], "greedy")
    assert [r["prompt"] for r in found] == ["one", "it's a fact", "another"]


def test_examples_without_gold_are_those_where_the_texts_differ():
    def said(prompt: str, *texts: str) -> dict:
        names = ("base", "sft", "rl")
        return {
            "prompt": prompt,
            "answers": {n: {"greedy": {"text": t}} for n, t in zip(names, texts, strict=True)},
        }

    rows = [
        said("same", "x", "yes", "yes"),
        said("a little", "x", "yes", "yet"),
        said("all", "", "a", "b"),
    ]
    found = afterwards.examples(rows, ["base", "sft", "rl"], "greedy")
    assert [r["prompt"] for r in found] == ["all", "a little"]
    assert afterwards.examples([said("p", "a", "b", "c")], ["rl"], "greedy") == []


def test_last_lines_are_commands_to_paste():
    models = {name: {"path": f"my runs/{name}"} for name in ("base", "sft", "rl")}
    result = {"models": models, "gold": "my.gold", "greedy": {}}
    samples = [row("it's a fact", "fact", False, False, True)]
    found = afterwards.lines(result, samples, Path("x/compare.html"), True)
    assert found[0] == "page: x/compare.html"
    assert found[1].endswith("'my runs/rl' --chat")
    words = shlex.split(found[3])
    assert words[words.index("--prompt") + 1] == "it's a fact"
    assert words[-2:] == ["--gold", "my.gold"]


def write(folder: Path, **stage: object) -> str:
    folder.mkdir()
    (folder / "stage.json").write_text(json.dumps(stage))
    return str(folder)


def test_about_is_what_the_data_says_of_itself(tmp_path):
    """rl -> sft -> pretrain -> prepare -> the file of a data stage."""
    data = write(tmp_path / "data", about="A small world.")
    other = write(tmp_path / "other")
    shards = write(tmp_path / "prepare", config={"train_data": [f"{data}/a.jsonl"]})
    mixed = [f"{data}/a.jsonl", f"{other}/b.jsonl"]
    mixture = write(tmp_path / "mixture", config={"train_data": mixed})
    base = write(tmp_path / "base", parent=None, config={"train_data": shards})
    sft = write(tmp_path / "sft", parent=base, config={"train_data": f"{other}/sft.jsonl"})
    rl = write(tmp_path / "rl", parent=sft)
    wide = write(tmp_path / "wide", parent=None, config={"train_data": mixture})
    tuned = write(tmp_path / "tuned", parent="a/hub-model", config={"train_data": shards})
    assert afterwards.about(rl) == afterwards.about(base) == "A small world."
    assert afterwards.about(wide) is None and afterwards.about(tuned) is None
    assert afterwards.about("nowhere") is None
    odd = write(tmp_path / "odd", config={"train_data": [5, {}]})
    number = write(tmp_path / "number", config={"train_data": 5})
    assert afterwards.about(odd) is None and afterwards.about(number) is None


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(1000) as shown:
        shown.begin("sft")
        for seconds in (20, 40, 60, 240):
            now[0] = seconds
            shown.update(100)
        shown.update(600)
    assert capsys.readouterr().err.splitlines() == [
        "sft: 200 of 1,000 answers, about 3 min left",
        "sft: 400 of 1,000 answers, about 6 min left",
    ]
