"""Documents -> shard files: by several processes, in order, and resumable after a kill at any moment.

The ids of each document depend on nothing else, so neither the number of processes nor an interruption shows in the
files. Every few seconds a journal notes how far they are good; what lies behind is cut off and made again.
"""

import collections
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.chat import stop_ids
from common.checkpoint import dump, sha256, write_atomically
from common.config import InputError
from common.data import SHARD_DTYPES
from common.tokenizer import Tokenizer

CHUNK = 1 << 18  # characters that a process is given at once
SAVE_SECONDS = 5.0  # between two entries in the journal
SMALL = 100_000_000  # bytes; less is tokenised before other processes have started
JOURNAL = "progress.json"


class Document(NamedTuple):
    """One document: its text for each split ("train", "eval" or both, when it gives its tail), and what an error calls it."""

    parts: dict[str, str]
    origin: str


class Encoded(NamedTuple):
    """A chunk of documents of one source as ids of each split, an end-of-text behind each text."""

    source: int
    documents: int
    bytes: dict[str, int]
    ids: dict[str, np.ndarray]


def encode(tokenizer: Tokenizer, source: int, documents: Sequence[Document]) -> Encoded:
    """Raises InputError, with the document's origin, for a text that the tokenizer refuses."""
    ids: dict[str, list[int]] = {"train": [], "eval": []}
    size = {"train": 0, "eval": 0}
    for document in documents:
        for split, text in document.parts.items():
            try:
                ids[split] += tokenizer.encode(text)
            except InputError as error:
                raise InputError(f"{document.origin}: {error}") from None
            ids[split] += stop_ids(tokenizer)
            size[split] += len(text.encode())
    return Encoded(source, len(documents), size, {split: np.array(found, np.uint32) for split, found in ids.items()})


def start_worker(tokenizer: Tokenizer) -> None:
    global worker_tokenizer
    worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def end_with_parent() -> None:  # which may be killed without a chance to say so
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(source: int, documents: Sequence[Document]) -> Encoded:
    return encode(worker_tokenizer, source, documents)


