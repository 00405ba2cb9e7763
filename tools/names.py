"""Short names for directories that are shown beside each other."""

from collections.abc import Sequence
from pathlib import Path

from common.program.errors import InputError
from common.program.terminal import printable


def names_of(paths: Sequence[str], key: str) -> list[str]:
    """A short name for each directory: its last part, or as many parts as tell it from the others;
    what drives a terminal is escaped.

    `key` is the option that the paths come from. Raises InputError when one is named twice.
    """
    parts = [Path(path).parts if Path(path).name else Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError(f"{key}: {', '.join(paths)}: one is named twice")
    size = 1
    while len({part[-size:] for part in parts}) < len(parts):
        size += 1
    return [printable("/".join(part[-size:])) for part in parts]
