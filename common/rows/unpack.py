"""The bytes and the text of a file, unpacked if it is .gz or .zst, one block after another."""

import collections
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.program.errors import InputError

# Packed bytes read at once: few, as a byte of .gz can be a thousand, and one of .zst 32 thousand;
# and so that the byte in a message is near the damage.
PACKED = {".gz": 1 << 16, ".zst": 1 << 12}
BLOCK = 1 << 20  # bytes read at once
LONGEST = 1 << 27  # characters of a line
TOO_LARGE = "too large"  # the reason of an InputError
LARGEST = 1 << 30  # characters or bytes of what is held as a whole


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is .gz or .zst. Raises InputError naming the byte of the
    file that is at fault."""
    with path.open("rb") as file:
        if path.suffix in PACKED:
            yield from _unpacked(path, file)
        else:
            yield from iter(lambda: file.read(BLOCK), b"")


def _unpacked(path: Path, file: io.BufferedReader) -> Iterator[bytes]:
    """`blocks` of a packed file; pieces packed one by one may follow each other in it."""
    begin, failure = _unpacker(path.suffix)
    unpacker = None
    while data := file.read(PACKED[path.suffix]):
        while data:
            unpacker = unpacker or begin()
            try:
                yield unpacker.decompress(data)
            except failure as error:
                place = f"{path}: damaged {path.suffix} data before byte {file.tell()}"
                raise InputError(f"{place} ({error})") from None
            data = b""
            if unpacker.eof:
                data, unpacker = unpacker.unused_data, None
    if unpacker:
        cut = f"{path}: its {path.suffix} data is cut off at byte {file.tell()}"
        raise InputError(f"{cut}, the end of the file")


def _unpacker(suffix: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes an unpacker for one packed piece, and what that raises on damage."""
    if suffix == ".gz":
        return lambda: zlib.decompressobj(31), zlib.error  # 31: with gzip's header and checksum
    import zstandard

    largest = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return largest.decompressobj, zstandard.ZstdError


class Unpacked(io.RawIOBase):
    """`blocks(path)` as a file to read from."""

    def __init__(self, path: Path) -> None:
        """Begin before the first byte."""
        self.blocks, self.rest = blocks(path), memoryview(b"")

    def readable(self) -> bool:
        """Yes; `io` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the current block goes; 0 at the end."""
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def open_text(path: Path) -> io.TextIOWrapper:
    """The file as text. Bytes that are no UTF-8 come as surrogates, so that one of them costs its
    line and not the file: see `check_utf8`."""
    file = io.BufferedReader(Unpacked(path), BLOCK)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")


# A few packed bytes can be gigabytes: what is held at once has a limit


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file. Raises InputError naming one that is longer than LONGEST."""
    text = open_text(path)
    for number, line in enumerate(iter(lambda: text.readline(LONGEST), ""), 1):
        if len(line) == LONGEST:
            long = f"a line of {LONGEST:,} characters or more: split it"
            raise InputError(f"{path}:{number}: {long}", TOO_LARGE)
        yield line


def text_of(path: Path) -> str:
    """All text of a file. Raises InputError where that is more than LARGEST."""
    text = open_text(path).read(LARGEST + 1)
    if len(text) > LARGEST:
        long = f"more than {LARGEST:,} characters at once: split it, or make it .jsonl"
        raise InputError(long, TOO_LARGE)
    return text


def bytes_of(path: Path) -> bytes:
    """All bytes of a file, likewise."""
    found, size = [], 0
    for block in blocks(path):
        found.append(block)
        size += len(block)
        if size > LARGEST:
            long = f"unpacks to more than {LARGEST:,} bytes: unpack it first"
            raise InputError(f"{path}: {long}", TOO_LARGE)
    return b"".join(found)


def drain(path: Path) -> None:
    """Read a file to its end, for the InputError that its damage would raise."""
    collections.deque(blocks(path), 0)


def check_utf8(text: str, line: int = 0, column: int = 0) -> str:
    """The text, which begins in this line and column (from 0) of its file.

    Raises InputError naming the place of the first byte that is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lines, start = text.count("\n", 0, error.start), text.rfind("\n", 0, error.start)
        column = error.start - start + (0 if lines else column)
        place = f"line {line + lines + 1}, column {column}" if line + lines else f"column {column}"
        byte = ord(text[error.start]) - 0xDC00
        told = f"not UTF-8 at {place} (byte 0x{byte:02x}); convert it first (iconv -t utf-8)"
        raise InputError(told, "not UTF-8") from None
    if len(text) < 4 * text.count("\0") < 3 * len(text):  # of UTF-16, whose bytes may be UTF-8 too
        told = "every other byte is 0, as in UTF-16; convert it first (iconv -f utf-16le -t utf-8)"
        raise InputError(told, "not UTF-8")
    return text
