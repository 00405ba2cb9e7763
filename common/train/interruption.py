"""A signal that asks a run to stop: it goes on to a place where it can save, and ends there."""

import os
import time
from typing import Any

from common.program.errors import Interrupted
from common.program.signals import catch_signals, release_signals

TOGETHER = 2.0  # seconds within which two signals are one and the same request


class Interruption:
    """Whether SIGTERM or SIGINT asked this process to stop; made first of all in a run.

    The first signal asks, a second one ends the process at once. Before anything `has_begun` there
    is nothing to save, and the first one raises Interrupted where the process is.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.has_begun = False
        self.asked_at: float | None = None  # time of the first signal; None: nobody asked
        catch_signals(self.handle)

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
        elif now - self.asked_at > TOGETHER or os.environ.get("WORLD_SIZE", "1") == "1":
            release_signals()
            os.kill(os.getpid(), number)
