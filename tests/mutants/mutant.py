"""A planted fault, and how its text is put in the place of the right one."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A fault that somebody could make, and the tests that must fail where somebody has."""

    name: str
    file: str  # from the root of the project
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # pytest's names of files or tests
    why: str  # what would go wrong
    blind: bool = False  # written by someone who had not seen the tests
    slow: bool = False  # too slow for a sample

    def source(self) -> str:
        """The file's text with the fault in it. Raises ValueError when the old text is not there,
        or more than once."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its old text is {found} times in {self.file}")
        return text.replace(self.old, self.new)
