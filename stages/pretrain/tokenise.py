"""Documents -> shard files: by several processes, in order, and resumable after a kill at any
moment.

The ids of each document depend on nothing else, so neither the number of processes nor an
interruption shows in the files. Every few seconds a journal notes how far they are good; what lies
behind is cut off and made again.
"""

import collections
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.program.errors import InputError
from common.program.files import MANIFEST, dump, sha256, write_atomically
from common.text.chat import stop_ids
from common.text.tokenizer import GAPS, Tokenizer
from stages.pretrain.shards import SHARDS, ShardWriter

CHUNK = 1 << 18  # characters that a process is given at once
GAPLESS = 1 << 20  # characters in which a gap is looked for; more than CHUNK
LOOKAHEAD = 512  # characters, more than a match of a tokenizer's pattern looks beyond its end
SAVE_SECONDS = 5.0  # between two entries in the journal
SMALL = 100_000_000  # bytes; less is tokenised before other processes have started
JOURNAL = "progress.json"


class Document(NamedTuple):
    """One document, or a piece of a long one."""

    parts: dict[str, str]  # its text for each split: "train", "eval", both where it gives its tail
    origin: str  # what an error calls it
    more: str | None = None  # the split of its next piece; None: it is complete


class Encoded(NamedTuple):
    """A chunk of documents of one source as ids of each split, an end-of-text behind each text."""

    source: int
    documents: int  # that it completes
    pieces: int
    bytes: dict[str, int]  # of each split's text
    ids: dict[str, np.ndarray]  # of each split


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
            if split != document.more:
                ids[split] += stop_ids(tokenizer)
            size[split] += len(text.encode())
    complete = sum(document.more is None for document in documents)
    arrays = {split: np.array(found, np.uint32) for split, found in ids.items()}
    return Encoded(source, complete, len(documents), size, arrays)


worker_tokenizer: Tokenizer  # of each of the processes, from `start_worker` on


