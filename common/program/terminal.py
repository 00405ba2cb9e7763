"""What goes to the terminal: one place that keeps control characters out of it."""

from typing import Any


def one_line(text: Any) -> str:
    """Fit for a terminal: what is quoted from data must neither drive it nor be more than it can
    encode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))
