"""Tokenising beside `datasets.map` with the same tokenizer; and training on shards a hundred times
as many.

    python -m benchmarks.prepare --text input.txt --threads 2

The text is cut at blank lines into documents of some 2 kB, repeated to so many megabytes of JSONL,
and a byte-level BPE is trained on it. Ours is `python -m stages.pretrain.prepare` from its launch
to its end: start, two readings, shards on the disk, checksums. The peer is the call of `map` alone,
batched, with the fast tokenizer of the same tokenizer.json, ids the only column, in a cache of its
own; what it takes to import, and to make an Arrow table of the JSONL, is not counted. With several
threads it is tried with as many processes and with as many threads of the tokenizer. Both must give
as many tokens.

Memory is the peak, over a side's processes together, of RssAnon (what it has allocated) and of Rss,
which also has the pages of mapped files. Those are the page cache, and the kernel takes them back,
so RssAnon is the honest one where a side maps files (datasets does); of ours, which reads each row
of a shard when it needs it, both must stay the same.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.side_by_side import ROOT, Missing, arguments, ended, flags, pin, side_by_side
from common.text.tokenizer import Tokenizer

PEER = """
import json, sys, time
import pyarrow.compute as pc
from datasets import load_dataset
from transformers import AutoTokenizer

rows, folder, cache, processes = *sys.argv[1:4], int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
plain = {"return_attention_mask": False, "return_token_type_ids": False}

def encode(batch):
    return {"input_ids": tokenizer(batch["text"], **plain)["input_ids"]}

data = load_dataset("json", data_files=rows, split="train", cache_dir=cache)
how = {"batched": True, "remove_columns": data.column_names}
how["num_proc"] = processes if processes > 1 else None
started = time.perf_counter()
data = data.map(encode, **how)
seconds = time.perf_counter() - started
tokens = pc.sum(pc.list_value_length(data.data.column("input_ids"))).as_py()
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""


class Watched(NamedTuple):
    """A program that has ended."""

    output: str
    seconds: float
    memory: dict[str, float]  # MB


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process and of all that it has started; nothing where there is no /proc."""
    found = {"anon": 0, "rss": 0}
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        for key, field in (("anon", "RssAnon"), ("rss", "VmRSS")):
            found[key] = int(fields[field].split()[0]) << 10
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        children = [memory_of(int(child)) for child in started]
    except (OSError, KeyError):  # it has just ended
        return found
    # After a vfork a child is not yet a program, and its memory is its parent's.
    children = [child for child in children if child != found]
    return {key: value + sum(child[key] for child in children) for key, value in found.items()}


def watch(command: list[str], **environment: str) -> Watched:
    """Run a program to its end, looking at its memory 20 times a second. Raises RuntimeError with
    what it said."""
    peak, started = {"anon": 0, "rss": 0}, time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                break
            peak = {key: max(peak[key], now) for key, now in memory_of(process.pid).items()}
        seconds = time.perf_counter() - started
        said.seek(0)
        output = said.read()
    if process.returncode:
        raise ended(command, process.returncode, output[-3000:])
    return Watched(output, seconds, {key: round(value / 1e6, 1) for key, value in peak.items()})


def documents_of(text: str, size: int = 2000) -> list[str]:
    """Paragraphs, as many to a document as make `size` characters."""
    documents = [""]
    for paragraph in text.split("\n\n"):
        if len(documents[-1]) >= size:
            documents.append("")
        documents[-1] += paragraph + "\n\n"
    return documents


def write_rows(file: Path, documents: list[str], size: float) -> None:
    """The documents again and again, until the text has `size` bytes."""
    rows = [(json.dumps({"text": text}) + "\n", len(text.encode())) for text in documents]
    with file.open("w", encoding="utf-8") as out:
        while size > 0:
            for row, length in rows:
                if size > 0:
                    out.write(row)
                    size -= length


class Bench:
    """The work of one comparison, in a folder with tokenizer/, and what is noted beside the
    speed."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Nothing has run yet."""
        self.folder, self.threads = folder, threads
        self.tokens: dict[str, int] = {}  # of each source; every run must find as many
        self.memory: dict[str, dict[str, float]] = {}

    def same_tokens(self, rows: Path, tokens: int) -> None:
        """Note the tokens of a source. Raises RuntimeError where another run found others."""
        if self.tokens.setdefault(rows.name, tokens) != tokens:
            raise RuntimeError(f"{rows.name}: {tokens} tokens, {self.tokens[rows.name]} before")

    def ours(self, rows: Path) -> float:
        """Our MB of text a second."""
        out = self.folder / "shards"
        shutil.rmtree(out, ignore_errors=True)
        keys = {
            "train_data": rows,
            "output_dir": out,
            "tokenizer": self.folder / "tokenizer",
            "num_proc": self.threads,
            "eval_fraction": 0.1,  # documents are held out whole, so that the tokens are the peer's
        }
        done = watch([sys.executable, "-m", "stages.pretrain.prepare", *flags(keys)])
        [source] = json.loads((out / "shards.json").read_text())["sources"]
        if rows.suffix == ".jsonl":
            ends = source["documents"]  # an end token behind each text
            self.same_tokens(rows, sum(source["tokens"].values()) - ends)
        self.memory[f"ours {rows.name}"] = done.memory
        return sum(source["bytes"].values()) / 1e6 / done.seconds

    def peer(self, rows: Path, megabytes: float, processes: int, parallel: bool = False) -> float:
        """The peer's MB of text a second; `parallel`: with threads of the tokenizer."""
        if missing := [name for name in ("datasets", "transformers") if not find_spec(name)]:
            raise Missing(f"pip install {' '.join(missing)}")
        cache = self.folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        words = map(str, (rows, self.folder / "tokenizer", cache, processes))
        threads = {
            "TOKENIZERS_PARALLELISM": str(parallel).lower(),
            "RAYON_NUM_THREADS": str(self.threads),
        }
        done = watch([sys.executable, "-c", PEER, *words], **threads)
        found = json.loads(done.output.strip().splitlines()[-1])
        shutil.rmtree(cache)
        self.same_tokens(rows, found["tokens"])
        self.memory[f"datasets.map {rows.name}"] = done.memory
        return megabytes / found["seconds"]


