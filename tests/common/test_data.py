"""Rows read as they are and named by file and line; orders that are permutations and pure; shards as one stream."""

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from common.config import InputError
from common.data import Order, Row, Shards, batches, hold_out, pad, read_rows, share, write_jsonl


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# read_rows


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n{"a": "two"}\n',
        '{"a": 1}\n{"a": "two"}',
        '\ufeff{"a": 1}\n{"a": "two"}\n',
        '{"a": 1}\r\n{"a": "two"}\r\n',
        '  {"a": 1}  \n\t{"a": "two"}\n   ',
    ],
    ids=["plain", "no last line end", "BOM", "CRLF", "spaces"],
)
def test_jsonl(tmp_path, content):
    path = write(tmp_path / "x.jsonl", content)
    rows = read_rows(path)
    assert [row.data for row in rows] == [{"a": 1}, {"a": "two"}]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
    path = write(tmp_path / "x.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n')
    assert [(row.data["a"], row.origin) for row in read_rows(path)] == [(1, f"{path}:2"), (2, f"{path}:5")]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """U+2028 and friends are legal inside a JSON string, and str.splitlines() would break there."""
    text = "a\u2028b\u2029c\u0085d\u00a0e"
    path = write(tmp_path / "x.jsonl", json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "next"}\n')
    rows = read_rows(path)
    assert [row.data["text"] for row in rows] == [text, "next"]
    assert rows[1].origin == f"{path}:2"


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"a": 1', "broken JSON"),
        ("{'a': 1}", "broken JSON"),
        ('{"a": 1} {"a": 2}', "broken JSON"),
        ("null", "expected a JSON object"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('"text"', "expected a JSON object, found str"),
    ],
    ids=["cut", "quotes", "two", "null", "list", "str"],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "x.jsonl", f'{{"a": 1}}\r\n\r\n{line}\r\n{{"a": 3}}\r\n')
    with pytest.raises(InputError, match=f"{re.escape(path)}:3: .*{words}"):
        read_rows(path)


def test_json_list(tmp_path):
    path = write(tmp_path / "x.json", '\ufeff[{"a": 1},\r\n {"a": "\u2028"}]')
    assert [(row.data["a"], row.origin) for row in read_rows(path)] == [(1, f"{path}:row 1"), ("\u2028", f"{path}:row 2")]
    for content, words in [
        ('{"a": 1}', "expected a JSON list of rows, found dict"),
        ('[{"a": 1},', "broken JSON"),
        ('[{"a": 1}, 7]', "row 2: a row must be a JSON object, this is '7'"),
        ("[]", "no rows"),
    ]:
        path = write(tmp_path / "y.json", content)
        with pytest.raises(InputError, match=f"{re.escape(path)}.*{words}"):
            read_rows(path)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "hi\u2028"}, {"role": "assistant", "content": "yes"}]
    table = pyarrow.table({"prompt": ["a", None], "n": [1, 2], "messages": [messages, messages]})
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table, path)
    rows = read_rows(str(path))
    assert [row.data for row in rows] == [
        {"prompt": "a", "n": 1, "messages": messages},
        {"prompt": None, "n": 2, "messages": messages},
    ]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:2"]


def test_damaged_parquet_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", b"PAR1 not really")
    with pytest.raises(InputError, match=r"x\.parquet"):
        read_rows(path)


def test_txt_is_one_row(tmp_path):
    path = write(tmp_path / "x.txt", "\ufeffOne.\n\n{not json\nTwo \u2028 three.\n")
    assert [tuple(row) for row in read_rows(path)] == [({"text": "One.\n\n{not json\nTwo \u2028 three.\n"}, path)]


def test_folder_in_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", '{"n": 2}\n')
    write(tmp_path / "a/z.json", '[{"n": 1}]')
    write(tmp_path / "c.txt", "text")
    write(tmp_path / "README.md", "no data")
    rows = read_rows(str(tmp_path))
    assert [row.data for row in rows] == [{"n": 1}, {"n": 2}, {"text": "text"}]


