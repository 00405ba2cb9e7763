"""Orders that are permutations and pure; shards as one stream, or as a mixture of several in given
proportions."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from common.program.errors import InputError
from common.program.files import write_jsonl
from common.rows.batches import Order, batches, hold_out, pad, share
from common.rows.shards import Mixture, Shards, Stream, scattered
from common.rows.sources import Row, read_rows


def test_write_jsonl_comes_back(tmp_path):
    rows = [{"text": "a\u2028b\nc é 👍"}, {"n": 1.5, "none": None}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row.data for row in read_rows(str(tmp_path / "x.jsonl"))] == rows
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


# Order


def test_pad():
    assert pad([[1, 2, 3], [4], []], 9).tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]


@pytest.mark.parametrize(
    "rows, size, window",
    [(1, 4, 16), (4, 4, 16), (103, 8, 2), (1000, 7, 16), (64, 8, 1), (5, 1, 3), (33, 32, 1)],
)
def test_batches_are_a_permutation(rows, size, window):
    lengths = random.Random(rows).choices(range(1, 200), k=rows)
    epochs = [batches(lengths, size, 5, epoch, window) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(row for batch in order for row in batch) == list(range(rows))
        assert [len(batch) for batch in order] == [size] * (rows // size) + [rows % size] * (
            rows % size > 0
        )
    assert epochs[0] != epochs[1] or rows == 1 or size >= rows


def test_batches_are_a_pure_function():
    lengths = random.Random(1).choices(range(1, 90), k=300)
    first = batches(lengths, 8, 3, 2)
    np.random.seed(7)
    random.seed(7)
    assert batches(list(lengths), 8, 3, 2) == first
    assert all(
        batches(lengths, 8, seed, epoch) != first for seed, epoch in [(3, 1), (4, 2), (2, 3)]
    )


def test_batches_pad_little_and_stay_mixed():
    lengths = random.Random(2).choices(range(1, 400), k=1600)
    order = batches(lengths, 16, 0, 0)
    spread = [
        max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in order
    ]
    assert sum(spread) / len(spread) < 40  # 16 rows at random spread over 350
    means = [sum(lengths[row] for row in batch) / 16 for batch in order]
    rises = sum(a < b for a, b in pairwise(means))
    assert 30 < rises < 70  # of 99: the batches do not come short ones first


@pytest.mark.parametrize("rows", [1, 7, 16, 23])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_share_gives_every_row_to_one_process(rows, processes):
    parts = [
        list(share(list(range(rows)), rank, processes, 4, blank=lambda row: None))
        for rank in range(processes)
    ]
    assert Counter(
        row for part in parts for batch in part for row in batch if row is not None
    ) == Counter(range(rows))
    assert all(len(batch) <= 4 and len(batch) for part in parts for batch in part)
    assert (
        len({tuple(map(len, part)) for part in parts}) == 1
    )  # nobody waits for a forward that another does not make


# Shards


def shards_of(
    folder: Path, sizes: list[int], dtype: str = "uint16", split: str = "train"
) -> np.ndarray:
    """Files of these sizes holding 7, 8, 9, ...: a token tells its place in the stream."""
    stream = np.arange(7, 7 + sum(sizes))
    start = 0
    for n, size in enumerate(sizes):
        stream[start : start + size].astype(dtype).tofile(folder / f"{split}-{n:05d}.bin")
        start += size
    (folder / "shards.json").write_text(json.dumps({"dtype": dtype}))
    return stream


@pytest.fixture(params=["held", "computed"])
def order(request, monkeypatch):
    """The order of a few rows is held, that of many computed."""
    if request.param == "computed":
        monkeypatch.setattr(Stream, "HELD", 0)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_computed_order_is_a_permutation(size):
    orders = []
    for seed in range(3):
        keys = np.random.default_rng(seed).integers(1 << 63, size=6).tolist()
        orders.append([scattered(n, size, keys) for n in range(size)])
        assert sorted(orders[-1]) == list(range(size))
    if size >= 1000:
        assert (
            abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.1
            and abs(np.corrcoef(orders[0], range(size))[0, 1]) < 0.1
        )
        assert np.mean(np.abs(np.diff(orders[0])) == 1) < 0.01


FILES = {
    "one file": [101],
    "even": [50, 50],
    "ragged": [3, 40, 1, 2, 77, 5],
    "exact": [41, 40],
    "row and one": [11],
}


@pytest.mark.parametrize("sizes", FILES.values(), ids=FILES)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.usefixtures("order")
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


@pytest.mark.usefixtures("order")
def test_shard_order_is_pure(tmp_path):
    shards_of(tmp_path, [30, 70, 33])
    shards = Shards(str(tmp_path), "train", 8)
    whole = shards.batch(1, 0, 50).tolist()
    assert Shards(str(tmp_path), "train", 8).batch(1, 0, 50).tolist() == whole
    fresh = Shards(str(tmp_path), "train", 8)
    for first, count in [
        (44, 6),
        (0, 3),
        (15, 4),
        (3, 1),
        (31, 9),
    ]:  # any order, over the border of an epoch too
        assert fresh.batch(1, first, count).tolist() == whole[first : first + count]
    other = Shards(str(tmp_path), "train", 8).batch(2, 0, 10).tolist()
    assert other != whole[:10]
    assert fresh.batch(1, 0, 10).tolist() == whole[:10]
    assert fresh.batch(2, 0, 10).tolist() == other  # what was asked before does not matter
    assert whole[:16] != whole[16:32] and sorted(whole[:16])[0][0] >= 7


def test_splits_are_apart(tmp_path):
    shards_of(tmp_path, [40], split="eval")
    shards_of(tmp_path, [60])
    assert (Shards(str(tmp_path), "train", 5).tokens, Shards(str(tmp_path), "eval", 5).tokens) == (
        60,
        40,
    )


def test_shards_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"no shards\.json.*stages\.pretrain\.prepare"):
        Shards(str(tmp_path), "train", 5)
    shards_of(tmp_path, [10])
    with pytest.raises(InputError, match="train split has 10 tokens, fewer than one row of 10"):
        Shards(str(tmp_path), "train", 10)
    with pytest.raises(InputError, match="eval split has 0 tokens"):
        Shards(str(tmp_path), "eval", 5)


# Mixtures

# LLaMA, table 1: sampling proportions in per cent, and epochs of 1.4 T tokens
LLAMA = {
    "CommonCrawl": (67.0, 1.10),
    "C4": (15.0, 1.06),
    "GitHub": (4.5, 0.64),
    "Wikipedia": (4.5, 2.45),
    "Books": (4.5, 2.23),
    "ArXiv": (2.5, 1.06),
    "StackExchange": (2.0, 1.03),
}
SHARES = [percent for percent, _ in LLAMA.values()]


def test_a_mixture_has_its_proportions_at_any_time():
    mixture, drawn, worst = Mixture(SHARES), np.zeros(7), 0.0
    assert np.isclose(sum(SHARES), 100)
    for index in range(30_000):
        source, number = mixture.place(3, index)
        assert (
            number == drawn[source]
        )  # the next row of that source, with none left out and none twice
        drawn[source] += 1
        off = np.abs(drawn - (index + 1) * np.array(SHARES) / 100)
        worst = max(worst, (off - 7 * np.array(SHARES) / 100).max())
    assert worst <= 1  # never further from its share than 1 + share x sources
    deviation = np.sqrt(
        30_000 * np.array(SHARES) / 100 * (1 - np.array(SHARES) / 100)
    )  # of independent draws
    assert (off < 0.25 * deviation).all()


def test_a_mixture_is_pure_over_the_border_of_a_block():
    indices = range(Mixture.BLOCK - 40, Mixture.BLOCK + 40)
    mixture = Mixture(SHARES)
    places = [mixture.place(1, index) for index in indices]
    assert [
        Mixture(SHARES).place(1, index) for index in (indices[0], indices[45], indices[-1])
    ] == [places[n] for n in (0, 45, -1)]
    assert [mixture.place(1, index) for index in reversed(indices)] == places[::-1]
    assert [mixture.place(2, index) for index in indices] != places
    for source in range(7):
        numbers = [number for found, number in places if found == source]
        assert numbers == list(
            range(numbers[0], numbers[0] + len(numbers))
        )  # it goes on behind the border
    counts = dict(places)
    assert counts[0] == pytest.approx(67_000 + 40 * 0.67, abs=6)


def test_shares_are_rounded_to_whole_draws():
    assert Mixture([1, 1, 1]).counts.tolist() == [33_334, 33_333, 33_333]
    assert Mixture([2e-5, 1 - 2e-5]).counts.tolist() == [2, 99_998]
    assert Mixture([0.25]).place(5, 123_456) == (0, 123_456)


def mixture_of(folder: Path, sources: dict[str, tuple[float, int]]) -> None:
    """Shards of sources with (share, tokens); token n of source s is 1000 s + n."""
    noted = []
    for n, (name, (part_of_all, tokens)) in enumerate(sources.items()):
        cut = tokens // 2  # two files each
        for file, part in enumerate((range(cut), range(cut, tokens))):
            (1000 * n + np.array(part)).astype("uint16").tofile(
                folder / f"train-{n:02d}-{file:05d}.bin"
            )
        noted.append({"source": name, "share": part_of_all})
    total = sum(tokens for _, tokens in sources.values())
    (folder / "shards.json").write_text(
        json.dumps({"dtype": "uint16", "tokens": {"train": total}, "sources": noted})
    )


def test_rows_of_a_mixture(tmp_path):
    mixture_of(tmp_path, {"web": (0.7, 811), "code": (0.2, 161), "books": (0.1, 41)})
    shards = Shards(str(tmp_path), "train", 10)
    assert (shards.tokens, shards.rows) == (1013, 81 + 16 + 4)
    rows = shards.batch(4, 0, 400).numpy()
    source = rows[:, 0] // 1000
    assert (np.diff(rows, axis=1) == 1).all() and rows.shape == (
        400,
        11,
    )  # no row crosses from one source to another
    assert np.abs(np.bincount(source) - [280, 80, 40]).max() <= 3
    for n, count in enumerate((81, 16, 4)):
        starts = rows[source == n, 0] - 1000 * n
        for epoch in range(
            len(starts) // count
        ):  # every row once before any twice, in an order of its own
            found = starts[epoch * count : (epoch + 1) * count]
            assert (np.diff(np.sort(found)) == 10).all()
            assert epoch == 0 or count == 4 or found.tolist() != starts[:count].tolist()
    parts = [
        Shards(str(tmp_path), "train", 10).batch(4, first, 50).numpy() for first in (350, 0, 200)
    ]  # a resume, a rank
    assert [part.tolist() for part in parts] == [
        rows[first : first + 50].tolist() for first in (350, 0, 200)
    ]
    assert shards.epochs(400) == pytest.approx(
        {"web": 2800 / 811, "code": 800 / 161, "books": 400 / 41}
    )


def test_epochs_without_a_mixture(tmp_path):
    shards_of(tmp_path, [300])
    assert Shards(str(tmp_path), "train", 10).epochs(45) == pytest.approx({str(tmp_path): 1.5})


def test_epochs_of_the_llama_table(tmp_path):
    """Sources of the sizes that the table implies, 1 : 10 ** 8."""
    sizes = {
        name: (percent, round(14_000 * percent / 100 / epochs))
        for name, (percent, epochs) in LLAMA.items()
    }
    mixture_of(tmp_path, sizes)
    found = Shards(str(tmp_path), "train", 10).epochs(1400)
    assert found == pytest.approx({name: epochs for name, (_, epochs) in LLAMA.items()}, rel=0.01)


def test_mixtures_that_are_none(tmp_path):
    mixture_of(tmp_path, {"web": (0.7, 811), "notes": (0.3, 9)})
    with pytest.raises(
        InputError, match="train split of notes has 9 tokens, fewer than one row of 10"
    ):
        Shards(str(tmp_path), "train", 10)
    (tmp_path / "train-00-00001.bin").unlink()
    with pytest.raises(InputError, match=r"414 train tokens, shards\.json notes 820; run"):
        Shards(str(tmp_path), "train", 5)


def test_held_out_prompts_are_on_one_side_only():
    rows = [Row({"prompt": f"p{n % 10}", "n": n}, f"f:{n}") for n in range(40)]
    train, heldout = hold_out(rows, 0.25, lambda data: data["prompt"])
    assert {row.data["prompt"] for row in heldout} == {"p8", "p9"}
    assert [row.data["n"] for row in heldout] == [8, 9, 18, 19, 28, 29, 38, 39]
    assert [row.data["n"] for row in train] == [n for n in range(40) if n % 10 < 8]

    def unreadable(data):
        raise InputError("no prompt")

    assert (
        len(hold_out(rows, 0.25, unreadable)[1]) == 10
    )  # each stands for itself; whoever tokenizes it says what is wrong
    with pytest.raises(InputError, match="f:0: all 40 rows share the held-out prompts"):
        hold_out(rows, 0.25, lambda data: "same")


def test_the_rows_of_a_step_need_no_steps_before_it():
    lengths = np.random.default_rng(1).integers(1, 50, 45).tolist()
    one, other = Order(lengths, 8, 3), Order(lengths, 8, 3)
    assert one.per_epoch == 6
    assert [one.rows(step) for step in range(14)] == [
        other.rows(step) for step in reversed(range(14))
    ][::-1]
    assert sorted(row for step in range(6) for row in one.rows(step)) == list(range(45))
    epochs = [[one.rows(6 * epoch + step) for step in range(6)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    whole = Order(lengths, 8, 3, drop_last=True)
    assert whole.per_epoch == 5
    assert {len(whole.rows(step)) for step in range(10)} == {8}