def start_worker(tokenizer: Tokenizer) -> None:
    """What each of the processes does first."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    for kind in (signal.SIGINT, signal.SIGHUP):  # the terminal's, which the parent handles
        signal.signal(kind, signal.SIG_IGN)

    def end_with_parent() -> None:
        """A parent may be killed without a chance to say so."""
        parent = multiprocessing.parent_process()
        assert parent is not None  # this is one of the pool's processes
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work(source: int, documents: Sequence[Document]) -> Encoded:
    """`encode` in one of the processes."""
    return encode(worker_tokenizer, source, documents)


def encode_all(
    tokenizer: Tokenizer, chunks: Iterable[tuple[int, list[Document]]], processes: int
) -> Iterator[Encoded]:
    """`encode` of each (source, documents), in their order. Few chunks are held at a time.

    Processes and not the threads of tiktoken's own batches: with short documents threads wait for
    Python's lock more than they work. Spawned, as a fork of a process with threads (tokenizers',
    Arrow's, the Hub's) may hang.
    """
    if processes == 1:
        yield from (encode(tokenizer, *chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, start_worker, (tokenizer,))
    with pool:
        waiting: collections.deque[Future[Encoded]] = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, *chunk))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def between_words(texts: Iterable[str], gap: re.Pattern) -> Iterator[str]:
    """The same text in pieces of CHUNK characters, or as many more as there are to the next gap;
    where none comes in GAPLESS characters, as many as `whole_words` has of them."""
    held, seen = "", 0  # so much of what is held has no gap behind its first CHUNK characters
    for text in texts:
        held, start = held + text, 0
        while True:
            found = gap.search(held, start + max(CHUNK, seen - 1), start + GAPLESS)
            if found:
                end = found.end()
            elif len(held) - start >= GAPLESS:
                end = start + whole_words(held[start : start + GAPLESS], gap)
            else:
                break
            yield held[start:end]
            start, seen = end, 0
        held = held[start:]
        seen = len(held)
    if held:
        yield held


def whole_words(text: str, gap: re.Pattern) -> int:
    """How many characters of a text that goes on, and has no gap, the tokenizer's own pattern cuts
    into words, so that their ids are those of the whole text. All of them, if it is in the midst of
    one word (DNA)."""
    import regex  # tiktoken's own: its pattern has classes that `re` does not know

    pattern, end = next(pattern for pattern, known in GAPS.items() if known == gap.pattern), 0
    for word in regex.finditer(pattern, text):
        if word.end() > len(text) - LOOKAHEAD:
            break
        end = word.end()
    return end or len(text)


def sides(texts: Iterable[str], train: int) -> Iterator[tuple[str, str]]:
    """(split, text): the first `train` characters, and what is behind them."""
    for text in texts:
        if head := text[:train]:
            yield "train", head
        if tail := text[train:]:
            yield "eval", tail
        train = max(0, train - len(text))


def pieces(texts: Iterable[str], train: int, gap: re.Pattern) -> Iterator[tuple[str, str]]:
    """(split, text) of a long document; a tail of nothing but blanks is left out."""
    for split, group in itertools.groupby(sides(texts, train), key=lambda side: side[0]):
        held, full = "", split == "train"
        for text in between_words((text for _, text in group), gap):
            held, full = held + text, full or bool(text.strip())
            if full:
                yield split, held
                held = ""


def split_document(
    texts: Iterable[str], length: int, train: int, gap: re.Pattern | None, origin: str
) -> Iterator[Document]:
    """A document of so many characters, the first `train` of them for training; a long one in
    pieces, if it has gaps."""
    if gap is None or length <= CHUNK:
        parts = dict(sides(["".join(texts)], train))
        if "eval" in parts and not parts["eval"].strip():
            del parts["eval"]  # a tail of nothing but blanks
        yield Document(parts, origin)
        return
    found, start = pieces(texts, train, gap), 0
    split, text = next(found)
    for following in found:
        yield Document({split: text}, f"{origin} from character {start} on", more=following[0])
        start += len(text)
        split, text = following
    yield Document({split: text}, f"{origin} from character {start} on")


def first(number: int, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents until so many are complete."""
    for document in documents if number else ():
        yield document
        number -= document.more is None
        if not number:
            return