def test_unreadable_sources(tmp_path):
    latin1 = write(tmp_path / "x.jsonl", '{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{re.escape(latin1)}: not UTF-8 at byte 7"):
        read_rows(latin1)
    for content in ("", "\n\n", "\ufeff"):
        empty = write(tmp_path / "empty.jsonl", content)
        with pytest.raises(InputError, match=rf"{re.escape(empty)}: no rows"):
            read_rows(empty)
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "missing.jsonl", "no/such/file", "./x", "missing.parquet"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_rows(str(path))
    with pytest.raises(InputError, match="no-such-person/no-such-data"):  # offline: the Hub gives nothing
        read_rows("no-such-person/no-such-data")


def test_write_jsonl_comes_back(tmp_path):
    rows = [{"text": "a\u2028b\nc é 👍"}, {"n": 1.5, "none": None}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row.data for row in read_rows(str(tmp_path / "x.jsonl"))] == rows
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


# Order


def test_pad():
    assert pad([[1, 2, 3], [4], []], 9).tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]


@pytest.mark.parametrize(
    "rows, size, window", [(1, 4, 16), (4, 4, 16), (103, 8, 2), (1000, 7, 16), (64, 8, 1), (5, 1, 3), (33, 32, 1)]
)
def test_batches_are_a_permutation(rows, size, window):
    lengths = random.Random(rows).choices(range(1, 200), k=rows)
    epochs = [batches(lengths, size, 5, epoch, window) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(row for batch in order for row in batch) == list(range(rows))
        assert [len(batch) for batch in order] == [size] * (rows // size) + [rows % size] * (rows % size > 0)
    assert epochs[0] != epochs[1] or rows == 1 or size >= rows


def test_batches_are_a_pure_function():
    lengths = random.Random(1).choices(range(1, 90), k=300)
    first = batches(lengths, 8, 3, 2)
    np.random.seed(7)
    random.seed(7)
    assert batches(list(lengths), 8, 3, 2) == first
    assert all(batches(lengths, 8, seed, epoch) != first for seed, epoch in [(3, 1), (4, 2), (2, 3)])


def test_batches_pad_little_and_stay_mixed():
    lengths = random.Random(2).choices(range(1, 400), k=1600)
    order = batches(lengths, 16, 0, 0)
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in order]
    assert sum(spread) / len(spread) < 40  # 16 rows at random spread over 350
    means = [sum(lengths[row] for row in batch) / 16 for batch in order]
    rises = sum(a < b for a, b in pairwise(means))
    assert 30 < rises < 70  # of 99: the batches do not come short ones first


@pytest.mark.parametrize("rows", [1, 7, 16, 23])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_share_gives_every_row_to_one_process(rows, processes):
    parts = [list(share(list(range(rows)), rank, processes, 4)) for rank in range(processes)]
    assert Counter(row for part in parts for batch in part for row in batch) == Counter(range(rows))
    assert all(len(batch) <= 4 and len(batch) for part in parts for batch in part)
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# Shards


def shards_of(folder: Path, sizes: list[int], dtype: str = "uint16", split: str = "train") -> np.ndarray:
    """Files of these sizes holding 7, 8, 9, ...: a token tells its place in the stream."""
    stream = np.arange(7, 7 + sum(sizes))
    start = 0
    for n, size in enumerate(sizes):
        stream[start : start + size].astype(dtype).tofile(folder / f"{split}-{n:05d}.bin")
        start += size
    (folder / "shards.json").write_text(json.dumps({"dtype": dtype}))
    return stream


FILES = {"one file": [101], "even": [50, 50], "ragged": [3, 40, 1, 2, 77, 5], "exact": [41, 40], "row and one": [11]}


@pytest.mark.parametrize("sizes", FILES.values(), ids=FILES)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_row_once_an_epoch_across_file_borders(tmp_path, sizes, dtype):
    stream = shards_of(tmp_path, sizes, dtype)
    shards = Shards(str(tmp_path), "train", 10)
    assert (shards.tokens, shards.rows) == (len(stream), (len(stream) - 1) // 10)
    phases = set()
    for epoch in range(6):
        rows = shards.batch(4, epoch * shards.rows, shards.rows)
        assert rows.shape == (shards.rows, 11) and rows.dtype.is_signed and rows.element_size() == 8
        starts = sorted(row[0].item() - 7 for row in rows)
        phases.add(starts[0])
        assert starts == [starts[0] + 10 * n for n in range(shards.rows)]
        assert starts[0] >= 0 and starts[-1] + 11 <= len(stream)
        for row in rows:
            at = row[0].item() - 7
            assert row.tolist() == stream[at : at + 11].tolist()
    spare = len(stream) - 1 - 10 * shards.rows
    assert len(phases) == 1 if spare == 0 else len(phases) > 1


def test_shard_order_is_pure(tmp_path):
    shards_of(tmp_path, [30, 70, 33])
    shards = Shards(str(tmp_path), "train", 8)
    whole = shards.batch(1, 0, 50).tolist()
    assert Shards(str(tmp_path), "train", 8).batch(1, 0, 50).tolist() == whole
    fresh = Shards(str(tmp_path), "train", 8)
    for first, count in [(44, 6), (0, 3), (15, 4), (3, 1), (31, 9)]:  # any order, over the border of an epoch too
        assert fresh.batch(1, first, count).tolist() == whole[first : first + count]
    other = Shards(str(tmp_path), "train", 8).batch(2, 0, 10).tolist()
    assert other != whole[:10]
    assert fresh.batch(1, 0, 10).tolist() == whole[:10]
    assert fresh.batch(2, 0, 10).tolist() == other  # what was asked before does not matter
    assert whole[:16] != whole[16:32] and sorted(whole[:16])[0][0] >= 7


def test_splits_are_apart(tmp_path):
    shards_of(tmp_path, [40], split="eval")
    shards_of(tmp_path, [60])
    assert (Shards(str(tmp_path), "train", 5).tokens, Shards(str(tmp_path), "eval", 5).tokens) == (60, 40)


def test_shards_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"no shards\.json.*stages\.pretrain\.prepare"):
        Shards(str(tmp_path), "train", 5)
    shards_of(tmp_path, [10])
    with pytest.raises(InputError, match="train split has 10 tokens, fewer than one row of 10"):
        Shards(str(tmp_path), "train", 10)
    with pytest.raises(InputError, match="eval split has 0 tokens"):
        Shards(str(tmp_path), "eval", 5)


def test_held_out_prompts_are_on_one_side_only():
    rows = [Row({"prompt": f"p{n % 10}", "n": n}, f"f:{n}") for n in range(40)]
    train, heldout = hold_out(rows, 0.25, lambda data: data["prompt"])
    assert {row.data["prompt"] for row in heldout} == {"p8", "p9"}
    assert [row.data["n"] for row in heldout] == [8, 9, 18, 19, 28, 29, 38, 39]
    assert [row.data["n"] for row in train] == [n for n in range(40) if n % 10 < 8]

    def unreadable(data):
        raise InputError("no prompt")

    assert len(hold_out(rows, 0.25, unreadable)[1]) == 10  # each stands for itself; whoever tokenizes it says what is wrong
    with pytest.raises(InputError, match="f:0: all 40 rows share the held-out prompts"):
        hold_out(rows, 0.25, lambda data: "same")


def test_the_rows_of_a_step_need_no_steps_before_it():
    lengths = np.random.default_rng(1).integers(1, 50, 45).tolist()
    one, other = Order(lengths, 8, 3), Order(lengths, 8, 3)
    assert one.per_epoch == 6
    assert [one.rows(step) for step in range(14)] == [other.rows(step) for step in reversed(range(14))][::-1]
    assert sorted(row for step in range(6) for row in one.rows(step)) == list(range(45))
    whole = Order(lengths, 8, 3, drop_last=True)
    assert whole.per_epoch == 5
    assert {len(whole.rows(step)) for step in range(10)} == {8}
