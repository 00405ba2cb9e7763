"""A signal that asks a run to stop: it goes on to a place where it can save, and ends there."""

import os
import signal
import time
from typing import Any

from common.program.entry import who
from common.program.errors import Interrupted
from common.program.signals import catch_signals, release_signals, stop_with_parent

TOGETHER = 2.0  # seconds within which two signals are one and the same request


class Interruption:
    """Whether SIGTERM, SIGINT or SIGHUP asked this process to stop; made first of all in a run.

    The first signal asks, a second SIGTERM or SIGINT ends the process at once. One of several
    processes is asked, too, when their launcher is gone. Before anything `has_begun` there
    is nothing to save, and the first one raises Interrupted where the process is.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.has_begun = False
        self.asked_at: float | None = None  # time of the first signal; None: nobody asked
        catch_signals(self.handle)
        if who():
            stop_with_parent()

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked_at is not None

    def handle(self, number: int, _: Any) -> None:
        """The signal handler.

        Ctrl-C in a terminal comes twice where there is a launcher, which passes on what the
        processes were told already: several processes take what follows at once for the same.
        """
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if not self.has_begun:
                raise Interrupted(f"{self.stage}, not begun; the same command starts it")
        elif number != signal.SIGHUP and (now - self.asked_at > TOGETHER or not who()):
            release_signals()
            os.kill(os.getpid(), number)
