"""How every program starts and ends: one line for each kind of failure, and its exit code."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from common.program.errors import INTERRUPTED, Failure, InputError, Interrupted
from common.program.terminal import one_line


def guard(main: Callable[[], int | None]) -> None:
    """Run main() as a program: exits with the int that it returns, 2 and one line for an
    InputError, 75 when interrupted with all saved, 130 for Ctrl-C where there was nothing to save,
    1 and one line (a traceback above it, if it is a bug, or another process that died) for
    everything else."""
    rank, processes = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    who = f"process {rank} of {processes}: " if processes != "1" else ""
    try:
        code = main() or 0
    except InputError as error:
        print(f"{who}error: {one_line(error)}", file=sys.stderr)
        code = 2
    except Failure as error:
        print(f"{who}error: {one_line(error)}", file=sys.stderr)
        code = 1
    except Interrupted as stop:
        print(f"{who}interrupted: {stop}", file=sys.stderr)
        code = INTERRUPTED
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = (
            2
            if getattr(error, "errno", None) in (errno.EACCES, errno.ENAMETOOLONG, errno.EROFS)
            else 1
        )
        if code == 2:  # a path that cannot be used
            print(f"{who}error: {one_line(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
            program = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
            print(
                f"{who}error: {program}: {type(error).__name__}: {one_line(error)}", file=sys.stderr
            )
    if code:
        if path := os.environ.get(
            "EXIT_CODE_FILE"
        ):  # accelerate turns every code into 1: tell the pipeline
            Path(path).write_text(str(code))
        # Where others may wait for this process, no orderly end: it would wait for them.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code) if who else sys.exit(code)
