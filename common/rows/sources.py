"""Rows from a file, a folder or a Hub data set, one after another: a corpus need not fit into
memory.

What is held at a time: a line of .jsonl, a thousand rows of .parquet, but all of a .json list and
of a packed .parquet. A .txt file is one document; who asks for its pieces need not hold it either.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from common.program.errors import InputError
from common.program.terminal import one_line

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
PACKED = (".gz", ".zst")  # behind one of FORMATS: x.jsonl.zst
BLOCK = 1 << 20  # bytes read at once


class Row(NamedTuple):
    """One record, and where it came from: what an error message calls it (`file:line`)."""

    data: dict[str, Any]
    origin: str
    parsed: Any = None  # what the stage that reads it makes of `data`
    rest: int = 0  # characters of the same document that are in the next rows


class BadRows:
    """What becomes of rows that cannot be used: the first one ends the stage, or each is skipped
    and counted by its reason."""

    def __init__(self, on_bad_row: str = "error", shown: int = 5) -> None:
        self.skip, self.shown = on_bad_row == "skip", shown
        self.counts: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def row(self, origin: str) -> Iterator[None]:
        """Around all that is done with one row; its own try and `refuse` cost a loop over millions
        of rows less."""
        try:
            yield
        except InputError as error:
            self.refuse(origin, error)

    def refuse(self, origin: str, error: InputError) -> None:
        """For what went wrong with one row: raises it with its origin, or notes it, and the row is
        left behind."""
        if not self.skip:
            raise InputError(f"{origin}: {error}") from None
        self.counts[error.reason] += 1
        if self.counts.total() <= self.shown and int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(one_line(f"skipped {origin}: {error}"), file=sys.stdout)


def read_rows(
    source: str, parse: Callable[[dict], Any] | None = None, bad: BadRows | None = None
) -> list[Row]:
    """All records of `iter_rows`, in memory; a Hub data set is downloaded, and kept on disk for the
    next time."""
    return list(iter_rows(source, parse, bad, streaming=False))


def iter_rows(
    source: str,
    parse: Callable[[dict], Any] | None = None,
    bad: BadRows | None = None,
    streaming: bool = True,
    pieces: bool = False,
) -> Iterator[Row]:
    """Records of a .jsonl, .json (a list), .parquet or .txt file (also .gz, .zst), a folder of
    such, or a Hub data set.

    A .txt file is one record {"text": ...}; with `pieces` a long one is several, `rest` telling
    what is still to come. A Hub data set is `owner/name` or `owner/name:config`, its train split;
    with `streaming` nothing of it is kept on disk. `bad` says what becomes of a row that cannot be
    read, or that `parse` refuses (InputError). Raises InputError naming file and line (row, byte)
    of what cannot be read, and a source without rows.
    """
    path, bad, n = Path(source), bad or BadRows(), 0
    before = bad.counts.copy()
    try:
        if path.is_dir():
            rows = (
                row
                for file in files_in(path)
                for row in iter_rows(str(file), None, bad, pieces=pieces)
            )
        else:
            rows = file_rows(path, bad, pieces) if path.exists() else hub_rows(source, streaming)
        for row in rows:
            try:
                if not isinstance(row.data, dict):
                    raise InputError(
                        f"a row must be a JSON object, this is {str(row.data)[:60]!r}",
                        "not an object",
                    )
                parsed = parse(row.data) if parse else None
            except InputError as error:
                bad.refuse(row.origin, error)
            else:
                n += 1
                yield Row(row.data, row.origin, parsed, row.rest)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None
    if not n:
        skipped = ", ".join(
            f"{count} x {reason}" for reason, count in (bad.counts - before).items()
        )
        raise InputError(
            f"{source}: no rows" + (f" that can be used; skipped: {skipped}" if skipped else "")
        )


def suffix_of(path: Path) -> str:
    """The format's suffix, that of a packed file being the one before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if suffix_of(file) in FORMATS)


def open_text(path: Path) -> io.TextIOWrapper:
    # Bytes that are no UTF-8 come as surrogates, so that one of them costs its line and not the
    # file.
    return io.TextIOWrapper(
        io.BufferedReader(Unpacked(path), BLOCK), encoding="utf-8-sig", errors="surrogateescape"
    )


def text_pieces(path: Path) -> Iterator[Row]:
    """A .txt file in rows of a BLOCK of characters; a first reading counts, and looks for what is
    no UTF-8."""
    line, column, length, blank = 0, 0, 0, True
    with open_text(path) as text, BadRows().row(str(path)):
        while block := text.read(BLOCK):
            check_utf8(block, line, column)
            length, blank = length + len(block), blank and not block.strip()
            line, column = (
                line + block.count("\n"),
                len(block) - block.rfind("\n") - 1 + ("\n" not in block) * column,
            )
    with open_text(path) as text:
        while block := "" if blank else text.read(BLOCK):
            length -= len(block)
            if length < 0:
                break
            yield Row({"text": block}, str(path), rest=length)
    if length and not blank:
        raise InputError(f"{path}: changed while it was being read; run again when it is complete")
    if blank:
        yield Row({"text": ""}, str(path))


