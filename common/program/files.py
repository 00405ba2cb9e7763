"""Files that a hand-off consists of: written whole or not at all, checksums over them, and what
they say of their origin.

Without torch, so that preparing data does not wait for it.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.program.errors import Failure, InputError

MANIFEST = "manifest.json"
SPARE = 64 * 2**20  # bytes that a save leaves free on the disk


def write_manifest(folder: Path, files: Sequence[Path]) -> None:
    """Size and sha256 of each file, by its path inside `folder`."""
    manifest = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }
    write_atomically(folder / MANIFEST, dump(manifest))


def verify(folder: Path, weights: bool = True) -> None:
    """Raise InputError unless every file is as the manifest says. Directories of other makers have
    none, and pass.

    Without `weights` gigabytes of them are not hashed, where only the other files are read.
    """
    if (folder / "stage.json").exists() and not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder}: the save was cut short (no {MANIFEST}); run its stage again, or delete its "
            "stage.json to take it as it is"
        )
    if not (folder / MANIFEST).exists():
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (ValueError, AttributeError, TypeError, KeyError):  # broken JSON, or another content
        raise InputError(f"{folder / MANIFEST}: damaged; run the stage again") from None
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file}: missing, though {MANIFEST} lists it; run the stage again")
        hashed = weights or file.suffix != ".safetensors"
        if file.stat().st_size != size or (hashed and sha256(file) != digest):
            raise InputError(
                f"{file}: damaged (size or sha256 differs from {MANIFEST}); run the stage again"
            )


def verify_file(file: Path) -> None:
    """Raise InputError when a manifest beside a file lists it with another content; one that no
    manifest of ours lists passes."""
    file = file.resolve()  # a link is checked where it leads
    manifest, accept = file.parent / MANIFEST, "to take the files as they are"
    try:
        listed = json.loads(manifest.read_text())
    except OSError:
        return
    except (ValueError, RecursionError):
        if (file.parent / "stage.json").exists():
            broken = f"{manifest}: damaged; run the stage again, or delete it {accept}"
            raise InputError(broken) from None
        return
    try:
        wanted = (listed[file.name]["size"], listed[file.name]["sha256"])
    except (TypeError, KeyError):
        return
    now = file.stat()
    if wanted != (now.st_size, hash_of(file, now.st_size, now.st_mtime_ns)):
        raise InputError(
            f"{file}: differs from what {manifest} notes (damaged, or edited); run the stage "
            f"again, or delete that {MANIFEST} {accept}"
        )


@functools.cache
def hash_of(file: Path, size: int, changed: int) -> str:
    """`sha256`, taken once of a file of this size and date, which may be opened several times."""
    return sha256(file)


def sha256(file: Path) -> str:
    """The hash of a file's content, in hex."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def dump(value: Any) -> bytes:
    """A value as the content of a JSON file. Raises Failure naming a number that is not finite, as
    JSON has none such."""
    if found := next(not_finite(value), None):
        raise Failure(f"{found}, and JSON holds finite numbers only: it was not written")
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode(errors="backslashreplace")  # a lone surrogate: JSON's own escape


def not_finite(value: Any, place: str = "") -> Iterator[str]:
    """Where a value of lists and dicts has a number that is not finite: `metrics.loss is nan`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place.lstrip('.') or 'the value'} is {value}"
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from not_finite(one, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for n, one in enumerate(value):
            yield from not_finite(one, f"{place}[{n}]")


def write_atomically(file: Path, content: bytes) -> None:
    """All of `content` or the file as it was: temporary file, fsync, rename."""
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        try:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, say, is a Failure: one line and no traceback."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise Failure(
            f"{path}: could not be written ({why}); when it can be, the same command goes on"
        ) from None


def check_room(folder: Path, size: int) -> None:
    """Raise OSError when the disk has no room for `size` bytes, and some to spare."""
    if (free := shutil.disk_usage(folder).free) < size + SPARE:
        raise OSError(f"{(size + SPARE) / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free")


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Atomically: a reader sees the old file or the whole new one. What JSON has no type for, such
    as a date from a Parquet file, is written as text."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    # A lone surrogate becomes JSON's own escape.
    write_atomically(path, text.encode(errors="backslashreplace"))


def refuse_irregular(path: Path) -> None:
    """Raise InputError for a path that is no file: to read a FIFO or a device could take for ever.
    One that is not there passes."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a FIFO, a socket or a device"
        raise InputError(f"{path}: is {kind}, and a file is wanted")
