"""How every program starts and ends: its name, one line for each kind of failure, its exit code."""

import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.program.errors import INTERRUPTED, Failure, InputError, Interrupted
from common.program.terminal import one_line

PIPE_CLOSED = 141  # nobody reads stdout any more, as in `| head`: 128 + SIGPIPE, as shells say
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EROFS,
)  # the user named a path like that


class Ending(NamedTuple):
    """How a program that failed ends."""

    code: int
    """Exit code."""
    line: str | None = None
    """What is told on stderr; None = nothing."""
    is_bug: bool = False
    """Whether a traceback comes before the line."""


def program_name() -> str:
    """How this program is started: `python -m stages.sft.train`, or `python` and its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def ending_of(error: BaseException) -> Ending:
    """The exit code and the line for what ended a program.

    2 for bad input and for paths that cannot be used, 75 when interrupted with all saved, 130 for
    Ctrl-C where there was nothing to save, 1 for all else: a Failure, a bug, another process that
    died.
    """
    said = f"error: {one_line(error)}"
    if isinstance(error, InputError):
        return Ending(2, said)
    if isinstance(error, Failure):
        return Ending(1, said)
    if isinstance(error, Interrupted):
        return Ending(INTERRUPTED, f"interrupted: {error}")
    if isinstance(error, KeyboardInterrupt):
        return Ending(130)
    if getattr(error, "errno", None) in UNUSABLE:
        return Ending(2, said)
    program = program_name().removeprefix("python ").removeprefix("-m ")
    line = f"error: {program}: {type(error).__name__}: {one_line(error)}"
    return Ending(1, line, is_bug=True)


def guard(main: Callable[[], int | None]) -> None:
    """Run main() as a program: exit with the int that it returns, or as `ending_of` says."""
    rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    who = f"process {rank} of {processes}: " if processes != "1" else ""
    speak_any_language()
    try:
        code = main() or 0
        if sys.stdout is not None:  # as where it was closed: `>&-`
            sys.stdout.flush()
    except SystemExit:  # --help and --version end so
        is_unread()
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, line, is_bug = ending_of(error)
        if isinstance(error, BrokenPipeError) and is_unread():
            code, line, is_bug = PIPE_CLOSED, None, False
        if is_bug:
            traceback.print_exc()
        if line:
            print(f"{who}{line}", file=sys.stderr)
    if code:
        leave(code, at_once=bool(who))


def speak_any_language() -> None:
    """Where the terminal's encoding lacks a character, an escape is printed; it is no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_unread() -> bool:
    """Whether the reader of stdout has gone. What is still to be printed then goes nowhere."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        # Where nothing is held back to be flushed, the pipe itself must be asked.
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # stdout is no file, in tests say
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def leave(code: int, at_once: bool) -> None:
    """End the process with an exit code that is not 0.

    `at_once`, where other processes may wait for this one: an orderly end would wait for them.
    """
    if path := os.environ.get("EXIT_CODE_FILE"):  # accelerate turns every code into 1
        Path(path).write_text(str(code))
    is_unread()  # flushes
    sys.stderr.flush()
    if at_once:
        os._exit(code)
    sys.exit(code)