def file_rows(path: Path, bad: BadRows, pieces: bool = False) -> Iterator[Row]:
    kind = suffix_of(path)
    if kind == ".parquet":
        yield from parquet_rows(path)
        return
    if kind and kind not in FORMATS:
        raise InputError(f"{path}: a {kind} file is not read; the formats are {', '.join(FORMATS)}")
    text = open_text(path)
    try:
        if kind == ".txt" and pieces:
            yield from text_pieces(path)
            return
        if kind in (".txt", ".json"):
            with BadRows().row(str(path)):
                content = check_utf8(text.read())
                rows = parse_json(content, list) if kind == ".json" else []
            if kind == ".txt":
                yield Row({"text": content}, str(path))
            yield from (Row(data, f"{path}:row {n}") for n, data in enumerate(rows, 1))
            return
        for n, line in enumerate(
            text, 1
        ):  # ends lines at line ends alone, not at U+2028 and its like as splitlines() does
            if line.strip():
                try:
                    data = parse_json(check_utf8(line.rstrip()), dict)
                except InputError as error:
                    bad.refuse(f"{path}:{n}", error)
                else:
                    yield Row(data, f"{path}:{n}")
    except InputError:
        if (
            path.suffix in PACKED
        ):  # what looks like a broken text may come of damage to the packed bytes: then say that
            collections.deque(blocks(path), 0)
        raise


def check_utf8(text: str, line: int = 0, column: int = 0) -> str:
    """The text, which begins in this line and column (from 0) of its file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lines, start = text.count("\n", 0, error.start), text.rfind("\n", 0, error.start)
        column = error.start - start + (0 if lines else column)
        place = f"line {line + lines + 1}, column {column}" if line + lines else f"column {column}"
        byte = ord(text[error.start]) - 0xDC00
        raise InputError(
            f"not UTF-8 at {place} (byte 0x{byte:02x}); convert it first (iconv -t utf-8)",
            "not UTF-8",
        ) from None
    return text


def parse_json(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = (
            f"line {error.lineno}, column {error.colno}"
            if kind is list
            else f"column {error.colno}"
        )
        raise InputError(f"broken JSON at {place}: {error.msg}", "broken JSON") from None
    except (RecursionError, ValueError) as error:  # [[[[..., or a number of 5000 digits
        raise InputError(f"JSON that Python does not read: {error}", "broken JSON") from None
    if not isinstance(value, kind):
        wanted = "list of rows" if kind is list else "object"
        raise InputError(f"expected a JSON {wanted}, found {type(value).__name__}", "not an object")
    return value


def parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet  # 1 s to import: only who needs it pays

    n = 0
    try:
        file = pyarrow.parquet.ParquetFile(
            io.BytesIO(b"".join(blocks(path))) if path.suffix in PACKED else path
        )
        for batch in file.iter_batches(1000):
            for data in batch.to_pylist():
                n += 1
                yield Row(data, f"{path}:{n}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:160]
        raise InputError(
            f"{path}: not readable as Parquet{f' behind row {n}' if n else ''} ({reason})"
        ) from None


def hub_rows(source: str, streaming: bool) -> Iterator[Row]:
    file = Path(source)
    if (
        source.count("/") > 1
        or source.startswith((".", "/"))
        or suffix_of(file) in FORMATS
        or file.suffix in PACKED
    ):
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
        what = (
            f"the Hub's stream broke behind row {n}"
            if n
            else "neither a file here nor a data set that the Hub would give"
        )
        raise InputError(f"{source}: {what} ({reason})") from None


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is .gz or .zst. Raises InputError naming the byte of the
    file that is at fault."""
    with path.open("rb") as file:
        if path.suffix not in PACKED:
            yield from iter(lambda: file.read(BLOCK), b"")
            return
        if path.suffix == ".gz":
            failure, start = (
                zlib.error,
                lambda: zlib.decompressobj(31),
            )  # 31: with gzip's header and checksum
        else:
            import zstandard

            failure, start = (
                zstandard.ZstdError,
                zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj,
            )
        unpacker = None
        while data := file.read(
            1 << 16
        ):  # small, so that the byte in the message is near the damage
            while data:
                unpacker = unpacker or start()
                try:
                    yield unpacker.decompress(data)
                except failure as error:
                    raise InputError(
                        f"{path}: damaged {path.suffix} data before byte {file.tell()} ({error})"
                    ) from None
                data = b""
                if unpacker.eof:  # pieces packed one by one may follow each other in a file
                    data, unpacker = unpacker.unused_data, None
        if unpacker:
            raise InputError(
                f"{path}: its {path.suffix} data is cut off at byte {file.tell()}, the end of the file"
            )


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


def content_of(source: str) -> str | None:
    """What tells one content of a source from another: sha256 of a file, or of a folder's names and
    files, the commit of a Hub data set (None when the Hub does not answer). Hashing is slow on no
    source: 100 times faster than tokenising."""
    path = Path(source)
    if path.is_dir():
        entries = [
            [file.relative_to(path).as_posix(), content_of(str(file))] for file in files_in(path)
        ]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    if path.exists():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0]).sha
    except Exception:  # no such data set, no network, or a path: who reads it says so
        return None
