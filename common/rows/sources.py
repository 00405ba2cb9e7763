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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from common.program.errors import InputError
from common.program.files import refuse_irregular, verify_file
from common.program.terminal import one_line
from common.rows.unpack import (
    PACKED,
    TOO_LARGE,
    bytes_of,
    check_utf8,
    drain,
    lines_of,
    open_text,
    text_of,
)

FORMATS = (".jsonl", ".json", ".parquet", ".txt")  # each also packed: x.jsonl.zst
BLOCK = 1 << 20  # characters of a .txt file that make one row, where it is read in pieces


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
        """`on_bad_row` is "error" or "skip"; the first `shown` that are skipped are printed."""
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


# Any source


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
    if not source:
        raise InputError("rows are wanted, and the name given for their file is empty")
    bad, found = bad or BadRows(), False
    before = bad.counts.copy()
    try:
        for row in raw_rows(source, bad, streaming, pieces):
            try:
                if not isinstance(row.data, dict):
                    raise no_object(row.data)
                parsed = parse(row.data) if parse else None
            except InputError as error:
                bad.refuse(row.origin, error)
            else:
                found = True
                yield Row(row.data, row.origin, parsed, row.rest)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None
    if not found:
        skipped = [f"{count} x {reason}" for reason, count in (bad.counts - before).items()]
        told = f" that can be used; skipped: {', '.join(skipped)}" if skipped else ""
        raise InputError(f"{source}: no rows{told}")


def raw_rows(source: str, bad: BadRows, streaming: bool, pieces: bool) -> Iterator[Row]:
    """The rows of a source as they stand there, whatever they are."""
    path = Path(source)
    if path.is_dir():
        for file in files_in(path):
            yield from iter_rows(str(file), None, bad, pieces=pieces)
    elif path.exists():
        verify_file(path)
        yield from file_rows(path, bad, pieces)
    else:
        yield from hub_rows(source, streaming)


def no_object(data: Any) -> InputError:
    """The error for a row that is no JSON object."""
    shown = f"a row must be a JSON object, this is {str(data)[:60]!r}"
    return InputError(shown, "not an object")


def suffix_of(path: Path) -> str:
    """The format's suffix, that of a packed file being the one before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, and of those in it, that can be read, in the order of their names."""
    found = (file for file in folder.rglob("*") if suffix_of(file) in FORMATS)
    return sorted(file for file in found if not file.is_dir())


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
        refuse_irregular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.partition(":")[0]).sha
    except Exception:  # no such data set, no network, or a path: who reads it says so
        return None


# Files


def file_rows(path: Path, bad: BadRows, pieces: bool = False) -> Iterator[Row]:
    """The rows of a file of any format; what has no suffix is read as .jsonl."""
    refuse_irregular(path)
    kind = suffix_of(path)
    if kind and kind not in FORMATS:
        raise InputError(f"{path}: a {kind} file is not read; the formats are {', '.join(FORMATS)}")
    try:
        if kind == ".parquet":
            yield from parquet_rows(path, bad)
        elif kind == ".txt":
            yield from text_pieces(path) if pieces else text_row(path)
        elif kind == ".json":
            yield from list_rows(path)
        else:
            yield from line_rows(path, bad)
    except InputError as error:
        # What looks like broken text may come of damage to the packed bytes: then say that.
        if path.suffix in PACKED and error.reason != TOO_LARGE:
            drain(path)
        raise


def line_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a .jsonl file. Its lines end at line ends alone, and not at U+2028 and its like,
    as those of splitlines() do."""
    for n, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                data = parse_json(check_utf8(line.rstrip()), dict)
            except InputError as error:
                bad.refuse(f"{path}:{n}", error)
            else:
                yield Row(data, f"{path}:{n}")


def list_rows(path: Path) -> Iterator[Row]:
    """The rows of a .json file, which is one list."""
    with BadRows().row(str(path)):
        rows = parse_json(check_utf8(text_of(path)), list)
    for n, data in enumerate(rows, 1):
        yield Row(data, f"{path}:row {n}")


def text_row(path: Path) -> Iterator[Row]:
    """A .txt file as one row."""
    with BadRows().row(str(path)):
        text = check_utf8(text_of(path))
    yield Row({"text": text}, str(path))


def text_pieces(path: Path) -> Iterator[Row]:
    """A .txt file in rows of a BLOCK of characters; a first reading counts, and looks for what is
    no UTF-8."""
    length, blank = survey_text(path)
    if blank:
        yield Row({"text": ""}, str(path))
        return
    with open_text(path) as text:
        while block := text.read(BLOCK):
            length -= len(block)
            if length < 0:
                break
            yield Row({"text": block}, str(path), rest=length)
    if length:
        raise InputError(f"{path}: changed while it was being read; run again when it is complete")


def survey_text(path: Path) -> tuple[int, bool]:
    """(characters, whether they are all blank) of a .txt file. Raises InputError naming the place
    of what is no UTF-8."""
    line, column, length, blank = 0, 0, 0, True
    with open_text(path) as text, BadRows().row(str(path)):
        while block := text.read(BLOCK):
            check_utf8(block, line, column)
            length, blank = length + len(block), blank and not block.strip()
            line += block.count("\n")
            column = len(block) - block.rfind("\n") - 1 + ("\n" not in block) * column
    return length, blank


def parse_json(text: str, kind: type) -> Any:
    """The JSON value, a `list` or a `dict`. Raises InputError naming the place of a mistake."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if kind is list else ""
        told = f"broken JSON at {line}column {error.colno}: {error.msg}"
        raise InputError(told, "broken JSON") from None
    except (RecursionError, ValueError) as error:  # [[[[..., or a number of 5000 digits
        raise InputError(f"JSON that Python does not read: {error}", "broken JSON") from None
    if not isinstance(value, kind):
        wanted = "list of rows" if kind is list else "object"
        raise InputError(f"expected a JSON {wanted}, found {type(value).__name__}", "not an object")
    return value


def parquet_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a .parquet file; what Python has no value for (text that is no UTF-8, a time
    before the year 1) is a bad row."""
    import pyarrow.parquet  # 1 s to import: only who needs it pays

    n = 0
    try:
        content = io.BytesIO(bytes_of(path)) if path.suffix in PACKED else path
        for batch in pyarrow.parquet.ParquetFile(content).iter_batches(1000):
            for data in values_of(batch):
                n += 1
                if isinstance(data, InputError):
                    bad.refuse(f"{path}:{n}", data)
                else:
                    yield Row(data, f"{path}:{n}")
    except (pyarrow.ArrowException, OSError) as error:
        reason, behind = str(error).split("\n")[0][:160], f" behind row {n}" if n else ""
        raise InputError(f"{path}: not readable as Parquet{behind} ({reason})") from None


def values_of(batch: Any) -> Iterator[dict[str, Any] | InputError]:
    """The rows of an Arrow batch as Python's values, or why one has none."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # one of them: which?
        for n in range(batch.num_rows):
            try:
                data = batch.slice(n, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield InputError(f"a value cannot be read: {one_line(error)[:160]}", "not readable")
            else:
                yield data


# The Hub


def hub_rows(source: str, streaming: bool) -> Iterator[Row]:
    """The rows of a Hub data set's train split; InputError for what looks like a file's name."""
    file = Path(source)
    named = suffix_of(file) in FORMATS or file.suffix in PACKED
    if named or source.count("/") > 1 or source.startswith((".", "/")):
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
        what = "neither a file here nor a data set that the Hub would give"
        if n:
            what = f"the Hub's stream broke behind row {n}"
        raise InputError(f"{source}: {what} ({reason})") from None
