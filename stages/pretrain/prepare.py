"""Text -> tokenizer and token shards.

    python -m stages.pretrain.prepare --config configs/demo/prepare.yaml

Each document is followed by <|endoftext|>; its text is encoded as ordinary text, so that nothing in it ends it early.
A source of one document (a book) gives its tail to the evaluation split, a source of many gives whole documents.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from tqdm import tqdm

from common.chat import rows_to_messages
from common.checkpoint import MANIFEST, dump, load_tokenizer, provenance, vouch, write_atomically
from common.config import InputError, cli, fingerprint, stage_config, to_dict
from common.data import SHARD_DTYPES, Row, read_rows
from common.tokenizer import Tokenizer


@stage_config
class Config:
    """Tokenise text into shards for pretraining."""

    train_data: list[str]
    """Files, folders or Hub data sets: .txt, .jsonl, .json or .parquet with a `text` column or an SFT format."""
    output_dir: str
    """Where tokenizer and shards go."""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained here), characters, or a directory or Hub id to take one from."""
    vocab_size: Annotated[int, Field(gt=0)] = 1024
    """Ids of a BPE trained here, control tokens included."""
    tokenizer_documents: Annotated[int, Field(gt=0)] = 20_000
    """Documents that the BPE is trained on, drawn at random."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the text held out for evaluation."""
    shard_tokens: Annotated[int, Field(gt=0)] = 100_000_000
    """Tokens in one shard file."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split and of the tokenizer's sample."""


def text_of(row: Row) -> str:
    """The document in a row: its `text`, or the conversation of an SFT row with its messages a line apart."""
    if isinstance(row.data.get("text"), str):
        return row.data["text"]
    try:
        return "\n".join(message["content"] for message in rows_to_messages(row.data))
    except InputError as error:
        raise InputError(f"{row.origin}: no `text` column, and as a conversation: {error}") from None


def read_documents(sources: Sequence[str], eval_fraction: float, seed: int) -> tuple[list[str], list[str], int]:
    """(training, evaluation) documents in the order of the sources, and how many were empty and left out."""
    rng = np.random.default_rng(seed)
    train: list[str] = []
    evaluation: list[str] = []
    empty = 0
    for source in sources:
        texts = [text_of(row) for row in read_rows(source)]
        kept = [text for text in texts if text.strip()]
        empty += len(texts) - len(kept)
        if len(kept) * eval_fraction >= 1:
            held_out = set(rng.permutation(len(kept))[: round(len(kept) * eval_fraction)].tolist())
            train += [text for i, text in enumerate(kept) if i not in held_out]
            evaluation += [text for i, text in enumerate(kept) if i in held_out]
        else:
            for text in kept:
                cut = len(text) - round(len(text) * eval_fraction)
                train.append(text[:cut])
                evaluation += [text[cut:]] if text[cut:].strip() else []
    if not train or not any(evaluation):
        raise InputError(f"train_data {', '.join(sources)}: too little text to train and evaluate on")
    return train, evaluation, empty


def make_tokenizer(cfg: Config, documents: Sequence[str]) -> Tokenizer:
    if cfg.tokenizer == "characters":
        return Tokenizer.characters(documents)
    if cfg.tokenizer != "bpe":
        return load_tokenizer(cfg.tokenizer)
    chosen = np.random.default_rng((cfg.seed, 1)).permutation(len(documents))[: cfg.tokenizer_documents]
    return Tokenizer.train_bpe([documents[i] for i in sorted(chosen)], cfg.vocab_size)


def encoded(tokenizer: Tokenizer, documents: Sequence[str], bar: tqdm, chunk: int = 2000) -> Iterator[np.ndarray]:
    """Token ids of `chunk` documents at a time, an end-of-text behind each."""
    for start in range(0, len(documents), chunk):
        part = documents[start : start + chunk]
        ids = [token for document in tokenizer.encode_batch(part) for token in (*document, tokenizer.eot_id)]
        bar.update(len(part))
        yield np.array(ids)


def write_shards(folder: Path, split: str, chunks: Iterator[np.ndarray], dtype: str, shard_tokens: int) -> int:
    """Append the chunks to `{split}-NNNNN.bin` files of shard_tokens each; returns the number of tokens."""
    total, file = 0, None
    for chunk in chunks:
        while len(chunk):
            if total % shard_tokens == 0:
                if file:
                    file.close()
                file = (folder / f"{split}-{total // shard_tokens:05d}.bin").open("wb")
            room = shard_tokens - total % shard_tokens
            file.write(chunk[:room].astype(SHARD_DTYPES[dtype]).tobytes())
            total += min(room, len(chunk))
            chunk = chunk[room:]
    if file:
        file.close()
    return total


def main(cfg: Config) -> None:
    started = time.perf_counter()
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # the folder counts again once it is back
    for old in folder.glob("*.bin"):
        old.unlink()

    train, evaluation, empty = read_documents(cfg.train_data, cfg.eval_fraction, cfg.seed)
    tokenizer = make_tokenizer(cfg, train + evaluation if cfg.tokenizer == "characters" else train)
    tokenizer.save(folder)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts = {}
    with tqdm(total=len(train) + len(evaluation), unit="doc", desc="tokenise", mininterval=1) as bar:
        for split, documents in (("train", train), ("eval", evaluation)):
            chunks = encoded(tokenizer, documents, bar)
            counts[split] = write_shards(folder, split, chunks, dtype, cfg.shard_tokens)

    size = sum(len(document.encode()) for document in train)
    text = (
        f"{len(train):,} documents ({size / 1e6:.1f} MB), {counts['train']:,} training and {counts['eval']:,} evaluation "
        f"tokens, vocabulary {tokenizer.vocab_size}, {size / counts['train']:.2f} bytes a token, {empty} empty left out"
    )
    print(f"gate prepare: PASS  {text}")
    stage = {
        "stage": "prepare",
        "config": to_dict(cfg),
        "seed": cfg.seed,
        "gate": {"passed": True, "text": text},
        "metrics": {"tokens": counts, "documents": len(train), "bytes": size, "empty": empty},
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(stage))
    meta = {"dtype": dtype, "vocab_size": tokenizer.vocab_size, "tokens": counts, "bytes": size}
    meta["fingerprint"] = fingerprint([meta, (folder / "tokenizer.json").read_text()])
    write_atomically(folder / "shards.json", dump(meta))
    vouch(folder)


if __name__ == "__main__":
    cli(Config, main)
