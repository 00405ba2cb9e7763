"""Plants faults and tells which of them the tests find.

    python -m tests.mutants                 # all of them
    python -m tests.mutants NAME ...        # those whose name contains one of the words
    python -m tests.mutants --sample 6      # so many of them, other ones every day

Exit code 0 when every fault is caught, else 1. Without the fault the same tests must pass: all of
them, and words, are checked so; a sample is not, as its tests run in `make test` anyway.
"""

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence

from tests.mutants.catalogue import ALL
from tests.mutants.mutant import Mutant
from tests.mutants.sweep import BROKEN, CAUGHT, SURVIVED, Verdict, sweep


def sample(mutants: Sequence[Mutant], count: int, day: int) -> list[Mutant]:
    """So many of the quick ones; every day goes on where the day before ended."""
    quick = [mutant for mutant in mutants if not mutant.slow]
    return [quick[(day * count + n) % len(quick)] for n in range(min(count, len(quick)))]


def controls(mutants: Sequence[Mutant]) -> list[list[str]]:
    """The tests that are named, those of a file together."""
    files: dict[str, set[str]] = {}
    for mutant in mutants:
        for test in mutant.tests:
            files.setdefault(test.split("::")[0], set()).add(test)
    return [[file] if file in tests else sorted(tests) for file, tests in files.items()]


def line(name: str, verdict: Verdict) -> str:
    """One row of the table."""
    where = verdict.test.removeprefix("tests/")
    return f"{verdict.outcome:8}  {verdict.seconds:5.1f} s  {name:45}  {where}"


def main() -> int:
    """Sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="parts of names; none: all faults")
    parser.add_argument("--sample", type=int, help="so many faults, other ones every day")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    chosen = [m for m in ALL if not given.words or any(word in m.name for word in given.words)]
    if given.sample is not None:
        chosen = sample(chosen, given.sample, datetime.date.today().toordinal())
    unharmed = [] if given.sample is not None else controls(chosen)
    began, wrong, caught = time.perf_counter(), [], 0
    jobs = [(None, tests) for tests in unharmed] + [(mutant, mutant.tests) for mutant in chosen]
    for number, verdict in sweep(jobs, given.jobs):
        mutant, tests = jobs[number]
        if mutant is None:
            name = f"(no fault) {tests[0].split('::')[0]}"
            verdict = verdict._replace(outcome="passes" if verdict.outcome == SURVIVED else BROKEN)
        else:
            name = mutant.name
            caught += verdict.outcome == CAUGHT
        if verdict.outcome not in (CAUGHT, "passes"):
            wrong.append(f"{verdict.outcome} {name}: {mutant.why if mutant else ''} {verdict.said}")
        print(line(name, verdict), flush=True)
    minutes = (time.perf_counter() - began) / 60
    print(*wrong, f"{caught} of {len(chosen)} caught in {minutes:.1f} minutes", sep="\n")
    return int(bool(wrong) or not chosen)


if __name__ == "__main__":
    sys.exit(main())
