"""A program run in a child forked from this process, which has its libraries imported: a new
interpreter would need seconds for that."""

import importlib
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """How a child ended, and what it said."""

    code: int  # exit code, or minus the signal
    out: str
    err: str


def forked(work: Callable[[], object]) -> Ended:
    """work() in a child; SystemExit gives its exit code, any other exception 1 and a traceback."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                code = exit_code(work)
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
        return Ended(code, *said)


def exit_code(work: Callable[[], object]) -> int:
    """What the process of a program that does work() would end with."""
    try:
        work()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def program(module: str, *words: object) -> Ended:
    """`python -m module words...`, forked."""
    importlib.import_module(module)  # once for all children

    def work() -> None:
        sys.argv = [module, *map(str, words)]
        del sys.modules[module]  # it runs anew, under the name __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return forked(work)
