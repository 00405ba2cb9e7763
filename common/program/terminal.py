"""What may reach the terminal: text from data, models and files must neither drive it nor break
it."""

from typing import Any


def printable(text: str) -> str:
    """`text` with control characters as escapes, line ends and tabs as they are."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: Any) -> str:
    """`text` on one line, with control characters as escapes: for messages that quote data."""
    return printable(" ".join(str(text).split()))
