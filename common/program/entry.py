"""How every program starts and ends: its name, one line for each kind of failure, its exit code."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.program.errors import INTERRUPTED, Failure, InputError, Interrupted
from common.program.terminal import one_line, printable, steady_streams

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


def who() -> str:
    """Which of several processes speaks; empty where there is one."""
    rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return f"process {rank} of {processes}: " if processes != "1" else ""


def guard(main: Callable[[], int | None]) -> None:
    """Run main() as a program: exit with the int that it returns, or as `ending_of` says."""
    steady_streams()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as while tools are imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main() or 0
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        code, line, is_bug = ending_of(error)
        if is_bug:
            print(printable(traceback.format_exc()), end="", file=sys.stderr)
        if line:
            print(printable(f"{who()}{line}"), file=sys.stderr)
    if code:
        leave(code, at_once=bool(who()))


def leave(code: int, at_once: bool) -> None:
    """End the process with an exit code that is not 0.

    `at_once`, where other processes may wait for this one: an orderly end would wait for them.
    """
    if path := os.environ.get("EXIT_CODE_FILE"):  # accelerate turns every code into 1
        with suppress(OSError):
            Path(path).write_text(str(code))
    sys.stdout.flush()
    sys.stderr.flush()
    if at_once:
        os._exit(code)
    sys.exit(code)
