"""SIGTERM and SIGINT: asking a program to stop, which exits with code 75 where the same command
goes on afterwards."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from common.program.errors import Interrupted


def catch_signals(handler: Callable[[int, Any], None]) -> None:
    """Call `handler` on SIGTERM and SIGINT; only the main thread can ask for that."""
    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, handler)


def release_signals() -> None:
    """Signals end this program again, as they do before `catch_signals`."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_with(message: str) -> None:
    """From here on a signal raises Interrupted wherever this process is: for programs that save as
    they go."""
    own = os.getpid()

    def handler(number: int, _: Any) -> None:
        """Raises, once."""
        release_signals()
        if os.getpid() == own:  # workers that were forked end as they always did
            raise Interrupted(message)
        os.kill(os.getpid(), number)

    catch_signals(handler)
