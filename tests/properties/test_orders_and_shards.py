"""Shards and orders of rows: for any sizes every row once, and the same whatever was asked
before; a shards.json that is none is one line."""

import json

import numpy as np
from anything import VALUES, result_or_line
from hypothesis import example, given
from hypothesis import strategies as st

from common.rows.batches import Order, batches, hold_out, share
from common.rows.shards import Mixture, Shards, scattered
from common.rows.sources import Row


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 5),
    st.booleans(),
)
def test_an_epoch_has_every_row_once_at_its_stride(tmp_path, sizes, length, stride, seed, held):
    for old in tmp_path.glob("*.bin"):
        old.unlink()
    stream, start = np.arange(sum(sizes)), 0
    for n, size in enumerate(sizes):
        stream[start : start + size].astype("uint16").tofile(tmp_path / f"train-{n:05d}.bin")
        start += size
    (tmp_path / "shards.json").write_text(json.dumps({"dtype": "uint16"}))
    shards = result_or_line(Shards, str(tmp_path), "train", length, stride)
    if shards is None:
        assert stride > length or len(stream) <= length
        return
    shards.streams[0].few = held
    rows = shards.batch(seed, 0, 2 * shards.rows).numpy()
    assert (np.diff(rows, axis=1) == 1).all() and rows.shape[1] == length + 1
    assert rows.min() >= 0 and rows.max() < len(stream)
    for epoch in np.split(rows[:, 0], 2):
        assert (np.diff(np.sort(epoch)) == stride).all()
    last = Shards(str(tmp_path), "train", length, stride)
    last.streams[0].few = held
    assert last.batch(seed, len(rows) - 1, 1).tolist() == rows[-1:].tolist()


@given(st.binary(max_size=20) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b'{"dtype": "uint16", "sources": [{"share": 0.5}]}')
@example(b'{"dtype": "uint16", "tokens": []}')
@example(b'{"dtype": "float64"}')
@example(b"{}")
def test_a_shards_json_that_is_none_is_one_line(tmp_path, content):
    np.arange(50, dtype="uint16").tofile(tmp_path / "train-00000.bin")
    (tmp_path / "shards.json").write_bytes(content)
    result_or_line(Shards, str(tmp_path), "train", 5)


@given(st.integers(1, 300), st.integers(0, 2**62))
def test_a_computed_order_is_a_permutation(size, key):
    keys = [key ^ n * 977 for n in range(6)]
    assert sorted(scattered(n, size, keys) for n in range(size)) == list(range(size))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 300_000))
def test_a_mixture_leaves_no_row_out(shares, index):
    mixture = Mixture(shares)
    assert mixture.counts.sum() == Mixture.BLOCK and (mixture.counts >= 0).all()
    source, number = mixture.place(1, index)
    block = index // Mixture.BLOCK
    assert block * mixture.counts[source] <= number < (block + 1) * mixture.counts[source]
    assert Mixture(shares).place(1, index) == (source, number)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_an_epoch_of_an_order_has_every_row_once(lengths, size, window, drop_last):
    whole = [row for batch in batches(lengths, size, 1, 2, window) for row in batch]
    assert sorted(whole) == list(range(len(lengths)))
    if drop_last and len(lengths) < size:
        return
    order = Order(lengths, size, 3, drop_last)
    steps = [order.rows(step) for step in range(2 * order.per_epoch)]
    assert Order(lengths, size, 3, drop_last).rows(len(steps) - 1) == steps[-1]
    for epoch in (steps[: order.per_epoch], steps[order.per_epoch :]):
        rows = [row for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows)
        assert drop_last or len(rows) == len(lengths)


@given(st.lists(st.integers(), min_size=1), st.integers(1, 5), st.integers(1, 6))
def test_shares_are_all_rows_and_of_one_shape(rows, processes, micro):
    parts = [
        list(share(rows, rank, processes, micro, lambda row: None)) for rank in range(processes)
    ]
    given_out = [row for part in parts for batch in part for row in batch if row is not None]
    assert sorted(given_out) == sorted(rows)
    assert len({tuple(map(len, part)) for part in parts}) == 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_no_prompt_on_both_sides(prompts, fraction):
    rows = [Row({"prompt": prompt}, f"f:{n}") for n, prompt in enumerate(prompts)]
    sides = result_or_line(hold_out, rows, fraction, lambda data: data["prompt"])
    if sides is None:
        assert max(1, int(len(set(prompts)) * fraction)) == len(set(prompts))
        return
    train, heldout = ({row.data["prompt"] for row in side} for side in sides)
    assert train and heldout and not train & heldout
    assert len(sides[0]) + len(sides[1]) == len(rows)
    assert len(heldout) == max(1, int(len(set(prompts)) * fraction))
