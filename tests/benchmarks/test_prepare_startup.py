"""The benchmarks of preparation and start-up run, at tiny sizes, and their last line has what it
must tell."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import prepare
from common.rows.shards import Shards
from tests.forked import program

KEYS = {
    "benchmark",
    "ratio",
    "ours",
    "peer",
    "unit",
    "peer_name",
    "all",
    "runs",
    "machine",
    "threads",
    "commit",
}


def last_line(module: str, *flags: str) -> dict:
    done = program(module, *flags)
    assert done.code == 0, done.err
    return json.loads(done.out.strip().splitlines()[-1])


@pytest.mark.slow
def test_prepare(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text(
        "\n\n".join(
            f"The fox number {n} met the bird number {n % 7} by the river." for n in range(400)
        )
    )
    flags = ["--megabytes", "0.2", "--runs", "1", "--vocab_size", "300", "--shard_tokens", "0"]
    line = last_line("benchmarks.prepare", "--text", str(text), *flags)
    assert line.keys() >= KEYS | {"memory_MB", "shards"}
    assert line["benchmark"] == "prepare" and line["unit"] == "MB/s" and line["ours"] > 0
    names = ["0.04MB.txt", "0.2MB.txt", "0.04MB.jsonl", "0.2MB.jsonl"]
    assert line["memory_MB"].keys() >= {f"ours {name}" for name in names}
    if find_spec("datasets") and find_spec("transformers"):
        assert line["peer"] > 0 and line["ratio"] == pytest.approx(
            line["ours"] / line["peer"], abs=1e-3
        )


def test_shards(tmp_path, shards, monkeypatch):
    seen = []

    def train(folder: Path, data: Path, steps: int) -> tuple[float, dict[str, float]]:
        seen.append(Shards(str(data), "train", 16).tokens)
        return 100.0 + len(seen), {"anon": 5.0, "rss": 6.0}

    monkeypatch.setattr(prepare, "train", train)
    (tmp_path / "shards").symlink_to(shards)
    found = prepare.compare_shards(tmp_path, 2000, 20, runs=2)
    assert seen == [2000, 200_000] * 3
    assert found["tokens"] == {"small": 2000, "large": 200_000}
    assert found["small"] == {"tokens/s": 104.0, "anon": 5.0, "rss": 6.0}
    assert found["large_over_small"] == {"tokens/s": round(105 / 104, 3), "anon": 1.0, "rss": 1.0}


@pytest.mark.slow
def test_startup():
    line = last_line("benchmarks.startup", "--runs", "1", "--stages", "pretrain", "--no_peer")
    assert line.keys() >= KEYS | {"bar", "stages"}
    assert line["stages"].keys() == {"pretrain"}
    assert line["ours"] == pytest.approx(line["stages"]["pretrain"], abs=1e-3)
    assert line["peer"] is None and 0 < line["ours"] < 100


def test_documents_are_the_text(tmp_path):
    text = "\n\n".join(f"{n} foxes" * (n % 9) for n in range(300))
    documents = prepare.documents_of(text, 200)
    assert "".join(documents) == text + "\n\n" and all(
        len(document) >= 200 for document in documents[:-1]
    )
    prepare.write_rows(tmp_path / "rows.jsonl", documents, 50_000)
    rows = [json.loads(row)["text"] for row in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert 50_000 <= sum(map(len, rows)) < 52_000 and rows[: len(documents)] == documents
