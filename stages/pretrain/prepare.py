"""Text -> tokenizer and token shards.

    python -m stages.pretrain.prepare --config configs/demo/prepare.yaml

Each document is followed by <|endoftext|>; its text is encoded as ordinary text, so that nothing in
it ends it early. A source of one document (a book) gives its tail to the evaluation split, a source
of many gives whole documents.

The sources are read twice (three times where a BPE is trained), never held: first to count, as an
exact split needs the number of documents, and so that a broken row shows before hours of
tokenising. The same command goes on after a kill.
"""

import collections
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import (
    InputPath,
    OutputDir,
    RowsPath,
    cli,
    fingerprint,
    stage_config,
    to_dict,
)
from common.config.training import ReadsRows, Seed
from common.handoff.locate import load_tokenizer
from common.handoff.ownership import claim
from common.handoff.report import STAGE, TOKENIZER, Gate, stage_report, vouch, write_stage_report
from common.program.errors import InputError
from common.program.files import MANIFEST, dump, write_atomically
from common.program.signals import interrupt_with
from common.rows.shards import Mixture
from common.rows.sources import BadRows, Row, content_of, iter_rows
from common.text.chat import rows_to_messages
from common.text.tokenizer import GAPS, PATTERN, Tokenizer, check_text
from stages.pretrain.shards import SHARDS
from stages.pretrain.tokenise import (
    JOURNAL,
    SMALL,
    Document,
    Shelf,
    has_journal,
    split_document,
    tokenise,
)

PUBLISHED = (*TOKENIZER, *SHARDS, "shards.json", STAGE)
OWN_TOKENIZERS = ("bpe", "characters")  # what `tokenizer` may be beside a directory or Hub id


@stage_config
class Config(ReadsRows):
    """Tokenise text into shards for pretraining."""

    train_data: Annotated[list[RowsPath], Field(min_length=1)]
    """Files, folders or Hub data sets (name or name:config): .txt, .jsonl, .json or .parquet, each
    also .gz or .zst, with a `text` column or an SFT format."""
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """One for each entry of train_data: its share of the rows that training sees, in any unit.
    Null: all text is one stream. Other weights take the shards of the same sources as they are."""
    output_dir: OutputDir
    """Where tokenizer and shards go."""
    tokenizer: InputPath = "bpe"
    """bpe (byte-level, trained here), characters, or a directory or Hub id to take one from."""
    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 1024
    """Ids of a BPE trained here, control tokens included."""
    tokenizer_documents: Annotated[int, Field(gt=0)] = 20_000
    """Documents that the BPE is trained on, drawn at random."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the text held out for evaluation."""
    shard_tokens: Annotated[int, Field(gt=0)] = 100_000_000
    """Tokens in one shard file."""
    num_proc: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes that tokenise; null: one a core, or just one for less than 100 MB of text. The
    shards are the same."""
    seed: Seed = 0
    """Seed of the split and of the tokenizer's sample."""

    def __post_init__(self) -> None:
        """ValueError for keys that contradict each other."""
        if self.weights is None:
            return
        if len(self.weights) != len(self.train_data):
            numbers = f"{len(self.weights)} weights for {len(self.train_data)} entries"
            raise ValueError(f"{numbers} of train_data; give each one")
        if len(set(self.train_data)) < len(self.train_data):
            raise ValueError(
                "train_data names a source twice; name it once, with the sum of its weights"
            )
        lowest = 1 / Mixture.BLOCK
        for source, share in zip(self.train_data, self.shares, strict=True):
            if share * Mixture.BLOCK < 1:
                raise ValueError(
                    f"the weight of {source} is below {lowest:g} of their sum; leave it out"
                )

    @property
    def shares(self) -> list[float]:
        """The weights, brought to a sum of 1."""
        assert self.weights is not None  # who asks for shares has weights
        return [weight / sum(self.weights) for weight in self.weights]


def text_of(row: dict[str, Any]) -> str:
    """The document in a row: its `text`, or the conversation of an SFT row with its messages a line
    apart."""
    if isinstance(row.get("text"), str):
        return check_text(row["text"])
    try:
        return check_text("\n".join(message["content"] for message in rows_to_messages(row)))
    except InputError as error:
        told = f"no `text` column, and as a conversation: {error}"
        raise InputError(told, error.reason) from None


def texts_of(row: Row, rows: Iterator[Row]) -> Iterator[str]:
    """The text of the document that begins with `row`: it has rest until the last of its rows."""
    yield row.parsed
    while row.rest:
        row = next(rows)
        yield row.parsed