def write_shards(source: Path, folder: Path, tokens: int, size: int = 10_000_000) -> None:
    """The prepared shards again and again, until there are so many training tokens."""
    meta = json.loads((source / "shards.json").read_text())
    files = sorted(source.glob("train-*.bin"))
    ids = np.concatenate([np.fromfile(file, meta["dtype"]) for file in files])
    folder.mkdir()
    for file in [*source.glob("tokenizer*.json"), *source.glob("eval-*.bin")]:
        shutil.copy(file, folder)
    for number, start in enumerate(range(0, tokens, size)):
        rolled = np.roll(ids, -(start % len(ids)))
        shard = np.resize(rolled, min(size, tokens - start))
        shard.tofile(folder / f"train-{number:05d}.bin")
    meta["tokens"]["train"] = tokens
    (folder / "shards.json").write_text(json.dumps(meta))


def train(folder: Path, shards: Path, steps: int) -> tuple[float, dict[str, float]]:
    """(tokens/s, peak memory) of stages.pretrain.train with a small model."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    keys = {
        "train_data": shards,
        "output_dir": out,
        "max_steps": steps,
        "logging_steps": max(1, steps // 10),
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 128,
        "max_length": 128,
        "eval_rows": 16,
        "save_steps": "null",
    }
    done = watch([sys.executable, "-m", "stages.pretrain.train", *flags(keys)])
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens/s"] for row in rows if "tokens/s" in row]
    return statistics.median(speeds[1:]), done.memory


def compare_shards(folder: Path, tokens: int, steps: int, runs: int) -> dict[str, Any]:
    """Training on `tokens` tokens and on a hundred times as many, in turn; medians."""
    sets = {"small": tokens, "large": 100 * tokens}
    for name, count in sets.items():
        write_shards(folder / "shards", folder / name, count)
    found: dict[str, list] = {name: [] for name in sets}
    for number in range(runs + 1):
        for name in sets:
            speed, memory = train(folder, folder / name, steps)
            called = f"run {number}" if number else "warm-up"
            print(f"shards, {called}  {name:6} {speed:10,.0f} tokens/s  {memory}", flush=True)
            found[name] += [{"tokens/s": speed, **memory}] if number else []
    shutil.rmtree(folder / "large")
    keys = ("tokens/s", "anon", "rss")
    medians = {
        name: {key: statistics.median(run[key] for run in of_one) for key in keys}
        for name, of_one in found.items()
    }
    small, large = medians["small"], medians["large"]
    ratios = {key: round(large[key] / max(1e-9, small[key]), 3) for key in keys}
    return {"tokens": sets, **medians, "large_over_small": ratios}


def options() -> argparse.Namespace:
    """The arguments."""
    parser = arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text, the longer the better")
    size = "of text to tokenise; memory also at a fifth of it"
    parser.add_argument("--megabytes", type=float, default=100, help=size)
    parser.add_argument("--vocab_size", type=int, default=8192, help="ids of the BPE")
    small = "in the small set of shards; 0: leave that part out"
    parser.add_argument("--shard_tokens", type=int, default=1_000_000, help=small)
    parser.add_argument("--steps", type=int, default=300, help="of training on the shards")
    return parser.parse_args()


def measure_book(bench: Bench, rows: Path) -> None:
    """Our memory on the rows joined to one document."""
    book = rows.with_suffix(".txt")
    with book.open("w", encoding="utf-8") as out:
        for row in rows.open(encoding="utf-8"):
            out.write(json.loads(row)["text"])
    bench.ours(book)
    book.unlink()


def main() -> None:
    """Write the rows, measure memory and shards, run both sides."""
    args = options()
    pin(args.threads)
    text = args.text.read_text(encoding="utf-8")
    documents, sizes = documents_of(text), (args.megabytes / 5, args.megabytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, args.threads)
        Tokenizer.train_bpe([text], args.vocab_size).save(folder / "tokenizer")
        part, whole = (folder / f"{size:g}MB.jsonl" for size in sizes)
        for rows, size in zip((part, whole), sizes, strict=True):
            write_rows(rows, documents, size * 1e6)
            measure_book(bench, rows)
        bench.ours(part)
        shards = None
        if args.shard_tokens:
            shards = compare_shards(folder, args.shard_tokens, args.steps, args.runs)
        with contextlib.suppress(Missing):
            bench.peer(part, sizes[0], args.threads)
        sides = {
            "ours": lambda: bench.ours(whole),
            "datasets.map": lambda: bench.peer(whole, sizes[1], args.threads),
        }
        if args.threads > 1:
            sides["datasets.map, threads"] = lambda: bench.peer(whole, sizes[1], 1, parallel=True)
        side_by_side(
            "prepare", "MB/s", sides, runs=args.runs, memory_MB=bench.memory, shards=shards
        )


if __name__ == "__main__":
    main()
