"""Token shards as rows, and the order in which they are seen: a pure function of (seed, index).

Nothing here has a position to save: a run that starts again at step s sees what it would have seen.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.program.errors import InputError

if TYPE_CHECKING:  # torch takes a second to import, which preparing text need not wait for
    from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
SPLITMIX = 0xBF58476D1CE4E5B9  # the first multiplier of splitmix64 (Steele, Lea, Flood 2014)
WORD = (1 << 64) - 1
SHARD_DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


def scattered(index: int, size: int, keys: Sequence[int]) -> int:
    """The place of `index` in a permutation of range(size), computed and not held.

    It is a Feistel network (Luby and Rackoff 1988) on the next power of four, with a round for
    each key, walked on until it ends inside (Black and Rogaway 2002).
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = (right ^ key) * GOLDEN & WORD
            mixed = (mixed ^ mixed >> 29) * SPLITMIX & WORD
            left, right = right, left ^ (mixed >> 32) & mask
        index = left << half | right
        if index < size:
            return index


class Stream:
    """Token files, seen as one stream that is cut into rows of length + 1, one every `stride`
    tokens.

    Each row is read when it is asked for. Memory-mapped files would be as fast, but the pages that
    were touched count as this process's memory, which then grows with the shards.
    """

    # The order of so many rows is drawn and held, 8 bytes each. The order of more is computed, so
    # that memory does not grow with the shards.
    HELD = 1 << 20

    def __init__(self, files: Sequence[Path], dtype: str, length: int, stride: int) -> None:
        """`dtype` is a key of SHARD_DTYPES; a row predicts `length` tokens."""
        self.files, self.dtype = files, np.dtype(SHARD_DTYPES[dtype])
        sizes = [file.stat().st_size // self.dtype.itemsize for file in files]
        self.starts = np.cumsum([0, *sizes])  # of each file in the stream
        self.length, self.stride = length, stride
        self.tokens = int(self.starts[-1])
        self.rows = max(0, (self.tokens - 1 - length) // stride + 1)
        self.few, self.epoch = self.rows <= self.HELD, (-1, -1)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start .. end - 1, across file borders."""
        file, parts = int(np.searchsorted(self.starts, start, side="right")) - 1, []
        while start < end:
            stop = min(end, int(self.starts[file + 1]))
            size, offset = self.dtype.itemsize, start - int(self.starts[file])
            handle = os.open(self.files[file], os.O_RDONLY)  # a third of the time of np.fromfile
            try:
                parts.append(os.pread(handle, (stop - start) * size, offset * size))
            finally:
                os.close(handle)
            start, file = stop, file + 1
        return np.frombuffer(b"".join(parts), self.dtype).astype(np.int64)

    def row(self, seed: int, index: int) -> np.ndarray:
        """Row `index` of the endless shuffled stream: (length + 1,).

        Each epoch visits every row once, in an order and at a phase of its own: a pure function of
        (seed, index).
        """
        epoch, place = divmod(index, self.rows)
        if (seed, epoch) != self.epoch:
            rng = np.random.default_rng((seed, epoch))
            spare = self.tokens - 1 - self.length - (self.rows - 1) * self.stride
            self.phase = int(rng.integers(spare + 1))
            if self.few:
                self.order = rng.permutation(self.rows)
            else:
                self.keys = rng.integers(1 << 63, size=6).tolist()
            self.epoch = (seed, epoch)
        row = int(self.order[place]) if self.few else scattered(place, self.rows, self.keys)
        start = self.phase + row * self.stride
        return self.read(start, start + self.length + 1)


class Mixture:
    """Which source gives row `index` of a mixture: a pure function of (seed, index), with no run to
    replay.

    Indices come in blocks, and in each a source has the same number of draws, its share. It is
    spread evenly: one draw, at a random place, in each of as many equal stretches of the block. So
    after any number of rows a source has had its share of them, give or take 1 + share x sources.
    """

    BLOCK = 100_000  # rows; a share is rounded to a multiple of 1 / BLOCK

    def __init__(self, shares: Sequence[float]) -> None:
        """The shares of the sources, in any unit."""
        exact = np.array(shares) / sum(shares) * self.BLOCK
        self.counts = exact.astype(int)
        largest = np.argsort(self.counts - exact, kind="stable")  # remainders, the largest first
        self.counts[largest[: self.BLOCK - self.counts.sum()]] += 1
        self.block = (-1, -1)

    def place(self, seed: int, index: int) -> tuple[int, int]:
        """(source, how many earlier indices it has had): row `index` is that row of the source."""
        block, at = divmod(index, self.BLOCK)
        if (seed, block) != self.block:
            rng = np.random.default_rng((seed, block, 1))
            draws = [(np.arange(n) + rng.random(n)) / n for n in self.counts]
            order = np.argsort(np.concatenate(draws), kind="stable")
            self.source = np.repeat(np.arange(len(self.counts)), self.counts)[order]
            self.number = np.concatenate([np.arange(n) for n in self.counts])[order]
            self.block = (seed, block)
        source = int(self.source[at])
        return source, block * int(self.counts[source]) + int(self.number[at])


class Shards:
    """A folder made by stages.pretrain.prepare: rows of length + 1 tokens of a split, from one
    stream or a mixture of them.

    A row starts every `stride` tokens; None: every `length`, so that an epoch predicts each token
    once.
    """

    def __init__(self, folder: str, split: str, length: int, stride: int | None = None) -> None:
        """`split` is "train" or "eval". Raises InputError naming what is wrong with the folder."""
        path = Path(folder)
        if stride and stride > length:
            longer = f"row_stride {stride}: longer than a row (max_length {length})"
            raise InputError(f"{longer}, so text would be left out")
        if not (path / "shards.json").exists():
            raise InputError(
                f"{folder}: no shards.json there; make it with python -m stages.pretrain.prepare"
            )
        try:
            self.meta = json.loads((path / "shards.json").read_text())
            sources = self.meta.get("sources", ())
            shares = {source["source"]: source["share"] for source in sources if "share" in source}
            dtype, noted = self.meta["dtype"], self.meta.get("tokens", {}).get(split)
            if dtype not in SHARD_DTYPES or not all(share > 0 for share in shares.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged = f"{path / 'shards.json'}: not what stages.pretrain.prepare writes"
            raise InputError(f"{damaged}; run it again") from None
        self.shares, self.stride = shares or {folder: 1.0}, stride or length
        self.mixture = Mixture(list(self.shares.values()))
        names = [f"{split}-{n:02d}-*.bin" for n in range(len(shares))] or [f"{split}-*.bin"]
        files = [sorted(path.glob(name)) for name in names]
        self.streams = [Stream(found, dtype, length, self.stride) for found in files]
        self.tokens = sum(stream.tokens for stream in self.streams)
        self.rows = sum(stream.rows for stream in self.streams)
        if noted not in (None, self.tokens):
            differ = f"{folder}: {self.tokens} {split} tokens, shards.json notes {noted}"
            raise InputError(f"{differ}; run stages.pretrain.prepare again")
        for name, stream in zip(self.shares, self.streams, strict=True):
            if not stream.rows:
                of = f"the {split} split of {name}" if shares else f"the {split} split"
                few = f"{of} has {stream.tokens} tokens, fewer than one row of {length}"
                raise InputError(f"{folder}: {few}")

    def batch(self, seed: int, first: int, count: int) -> "Tensor":
        """Rows first .. first + count - 1 of the endless shuffled stream: (count, length + 1).

        Each is a pure function of (seed, index): the source by the mixture, then the next row of
        that source, which shows all its rows once before any of them twice.
        """
        import torch

        places = (self.mixture.place(seed, index) for index in range(first, first + count))
        rows = [self.streams[source].row(seed, index) for source, index in places]
        return torch.from_numpy(np.stack(rows))

    def epochs(self, rows: int) -> dict[str, float]:
        """How often a run of `rows` rows sees the tokens of each source; without a mixture, those
        of the whole folder."""
        whole = sum(self.shares.values())
        seen = {}
        for (name, share), stream in zip(self.shares.items(), self.streams, strict=True):
            seen[name] = rows * share / whole * stream.length / stream.tokens
        return seen
