"""SIGTERM, SIGINT and SIGHUP: asking a program to stop, which exits with code 75 where the same
command goes on afterwards."""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from common.program.entry import leave, who
from common.program.errors import INTERRUPTED, Interrupted
from common.program.terminal import steady_streams

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # HUP: the terminal was closed


def catch_signals(handler: Callable[[int, Any], None]) -> None:
    """Call `handler` on each of STOPS; only the main thread can ask for that.

    What is ignored stays ignored: nohup says so of SIGHUP, a shell of SIGINT for `command &`.
    """
    if threading.current_thread() is threading.main_thread():
        for kind in STOPS:
            if signal.getsignal(kind) is not signal.SIG_IGN:
                signal.signal(kind, handler)


def release_signals() -> None:
    """SIGTERM and SIGINT end this program again, as they do before `catch_signals`.

    SIGHUP does not: shell and kernel send it several times, and none of them means haste.
    """
    if threading.current_thread() is threading.main_thread():
        for kind, usual in (
            (signal.SIGTERM, signal.SIG_DFL),
            (signal.SIGINT, signal.default_int_handler),
        ):
            if signal.getsignal(kind) is not signal.SIG_IGN:
                signal.signal(kind, usual)


def interrupt_with(message: str) -> None:
    """From here on a signal raises Interrupted wherever this process is: for programs that save as
    they go."""
    own, asked = os.getpid(), False

    def handler(number: int, _: Any) -> None:
        """Raises, once."""
        nonlocal asked
        if os.getpid() != own:  # workers that were forked end as they always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not asked:
            asked = True
            release_signals()
            raise Interrupted(message)

    catch_signals(handler)


def end_until_begun() -> None:
    """While a program that was started with `python -m` imports its libraries, a signal ends it
    with one line and code 75; from then on the program has its own way.

    A package calls this before its modules import torch, which takes seconds.
    """
    if sys.argv[0] != "-m":  # as it is while Python looks for the program's module
        return
    steady_streams()

    def handler(*_: Any) -> None:
        """Ends the process: an exception might get lost in some library's import."""
        print(f"{who()}interrupted: not begun; the same command starts it", file=sys.stderr)
        leave(INTERRUPTED, at_once=True)

    catch_signals(handler)
    if who():
        stop_with_parent()


@functools.cache
def stop_with_parent() -> None:
    """Have this process told to stop (SIGTERM) when the one that started it is gone: processes
    whose launcher was killed would train on, and nobody would know. Once is enough."""
    parent, main = os.getppid(), threading.main_thread().ident
    assert main is not None  # it runs

    def watch() -> None:
        """Ends with the parent."""
        while os.getppid() == parent:
            time.sleep(1)
        signal.pthread_kill(main, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
