"""Rows and token shards, and the order in which they are seen: a pure function of (seed, step, rank).

Nothing here has a position to save: a run that starts again at step s sees what it would have seen.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.config import InputError

SHARD_DTYPES = {"uint16": np.uint16, "uint32": np.uint32}


class Row(NamedTuple):
    """One record, and where it came from: what an error message calls it (`file:line`)."""

    data: dict[str, Any]
    origin: str


def read_rows(source: str) -> list[Row]:
    """All records of a .jsonl, .json (a list), .parquet or .txt file, a folder of such, or a Hub data set's train split.

    A .txt file is one record {"text": ...}. Raises InputError naming file and line of anything that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".json", ".parquet", ".txt"))
        rows = [row for file in files for row in read_rows(str(file))]
    elif not path.exists():
        rows = read_hub(source)
    elif path.suffix == ".parquet":
        import datasets  # 1 s to import: only who needs it pays

        try:
            dataset = datasets.Dataset.from_parquet(source)
        except Exception as error:  # pyarrow's or datasets' own, by release
            raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:160]})") from None
        rows = [Row(data, f"{path}:{n}") for n, data in enumerate(dataset, 1)]
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first (iconv -t utf-8)") from None
        if path.suffix == ".txt":
            rows = [Row({"text": text}, str(path))]
        elif path.suffix == ".json":
            rows = [Row(data, f"{path}:row {n}") for n, data in enumerate(parse_json(text, str(path), list), 1)]
        else:
            # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            rows = [Row(parse_json(line, f"{path}:{n}", dict), f"{path}:{n}") for n, line in lines]
    for row in rows:
        if not isinstance(row.data, dict):
            raise InputError(f"{row.origin}: a row must be a JSON object, this is {str(row.data)[:60]!r}")
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def parse_json(text: str, origin: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(value, kind):
        wanted = "list of rows" if kind is list else "object"
        raise InputError(f"{origin}: expected a JSON {wanted}, found {type(value).__name__}")
    return value


def read_hub(name: str) -> list[Row]:
    if name.count("/") > 1 or name.startswith((".", "/")) or Path(name).suffix in (".jsonl", ".json", ".parquet", ".txt"):
        raise InputError(f"{name}: no such file")
    import datasets

    try:
        dataset = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library's own errors differ from release to release
        reason = str(error).splitlines()[0][:160]
        raise InputError(f"{name}: neither a file here nor a data set that the Hub would give ({reason})") from None
    return [Row(data, f"{name}:{n}") for n, data in enumerate(dataset, 1)]


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-padded ids: (rows, longest)."""
    size = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (size - len(row))] for row in rows])


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, window: int = 16) -> list[list[int]]:
    """One epoch of row indices in batches; every row once, the last batch may be smaller.

    Shuffled, then sorted by length inside windows of `window` batches, so that a batch pads little; then the batches
    are shuffled. A pure function of its arguments. The short batch stays last.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)).tolist()
    whole: list[list[int]] = []
    for start in range(0, len(order), batch_size * window):
        rows = sorted(order[start : start + batch_size * window], key=lambda row: lengths[row])
        whole += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    short = [batch for batch in whole if len(batch) < batch_size]
    full = [batch for batch in whole if len(batch) == batch_size]
    return [full[i] for i in rng.permutation(len(full))] + short


class Order:
    """Which rows make up the global batch of a step: a pure function of (seed, step). Epochs follow each other."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, drop_last: bool = False) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.per_epoch = len(lengths) // batch_size if drop_last else -(-len(lengths) // batch_size)
        self.epoch: tuple[int, list[list[int]]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if self.epoch[0] != epoch:
            self.epoch = (epoch, batches(self.lengths, self.batch_size, self.seed, epoch))
        return self.epoch[1][place]


def hold_out(rows: Sequence[Row], fraction: float, prompt_of: Callable[[dict[str, Any]], Any]) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, no prompt on both sides: held out is the last `fraction` of the different prompts.

    Raises InputError when that leaves nothing to train on.
    """
    prompts = []
    for row in rows:
        try:
            prompts.append(str(prompt_of(row.data)))
        except InputError:  # whoever tokenizes the row names it
            prompts.append(row.origin)
    different = list(dict.fromkeys(prompts))
    held = set(different[-max(1, int(len(different) * fraction)) :])
    sides = [[row for row, prompt in zip(rows, prompts, strict=True) if (prompt in held) is side] for side in (False, True)]
    if not sides[0]:
        raise InputError(f"{rows[0].origin}: all {len(rows)} rows share the held-out prompts; give eval_data and more prompts")
    return sides[0], sides[1]


def share(rows: Sequence[Any], rank: int, processes: int, micro_batch: int) -> Iterator[Sequence[Any]]:
    """This process's part of a global batch, in micro-batches; interleaved, so that lengths stay balanced."""
    mine = rows[rank::processes]
    for start in range(0, len(mine), micro_batch):
        yield mine[start : start + micro_batch]


class Shards:
    """A folder of memory-mapped token files `{split}-NNNNN.bin`, seen as one stream cut into rows of length + 1."""

    def __init__(self, folder: str, split: str, length: int) -> None:
        meta = Path(folder) / "shards.json"
        if not meta.exists():
            raise InputError(f"{folder}: no shards.json there; make it with python -m stages.pretrain.prepare")
        self.meta = json.loads(meta.read_text())
        dtype = SHARD_DTYPES[self.meta["dtype"]]
        files = sorted(Path(folder).glob(f"{split}-*.bin"))
        self.maps = [np.memmap(file, dtype=dtype, mode="r") for file in files]
        self.starts = np.cumsum([0, *map(len, self.maps)])  # of each file in the stream
        self.length = length
        self.tokens = int(self.starts[-1])
        if self.tokens != (noted := self.meta.get("tokens", {}).get(split, self.tokens)):
            raise InputError(
                f"{folder}: {self.tokens} {split} tokens, shards.json notes {noted}; run stages.pretrain.prepare again"
            )
        self.rows = max(0, (self.tokens - 1) // length)
        if not self.rows:
            raise InputError(f"{folder}: the {split} split has {self.tokens} tokens, fewer than one row of {length}")
        self.epoch, self.permutation = (-1, -1), np.empty(0)

    def row(self, start: int) -> np.ndarray:
        """length + 1 tokens from `start` on, across file borders."""
        end, parts = start + self.length + 1, []
        file = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < end:
            offset = start - self.starts[file]
            parts.append(self.maps[file][offset : offset + end - start])
            start, file = start + len(parts[-1]), file + 1
        return np.concatenate(parts).astype(np.int64)

    def batch(self, seed: int, first: int, count: int) -> Tensor:
        """Rows first .. first + count - 1 of the endless shuffled stream: (count, length + 1).

        Each epoch visits every row once, in an order and at a phase of its own: a pure function of (seed, index).
        """
        return torch.from_numpy(np.stack([self.row(self.start(seed, first + i)) for i in range(count)]))

    def start(self, seed: int, index: int) -> int:
        epoch, place = divmod(index, self.rows)
        if (seed, epoch) != self.epoch:
            rng = np.random.default_rng((seed, epoch))
            spare = self.tokens - 1 - self.rows * self.length
            self.phase = int(rng.integers(spare + 1))
            self.permutation, self.epoch = rng.permutation(self.rows), (seed, epoch)
        return self.phase + int(self.permutation[place]) * self.length
