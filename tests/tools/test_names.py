"""Short names for directories."""

import pytest

from common.program.errors import InputError
from tools.names import names_of


def test_as_many_parts_as_tell_them_apart():
    assert names_of(["runs/x/rl", "runs/x/sft/"], "models") == ["rl", "sft"]
    assert names_of(["runs/x/sft", "runs/y/sft/"], "models") == ["x/sft", "y/sft"]


def test_one_that_is_named_twice():
    with pytest.raises(InputError, match=r"^runs: a/b, a/b/: one is named twice$"):
        names_of(["a/b", "a/b/"], "runs")


def test_a_name_does_not_drive_the_terminal():
    assert names_of(["x/a\x1b[2J", "x/b\x9b\u202e"], "models") == [
        "a\\x1b[2J",
        "b\\x9b\\u202e",
    ]
