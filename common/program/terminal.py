"""What may reach the terminal, and what happens when nobody reads it.

Text from data, models, file names and compilers must not drive the terminal; and a terminal that
is gone, a full disk behind it or an encoding that lacks a character must not end the work.
"""

import errno
import io
import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.program.errors import Failure

FORMAT_WARNING = warnings.formatwarning


def printable(text: str) -> str:
    """`text` with control characters as escapes, line ends and tabs as they are."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: Any) -> str:
    """`text` on one line, with control characters as escapes: for messages that quote data."""
    return printable(" ".join(str(text).split()))


class SteadyStream:
    """A text stream on which writing does not fail: after a first error all that follows goes
    nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: Exception | None = None  # the first that it met

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or let the text go."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or let go of what is held back."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Lead the stream into /dev/null, for C code and for child processes too."""
        if self.error:
            return
        self.error = error
        with suppress(OSError, ValueError):  # it is no file, in tests say
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if self is sys.stdout and not is_unread(error):
            print(f"stdout: {error}; what follows is not shown", file=sys.stderr)


def is_unread(error: Exception | None) -> bool:
    """Whether this error says that the reader of a pipe has gone, as in `| head`."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def steady_streams() -> None:
    """From here on stdout, stderr and warnings cannot fail this program.

    Where one was closed (`>&-`) it is /dev/null: else the next file that is opened would take its
    place, and get what C code prints.
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = Path(os.devnull).open("w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # it may lack a character
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))
    warnings.formatwarning = lambda *a, **more: printable(FORMAT_WARNING(*a, **more))


def print_json(value: Any) -> None:
    """Print what a program was started for as JSON, with control characters as JSON's escapes.

    Raises Failure when it does not arrive (a full disk); a reader that has gone wants no more.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    print(
        "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text),
        flush=True,
    )
    error = getattr(sys.stdout, "error", None)
    if error and not is_unread(error):
        raise Failure(f"stdout: {error}; the result is cut short")