def survey(source: str, on_bad_row: str, bar: tqdm) -> dict[str, Any]:
    """Numbers of documents, of empty ones and of bad ones by reason, which are left out; the size
    of the text in bytes."""
    found, bad = {"documents": 0, "empty": 0, "size": 0}, BadRows(on_bad_row)
    rows = iter_rows(source, text_of, bad, pieces=True)
    for row in rows:
        full = bool(row.rest or row.parsed.strip())
        found["documents" if full else "empty"] += 1
        found["size"] += sum(len(text.encode()) for text in texts_of(row, rows)) if full else 0
        bar.update()
    if not found["documents"]:
        empty = f"all {found['empty']} documents are empty"
        raise InputError(f"train_data {source}: too little text: {empty}")
    return found | {"skipped": bad.counts}


def held_out_masks(
    numbers: Sequence[int], eval_fraction: float, seed: int
) -> list[np.ndarray | None]:
    """For sources of so many documents: which are held out; None where that is less than one, and
    each gives its tail."""
    rng = np.random.default_rng(seed)
    masks: list[np.ndarray | None] = []
    for number in numbers:
        if number * eval_fraction >= 1:
            mask = np.zeros(number, bool)
            mask[rng.permutation(number)[: round(number * eval_fraction)]] = True
            masks.append(mask)
        else:
            masks.append(None)
    return masks


def documents_of(
    source: str, held_out: np.ndarray | None, gap: re.Pattern | None, cfg: Config
) -> Iterator[Document]:
    """The documents of a source in their order, each for its split; those that `survey` left out
    are left out again.

    Long ones come in pieces, cut behind a match of `gap`.
    """
    rows = iter_rows(source, text_of, BadRows(cfg.on_bad_row, shown=0), pieces=gap is not None)
    for n, row in enumerate(row for row in rows if row.rest or row.parsed.strip()):
        length = len(row.parsed) + row.rest
        if held_out is None:
            tail = round(length * cfg.eval_fraction)
        else:
            tail = length if held_out[n] else 0
        yield from split_document(texts_of(row, rows), length, length - tail, gap, row.origin)


def make_tokenizer(cfg: Config, documents: Iterator[Document], number: int) -> Tokenizer:
    """A new one, from `documents`, of which `number` are for training."""
    if cfg.tokenizer == "characters":
        texts = (text for document in documents for text in document.parts.values())
        return Tokenizer.characters(texts)
    rng, chosen = np.random.default_rng((cfg.seed, 1)), np.zeros(number, bool)
    chosen[rng.permutation(number)[: cfg.tokenizer_documents]] = True

    def sample() -> Iterator[str]:
        """The training text of the documents that were chosen."""
        n = 0
        for document in documents:
            if "train" in document.parts:
                if chosen[n]:
                    yield document.parts["train"]
                n += document.more != "train"

    return Tokenizer.train_bpe(sample(), cfg.vocab_size)


def masks_of(sources: Sequence[Mapping[str, Any]], cfg: Config) -> list[np.ndarray | None]:
    """`held_out_masks` of sources that were surveyed."""
    return held_out_masks([source["documents"] for source in sources], cfg.eval_fraction, cfg.seed)


def training_documents(sources: Sequence[Mapping[str, Any]], cfg: Config) -> int:
    """The number of documents, or heads of documents, that training sees."""
    held_out = sum(int(mask.sum()) for mask in masks_of(sources, cfg) if mask is not None)
    return sum(source["documents"] for source in sources) - held_out


