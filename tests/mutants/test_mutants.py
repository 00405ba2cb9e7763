"""The planted faults and the tool that plants them. `make mutants` runs all of them."""

import subprocess
import sys

import pytest

from tests.mutants.__main__ import sample
from tests.mutants.catalogue import ALL
from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.sweep import BROKEN, CAUGHT, SURVIVED

SAMPLE = 6


def test_every_fault_can_be_planted():
    """Its old text is there once, what it becomes is Python, and its tests exist."""
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    for mutant in ALL:
        compile(mutant.source(), mutant.file, "exec")
        assert mutant.old != mutant.new and mutant.tests and mutant.why, mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_there_are_as_many_as_promised():
    assert len(ALL) >= 80
    assert sum(mutant.blind for mutant in ALL) >= 20


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_fault_that_cannot_be_planted_is_named(old):
    mutant = Mutant("mine", "common/program/files.py", old, "", ("x",), "y")
    with pytest.raises(
        ValueError, match=r"mine: its old text is \d+ times in common/program/files"
    ):
        mutant.source()


def test_samples_of_consecutive_days_are_all_there_is():
    quick = [mutant for mutant in ALL if not mutant.slow]
    days = range(-(-len(quick) // SAMPLE))
    assert {mutant.name for day in days for mutant in sample(ALL, SAMPLE, day)} == {
        mutant.name for mutant in quick
    }


@pytest.mark.heavy
def test_a_sample_of_them_is_caught():
    words = [sys.executable, "-m", "tests.mutants", "--sample", str(SAMPLE)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{SAMPLE} of {SAMPLE} caught" in done.stdout


TESTS = """
import pytest
from common.train.optimizers import is_due

def test_it():
    assert is_due(3, 3, 8)

def test_it_raises():
    with pytest.raises(TypeError):
        is_due(None, 1, 8)
"""
RIGHT = "return done == steps or bool(every and done % every == 0)"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("new", "outcome"),
    [
        ("return False", CAUGHT),
        ("return done == steps or bool(every and not done % every)", SURVIVED),
        ("return no_such_name", BROKEN),
        ("return (", BROKEN),
        ("raise ImportError", BROKEN),
    ],
)
def test_only_an_assertion_finds_a_fault(tmp_path, new, outcome):
    """Neither a program that does not start nor one that stumbles is found by a test."""
    file = tmp_path / "test_it.py"
    file.write_text(TESTS)
    mutant = Mutant("mine", "common/train/optimizers.py", RIGHT, new, (str(file),), "y")
    script = (
        "import sys; from tests.mutants.mutant import Mutant; from tests.mutants import sweep\n"
        "sweep.LIBRARIES = ()\n"
        f"(_, verdict), = sweep.sweep([({mutant!r}, {mutant.tests!r})], 1)\n"
        "print(verdict.outcome)"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == [outcome], done.stdout + done.stderr
