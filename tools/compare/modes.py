"""The modes in which models answer: drawn by chance, and greedy."""

from typing import Any

MODES = {
    "sampled": "sampled at temperature {temperature:g}",
    "greedy": "greedy (the likeliest token each time)",
}


def modes(result: dict[str, Any]) -> list[str]:
    """The modes of a comparison, as compare.json holds it."""
    return [mode for mode in MODES if mode in result]