def encode_all(tokenizer: Tokenizer, chunks: Iterable[tuple[int, list[Document]]], processes: int) -> Iterator[Encoded]:
    """`encode` of each (source, documents), in their order. Few chunks are held at a time.

    Processes and not the threads of tiktoken's own batches: with short documents threads wait for Python's lock more than
    they work. Spawned, as a fork of a process with threads (tokenizers', Arrow's, the Hub's) may hang.
    """
    if processes == 1:
        yield from (encode(tokenizer, *chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker, initargs=(tokenizer,)) as pool:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, *chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunked(source: int, documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += sum(map(len, document.parts.values()))
        if size >= CHUNK:
            yield source, chunk
            chunk, size = [], 0
    if chunk:
        yield source, chunk


class ShardWriter:
    """Appends ids to `{prefix}-NNNNN.bin` files of shard_tokens each; `tokens` and `crc` (CRC-32) are of all it has taken."""

    def __init__(self, folder: Path, prefix: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.prefix, self.dtype, self.shard_tokens = folder, prefix, np.dtype(SHARD_DTYPES[dtype]), shard_tokens
        self.tokens, self.crc, self.file = 0, 0, None

    def path(self, number: int) -> Path:
        return self.folder / f"{self.prefix}-{number:05d}.bin"

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            number, used = divmod(self.tokens, self.shard_tokens)
            if used == 0 or self.file is None:
                self.sync()
                self.file = self.path(number).open("ab" if used else "wb")
            part = ids[: self.shard_tokens - used].astype(self.dtype).tobytes()
            self.file.write(part)
            self.crc = zlib.crc32(part, self.crc)
            self.tokens += len(part) // self.dtype.itemsize
            ids = ids[self.shard_tokens - used :]

    def sync(self) -> None:
        """All that was written is on the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def restore(self, tokens: int, crc: int) -> bool:
        """Cut the files back to their first `tokens` tokens; False if these are not those that `crc` was taken of."""
        self.tokens, self.crc = tokens, 0
        for number, start in enumerate(range(0, tokens, self.shard_tokens)):
            left = min(self.shard_tokens, tokens - start) * self.dtype.itemsize
            if not self.path(number).exists() or self.path(number).stat().st_size < left:
                return False
            os.truncate(self.path(number), left)
            with self.path(number).open("rb") as file:
                while block := file.read(1 << 20):
                    self.crc = zlib.crc32(block, self.crc)
        for number in range(-(-tokens // self.shard_tokens), len(list(self.folder.glob(f"{self.prefix}-*.bin")))):
            self.path(number).unlink(missing_ok=True)
        return self.crc == crc


class Shelf:
    """The shard files in a folder and the journal that tells how far they are good.

    journal: "key" (fingerprint of what the files are made from), "dtype", "shard_tokens", "mixed" (each source has files of
    its own), "crc" of each writer, and "sources", for each the counts of `Encoded`: done (documents), tokens, bytes.
    """

    def __init__(self, folder: Path, journal: dict[str, Any]) -> None:
        self.folder, self.journal, self.sources = folder, journal, journal["sources"]
        self.writers = {
            prefix: ShardWriter(folder, prefix, journal["dtype"], journal["shard_tokens"])
            for prefix in (self.prefix(split, n) for n in range(len(self.sources)) for split in ("train", "eval"))
        }

    @classmethod
    def begin(cls, folder: Path, sources: Sequence[Mapping[str, Any]], **journal: Any) -> "Shelf":
        """An empty shelf, in a folder that has the tokenizer."""
        for old in folder.glob("*.bin"):
            old.unlink()
        none = [{"done": 0, "tokens": {"train": 0, "eval": 0}, "bytes": {"train": 0, "eval": 0}} for _ in sources]
        journal["sources"] = [{**source, **counts} for source, counts in zip(sources, none, strict=True)]
        shelf = cls(folder, journal | {"crc": {}, "tokenizer": sha256(folder / "tokenizer.json")})
        shelf.save()
        return shelf

    @classmethod
    def resume(cls, folder: Path, key: str) -> "Shelf | None":
        """What an earlier run with this key left, cut back to what its journal vouches for; None if there is nothing good."""
        try:
            journal = json.loads((folder / JOURNAL).read_text())
            if journal["key"] != key or journal["tokenizer"] != sha256(folder / "tokenizer.json"):
                return None
            shelf = cls(folder, journal)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        tokens = collections.Counter()
        for n, source in enumerate(shelf.sources):
            tokens.update({shelf.prefix(split, n): count for split, count in source["tokens"].items()})
        good = [writer.restore(tokens[prefix], journal["crc"].get(prefix, 0)) for prefix, writer in shelf.writers.items()]
        return shelf if all(good) else None

    def prefix(self, split: str, source: int) -> str:
        return f"{split}-{source:02d}" if self.journal["mixed"] else split

    def add(self, chunk: Encoded) -> None:
        source = self.sources[chunk.source]
        source["done"] += chunk.documents
        for split, ids in chunk.ids.items():
            self.writers[self.prefix(split, chunk.source)].write(ids)
            source["tokens"][split] += len(ids)
            source["bytes"][split] += chunk.bytes[split]

    def save(self) -> None:
        for writer in self.writers.values():
            writer.sync()
        self.journal["crc"] = {prefix: writer.crc for prefix, writer in self.writers.items()}
        write_atomically(self.folder / JOURNAL, dump(self.journal))

    def total(self, count: str, split: str) -> int:
        """Of all sources: "tokens" or "bytes" of a split."""
        return sum(source[count][split] for source in self.sources)


def tokenise(shelf: Shelf, tokenizer: Tokenizer, documents_of: Callable[[int], Iterator[Document]], processes: int) -> None:
    """Encode what is not on the shelf yet; documents_of(source) gives all documents of one, always the same."""

    def rest() -> Iterator[tuple[int, list[Document]]]:
        for n, source in enumerate(shelf.sources):
            if source["done"] < source["documents"]:
                yield from chunked(n, itertools.islice(documents_of(n), source["done"], source["documents"]))

    size = sum(source["size"] for source in shelf.sources)
    done = shelf.total("bytes", "train") + shelf.total("bytes", "eval")
    saved = time.monotonic()
    with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc="tokenise", mininterval=1, disable=None) as bar:
        for chunk in encode_all(tokenizer, rest(), processes):
            shelf.add(chunk)
            bar.update(sum(chunk.bytes.values()))
            if time.monotonic() - saved >= SAVE_SECONDS:
                shelf.save()
                saved = time.monotonic()
    shelf.save()
    for source in shelf.sources:
        if source["done"] < source["documents"]:
            raise InputError(f"{source['source']}: changed while it was being read; run again when it is complete")
