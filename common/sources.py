"""Rows from a file, a folder or a Hub data set, one after another: a corpus need not fit into memory.

What is held at a time: a line of .jsonl, a thousand rows of .parquet, but all of a .json list, of a .txt document and of
a packed .parquet.
"""

import codecs
import collections
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.config import InputError

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
PACKED = (".gz", ".zst")  # behind one of FORMATS: x.jsonl.zst
BLOCK = 1 << 20  # bytes read at once


class Row(NamedTuple):
    """One record, and where it came from: what an error message calls it (`file:line`)."""

    data: dict[str, Any]
    origin: str


def read_rows(source: str) -> list[Row]:
    """All records of `iter_rows`, in memory; a Hub data set is downloaded, and kept on disk for the next time."""
    return list(iter_rows(source, streaming=False))


def iter_rows(source: str, streaming: bool = True) -> Iterator[Row]:
    """Records of a .jsonl, .json (a list), .parquet or .txt file (also .gz, .zst), a folder of such, or a Hub data set.

    A .txt file is one record {"text": ...}. A Hub data set is `owner/name` or `owner/name:config`, its train split; with
    `streaming` nothing of it is kept on disk. Raises InputError naming file and line (row, byte) of what cannot be read,
    and a source without rows.
    """
    path, n = Path(source), 0
    if path.is_dir():
        rows = (row for file in files_in(path) for row in iter_rows(str(file)))
    elif path.exists():
        rows = file_rows(path)
    else:
        rows = hub_rows(source, streaming)
    for n, row in enumerate(rows, 1):  # noqa: B007 (n is looked at below)
        if not isinstance(row.data, dict):
            raise InputError(f"{row.origin}: a row must be a JSON object, this is {str(row.data)[:60]!r}")
        yield row
    if not n:
        raise InputError(f"{source}: no rows")


def suffix_of(path: Path) -> str:
    """The format's suffix, that of a packed file being the one before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if suffix_of(file) in FORMATS)


def file_rows(path: Path) -> Iterator[Row]:
    kind = suffix_of(path)
    if kind == ".parquet":
        yield from parquet_rows(path)
        return
    text = io.TextIOWrapper(io.BufferedReader(Unpacked(path), BLOCK), encoding="utf-8-sig")
    try:
        if kind == ".txt":
            yield Row({"text": text.read()}, str(path))
        elif kind == ".json":
            rows = parse_json(text.read(), str(path), list)
            yield from (Row(data, f"{path}:row {n}") for n, data in enumerate(rows, 1))
        else:  # a text file's iterator ends lines at line ends alone, not at U+2028 and its like as splitlines() does
            lines = ((n, line) for n, line in enumerate(text, 1) if line.strip())
            yield from (Row(parse_json(line, f"{path}:{n}", dict), f"{path}:{n}") for n, line in lines)
    except (UnicodeDecodeError, InputError) as error:
        if path.suffix in PACKED:  # what looks like a broken text may come of damage to the packed bytes: then say that
            collections.deque(blocks(path), 0)
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not UTF-8 at byte {bad_byte(path)}; convert it first (iconv -t utf-8)") from None


def parse_json(text: str, origin: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(value, kind):
        wanted = "list of rows" if kind is list else "object"
        raise InputError(f"{origin}: expected a JSON {wanted}, found {type(value).__name__}")
    return value


def parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # 1 s to import: only who needs it pays

    n = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(b"".join(blocks(path))) if path.suffix in PACKED else path)
        for batch in file.iter_batches(1000):
            for data in batch.to_pylist():
                n += 1
                yield Row(data, f"{path}:{n}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise InputError(f"{path}: not readable as Parquet{f' behind row {n}' if n else ''} ({reason})") from None


def hub_rows(source: str, streaming: bool) -> Iterator[Row]:
    file = Path(source)
    if source.count("/") > 1 or source.startswith((".", "/")) or suffix_of(file) in FORMATS or file.suffix in PACKED:
        raise InputError(f"{source}: no such file")
    import datasets

    name, _, config = source.partition(":")
    n = 0
    try:
        for data in datasets.load_dataset(name, config or None, split="train", streaming=streaming):
            n += 1
            yield Row(data, f"{source}:{n}")
    except Exception as error:  # the library's own errors differ from release to release
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        what = f"the Hub's stream broke behind row {n}" if n else "neither a file here nor a data set that the Hub would give"
        raise InputError(f"{source}: {what} ({reason})") from None


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is .gz or .zst. Raises InputError naming the byte of the file that is at fault."""
    with path.open("rb") as file:
        if path.suffix not in PACKED:
            yield from iter(lambda: file.read(BLOCK), b"")
            return
        if path.suffix == ".gz":
            failure, start = zlib.error, lambda: zlib.decompressobj(31)  # 31: with gzip's header and checksum
        else:
            import zstandard

            failure, start = zstandard.ZstdError, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        unpacker = None
        while data := file.read(1 << 16):  # small, so that the byte in the message is near the damage
            while data:
                unpacker = unpacker or start()
                try:
                    yield unpacker.decompress(data)
                except failure as error:
                    raise InputError(f"{path}: damaged {path.suffix} data before byte {file.tell()} ({error})") from None
                data = b""
                if unpacker.eof:  # pieces packed one by one may follow each other in a file
                    data, unpacker = unpacker.unused_data, None
        if unpacker:
            raise InputError(f"{path}: its {path.suffix} data is cut off at byte {file.tell()}, the end of the file")


class Unpacked(io.RawIOBase):
    """`blocks(path)` as a file to read from."""

    def __init__(self, path: Path) -> None:
        self.blocks, self.rest = blocks(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def bad_byte(path: Path) -> int:
    """Where a file (unpacked) ceases to be UTF-8."""
    decoder, end = codecs.getincrementaldecoder("utf-8")(), 0
    for block in itertools.chain(filter(None, blocks(path)), [b""]):
        end += len(block)
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return end - len(error.object) + error.start
    raise ValueError(f"{path} is UTF-8")


def content_of(source: str) -> str | None:
    """What tells one content of a source from another: sha256 of a file, or of a folder's names and files, the commit of a
    Hub data set (None when the Hub does not answer). Hashing is slow on no source: 100 times faster than tokenising."""
    path = Path(source)
    if path.is_dir():
        entries = [[file.relative_to(path).as_posix(), content_of(str(file))] for file in files_in(path)]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    if path.exists():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0]).sha
    except Exception:  # no such data set, no network, or a path: who reads it says so
        return None
