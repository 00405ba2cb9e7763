"""How far a long comparison is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines
FEW = 32  # answers: fewer come before anyone looks


class Progress:
    """Counts answers. Where stderr is no terminal (a log, a pipe) a bar would only make noise."""

    def __init__(self, total: int):
        """`total`: answers that will come."""
        self.total, self.done, self.what = total, 0, ""
        self.started = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()
        hidden = total < FEW or not self.terminal
        self.bar = tqdm(total=total, unit="answer", disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        """For `with`, which removes the bar at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.close()

    def begin(self, what: str) -> None:
        """Say what the next answers are."""
        self.what = what
        self.bar.set_description(what, refresh=False)

    def update(self, answers: int) -> None:
        """Count `answers` more."""
        self.done += answers
        self.bar.update(answers)
        now = time.monotonic()
        if not self.terminal and self.done < self.total and now - self.told >= EVERY:
            self.told = now
            left = (now - self.started) * (self.total - self.done) / self.done
            count = f"{self.done:,} of {self.total:,} answers"
            print(f"{self.what}: {count}, about {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time to wait, as people say it: `40 s`, `3 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