def chunked(source: int, documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    """(source, some of its documents): as many as have CHUNK characters together."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += sum(map(len, document.parts.values()))
        if size >= CHUNK:
            yield source, chunk
            chunk, size = [], 0
    if chunk:
        yield source, chunk


def no_counts() -> dict[str, Any]:
    """The counts of a source of which nothing is tokenised."""
    tokens, size = {"train": 0, "eval": 0}, {"train": 0, "eval": 0}
    return {"done": 0, "pieces": 0, "tokens": tokens, "bytes": size}


def has_journal(folder: Path) -> bool:
    """Whether the folder's journal is one of a Shelf, and not another's file of that name."""
    try:
        journal = json.loads((folder / JOURNAL).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(journal, dict) and {"key", "crc", "chunk", "sources"} <= journal.keys()


class Shelf:
    """The shard files in a folder and the journal that tells how far they are good.

    The journal has "key" (fingerprint of what the files are made from), "dtype", "shard_tokens",
    "mixed" (each source has files of its own), "chunk" (CHUNK), "tokenizer" (its sha256), "crc" of
    each writer, and "sources": what `begin` was given of each, and its `no_counts`, counted up.
    """

    def __init__(self, folder: Path, journal: dict[str, Any]) -> None:
        """The shelf that `journal` describes. Who makes one calls `begin` or `resume`."""
        self.folder, self.journal, self.sources = folder, journal, journal["sources"]
        self.writers: dict[str, ShardWriter] = {}
        for n in range(len(self.sources)):
            for split in ("train", "eval"):
                prefix = self.prefix(split, n)
                writer = ShardWriter(folder, prefix, journal["dtype"], journal["shard_tokens"])
                self.writers[prefix] = writer

    @classmethod
    def begin(cls, folder: Path, sources: Sequence[Mapping[str, Any]], **journal: Any) -> "Shelf":
        """An empty shelf, in a folder that has the tokenizer."""
        for name in SHARDS:
            for old in folder.glob(name):
                old.unlink()
        journal |= {
            "sources": [{**source, **no_counts()} for source in sources],
            "crc": {},
            "chunk": CHUNK,
            "tokenizer": sha256(folder / "tokenizer.json"),
        }
        shelf = cls(folder, journal)
        shelf.save()
        return shelf

    @classmethod
    def resume(cls, folder: Path, key: str) -> "Shelf | None":
        """What an earlier run with this key left, cut back to what its journal vouches for; None if
        there is nothing good."""
        try:
            journal = json.loads((folder / JOURNAL).read_text())
            made_from = (journal["key"], journal["chunk"], journal["tokenizer"])
            if made_from != (key, CHUNK, sha256(folder / "tokenizer.json")):
                return None
            shelf = cls(folder, journal)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        (folder / MANIFEST).unlink(missing_ok=True)  # before a file that it lists is touched
        tokens: collections.Counter[str] = collections.Counter()
        for n, source in enumerate(shelf.sources):
            for split, count in source["tokens"].items():
                tokens[shelf.prefix(split, n)] += count
        good = [
            writer.restore(tokens[prefix], journal["crc"].get(prefix, 0))
            for prefix, writer in shelf.writers.items()
        ]
        return shelf if all(good) else None

    def prefix(self, split: str, source: int) -> str:
        """What the names of the shard files of a split of a source begin with."""
        return f"{split}-{source:02d}" if self.journal["mixed"] else split

    def add(self, chunk: Encoded) -> None:
        """Put a chunk behind what is there; the journal does not vouch for it until `save`."""
        source = self.sources[chunk.source]
        source["done"] += chunk.documents
        source["pieces"] += chunk.pieces
        for split, ids in chunk.ids.items():
            self.writers[self.prefix(split, chunk.source)].write(ids)
            source["tokens"][split] += len(ids)
            source["bytes"][split] += chunk.bytes[split]

    def save(self) -> None:
        """Bring all to the disk, then the journal that vouches for it."""
        for writer in self.writers.values():
            writer.sync()
        self.journal["crc"] = {prefix: writer.crc for prefix, writer in self.writers.items()}
        write_atomically(self.folder / JOURNAL, dump(self.journal))

    def total(self, count: str, split: str) -> int:
        """Of all sources: "tokens" or "bytes" of a split."""
        return sum(source[count][split] for source in self.sources)


def tokenise(
    shelf: Shelf,
    tokenizer: Tokenizer,
    documents_of: Callable[[int], Iterator[Document]],
    processes: int,
) -> None:
    """Encode what is not on the shelf yet; documents_of(source) gives all documents of one, always
    the same."""
    size = sum(source["size"] for source in shelf.sources)
    done = shelf.total("bytes", "train") + shelf.total("bytes", "eval")
    saved = time.monotonic()
    style = {"unit": "B", "unit_scale": True, "mininterval": 1, "disable": None}
    with tqdm(total=size, initial=done, desc="tokenise", **style) as bar:
        for chunk in encode_all(tokenizer, missing(shelf, documents_of), processes):
            shelf.add(chunk)
            bar.update(sum(chunk.bytes.values()))
            if time.monotonic() - saved >= SAVE_SECONDS:
                shelf.save()
                saved = time.monotonic()
    shelf.save()
    for source in shelf.sources:
        if source["done"] < source["documents"]:
            changed = f"{source['source']}: changed while it was being read"
            raise InputError(f"{changed}; run again when it is complete")


def missing(
    shelf: Shelf, documents_of: Callable[[int], Iterator[Document]]
) -> Iterator[tuple[int, list[Document]]]:
    """(source, documents) that the shelf does not have yet, in chunks."""
    for n, source in enumerate(shelf.sources):
        if left := source["documents"] - source["done"]:
            documents = itertools.islice(documents_of(n), source["pieces"], None)
            yield from chunked(n, first(left, documents))