def shelf_for(cfg: Config, folder: Path) -> tuple[Shelf, Tokenizer]:
    """The tokenizer and the shelf to fill: as an earlier run with the same text and settings left
    them, or new ones."""
    given = None if cfg.tokenizer in OWN_TOKENIZERS else load_tokenizer(cfg.tokenizer)
    contents = [{"source": source, "content": content_of(source)} for source in cfg.train_data]
    free = ("output_dir", "train_data", "weights", "num_proc")
    settings = {key: value for key, value in to_dict(cfg).items() if key not in free}
    mixed = cfg.weights is not None
    key = fingerprint([contents, settings, mixed, given.to_json() if given else None])
    if shelf := Shelf.resume(folder, key):
        done = sum(source["done"] for source in shelf.sources)
        print(f"prepare: going on from {folder / JOURNAL}, {done:,} documents are done")
        return shelf, given or Tokenizer.load(folder)
    with tqdm(unit=" documents", desc="read", mininterval=1, leave=False, disable=None) as bar:
        sources = [
            content | survey(source, cfg.on_bad_row, bar)
            for source, content in zip(cfg.train_data, contents, strict=True)
        ]
    documents, number = all_documents(sources, cfg), training_documents(sources, cfg)
    tokenizer = given or make_tokenizer(cfg, documents, number)
    (folder / MANIFEST).unlink(missing_ok=True)  # the folder counts again once it is back
    tokenizer.save(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    journal = {"key": key, "dtype": dtype, "mixed": mixed, "shard_tokens": cfg.shard_tokens}
    return Shelf.begin(folder, sources, **journal), tokenizer


def all_documents(sources: Sequence[Mapping[str, Any]], cfg: Config) -> Iterator[Document]:
    """The documents of all sources, cut for the tokenizer that is made from them."""
    gap = re.compile(GAPS[PATTERN])
    for source, mask in zip(cfg.train_data, masks_of(sources, cfg), strict=True):
        yield from documents_of(source, mask, gap, cfg)


def fill(shelf: Shelf, tokenizer: Tokenizer, cfg: Config) -> None:
    """Tokenise what is not on the shelf yet, by one process a core where the text is long."""
    masks = masks_of(shelf.sources, cfg)

    def documents(n: int) -> Iterator[Document]:
        """The documents of source n, cut for the tokenizer that encodes them."""
        return documents_of(cfg.train_data[n], masks[n], tokenizer.gap, cfg)

    small = sum(source["size"] for source in shelf.sources) < SMALL
    tokenise(shelf, tokenizer, documents, cfg.num_proc or (1 if small else cores()))


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def refuse_thin(shelf: Shelf, cfg: Config) -> None:
    """Raise InputError when there is nothing to train on, or nothing to evaluate on: of a mixture
    in any source, else in all of them together."""
    thin: list[str] = []
    if cfg.weights:
        thin = [source["source"] for source in shelf.sources if not all(source["bytes"].values())]
    if thin or not shelf.total("bytes", "train") or not shelf.total("bytes", "eval"):
        named = ", ".join(thin or cfg.train_data)
        raise InputError(f"train_data {named}: too little text to train and evaluate on")


def measure(shelf: Shelf, cfg: Config) -> dict[str, Any]:
    """The metrics of stage.json: tokens of each split, training documents, bytes of training text,
    and the number of empty documents that were left out."""
    return {
        "tokens": {split: shelf.total("tokens", split) for split in ("train", "eval")},
        "documents": training_documents(shelf.sources, cfg),
        "bytes": shelf.total("bytes", "train"),
        "empty": sum(source["empty"] for source in shelf.sources),
    }


def describe(metrics: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """The metrics in one line."""
    tokens, size = metrics["tokens"], metrics["bytes"]
    return (
        f"{metrics['documents']:,} documents ({size / 1e6:.1f} MB), "
        f"{tokens['train']:,} training and {tokens['eval']:,} evaluation tokens, "
        f"vocabulary {tokenizer.vocab_size}, {size / tokens['train']:.2f} bytes a token, "
        f"{metrics['empty']} empty left out"
    )


def skipped(shelf: Shelf) -> collections.Counter[str]:
    """The rows that could not be used, by reason."""
    counts = (collections.Counter(source["skipped"]) for source in shelf.sources)
    return sum(counts, collections.Counter())


def shards_meta(shelf: Shelf, tokenizer: Tokenizer, cfg: Config) -> dict[str, Any]:
    """The content of shards.json. Its fingerprint is of contents and settings, and of no path."""
    meta = {
        "dtype": shelf.journal["dtype"],
        "vocab_size": tokenizer.vocab_size,
        "tokens": {split: shelf.total("tokens", split) for split in ("train", "eval")},
        "bytes": shelf.total("bytes", "train"),
    }
    keys = ("content", "documents", "empty", "bytes", "tokens")
    sources = [{key: source[key] for key in keys} for source in shelf.sources]
    for source, share in zip(sources, cfg.shares if cfg.weights else (), strict=False):
        source["share"] = share
    free = ("output_dir", "train_data", "num_proc")
    settings = {key: value for key, value in to_dict(cfg).items() if key not in free}
    text = (shelf.folder / "tokenizer.json").read_text()
    return {
        **meta,
        "fingerprint": fingerprint([meta, sources, settings, text]),
        "sources": [
            {"source": name} | source for name, source in zip(cfg.train_data, sources, strict=True)
        ],
    }


def main(cfg: Config) -> None:
    """Make the tokenizer and the shards, and write down what they are."""
    started = time.perf_counter()
    resumes = has_journal(Path(cfg.output_dir))
    folder = claim(cfg, "prepare", (*PUBLISHED, JOURNAL), resumes)

    shelf, tokenizer = shelf_for(cfg, folder)
    fill(shelf, tokenizer, cfg)
    refuse_thin(shelf, cfg)

    metrics = measure(shelf, cfg)
    gate = Gate(True, describe(metrics, tokenizer))
    print(gate.line("prepare"))
    facts = {"data": {"skipped": skipped(shelf)}, "metrics": metrics}
    seconds = time.perf_counter() - started
    write_stage_report(folder, stage_report("prepare", cfg, gate, seconds, **facts))
    write_atomically(folder / "shards.json", dump(shards_meta(shelf, tokenizer, cfg)))
    vouch(folder, PUBLISHED)
    if not cfg.weights:  # of a mixture it is kept: with other weights the shards stay
        (folder / JOURNAL).unlink()


if __name__ == "__main__":
    interrupt_with("prepare; the same command goes on from the shards that are written")
    cli(Config, main)
