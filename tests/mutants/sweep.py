"""Runs the tests of planted faults, several at a time.

This process imports the libraries once. For each fault it forks a child, which forgets the
project's own modules, compiles the faulty text in the place of one of them, and runs the tests.
No file is changed or copied.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest

from tests.mutants.mutant import ROOT, Mutant
from tests.source_tree import module_of

CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"
OURS = {"benchmarks", "common", "data", "stages", "tools"}  # packages of the project
LIBRARIES = (
    *("stages.pretrain.train", "stages.pretrain.prepare", "stages.sft.train"),
    *("stages.reward.train", "stages.reward.collect", "stages.rl.train", "tools.compare.measure"),
    *("peft", "matplotlib"),
)
LONGEST = 120  # seconds of one test


class Verdict(NamedTuple):
    """What the tests said of a fault."""

    outcome: str  # CAUGHT, SURVIVED, or BROKEN: they fail, but not as they would find a fault
    test: str  # the one that found it
    said: str  # how it failed
    seconds: float


class _Loader(SourceFileLoader):
    """Compiles a given text in the place of a file's own."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        """Never from a cache."""
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Planting(MetaPathFinder):
    """Finds one module of the project with a fault in it."""

    def __init__(self, mutant: Mutant) -> None:
        self.module, self.file = module_of(mutant.file), str(ROOT / mutant.file)
        self.text = mutant.source()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of the faulty module; None for all others."""
        if fullname != self.module:
            return None
        loader = _Loader(fullname, self.file, self.text)
        return spec_from_file_location(fullname, self.file, loader=loader)


class Judge:
    """A pytest plugin: ends at the first test that finds the fault.

    Only an assertion finds one. A test that fails in another way may be told so by a fault that
    keeps the program from running at all, which nobody needs a test for.
    """

    def __init__(self) -> None:
        self.outcome, self.test, self.said = SURVIVED, "", ""

    def note(self, outcome: str, test: str, said: str) -> None:
        """A failure; a later one counts only where it says more."""
        if self.outcome != CAUGHT and (outcome == CAUGHT or self.outcome == SURVIVED):
            lines = said.strip().splitlines() or [""]
            self.outcome, self.test, self.said = outcome, test, lines[0][:200]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        """Look at how a test or its fixtures failed."""
        report = yield
        if report.failed and call.excinfo is not None:
            error = call.excinfo.value
            told = isinstance(error, AssertionError | pytest.fail.Exception)
            found = told and not str(error).startswith("Timeout")
            said = f"{type(error).__name__}: {error}"
            self.note(CAUGHT if found else BROKEN, item.nodeid, said)
            item.session.shouldstop = found
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file of tests that cannot be read."""
        if report.failed:
            self.note(BROKEN, report.nodeid, f"collection: {str(report.longrepr)[-200:]}")


def import_libraries() -> None:
    """Whatever takes long to import. The project's modules are imported for what they need."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # the children need not go through all that again and again


def judge(mutant: Mutant | None, tests: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the tests in this process, with the fault in place (None: without any)."""
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    if mutant is not None:
        sys.meta_path.insert(0, Planting(mutant))
    plugin = Judge()
    unneeded = ("cacheprovider", "xdist", "hypothesispytest", "unraisableexception")
    words = [*(f"-pno:{name}" for name in unneeded), "--timeout", str(LONGEST), "--tb=no"]
    code = pytest.main([*words, f"--basetemp={folder / 'tmp'}", *tests], plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        plugin.note(BROKEN, "", f"pytest ended with {code!s}")
    return {"outcome": plugin.outcome, "test": plugin.test, "said": plugin.said}


def start(mutant: Mutant | None, tests: Sequence[str], folder: Path) -> int:
    """Fork a child that judges, and writes its verdict into the folder; returns its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), (folder / "said").open("w") as said:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = said
            verdict = judge(mutant, tests, folder)
            (folder / "verdict.json").write_text(json.dumps(verdict))
        os._exit(0)
    return pid


def sweep(
    jobs: Sequence[tuple[Mutant | None, Sequence[str]]], at_once: int
) -> Iterator[tuple[int, Verdict]]:
    """(number of the job, verdict) of each, in the order in which they end."""
    os.chdir(ROOT)
    import_libraries()
    waiting, running = list(enumerate(jobs))[::-1], {}
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, job = waiting.pop()
                folder = Path(scratch, str(number))
                folder.mkdir()
                running[start(*job, folder)] = number, folder, time.perf_counter()
            number, folder, began = running.pop(os.wait()[0])
            seconds = time.perf_counter() - began
            file = folder / "verdict.json"
            if file.exists():
                yield number, Verdict(**json.loads(file.read_text()), seconds=seconds)
            else:
                last = (folder / "said").read_text()[-200:]
                yield number, Verdict(BROKEN, "", f"the child died: {last}", seconds)
