"""A lock a directory: one program at a time writes there. The kernel drops a lock when its holder
is gone, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from common.program.errors import InputError

LOCK = ".lock"  # of the program that writes in the directory that it lies in


def take(file: Path, holder: str = "another program") -> TextIO:
    """Lock `file`, until what is returned is closed; its folder is made.

    Raises InputError where `holder` has it, and where nothing can be written. A file system that
    knows no locks refuses nobody.
    """
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = file.open("a")
    except OSError as error:
        raise InputError(f"output_dir {folder}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise InputError(
            f"output_dir {folder}: {holder} is running there; wait for its end, or name another"
        ) from None
    except OSError:
        return handle
    if is_at(file, handle):
        return handle
    handle.close()  # the holder before has removed it meanwhile
    return take(file, holder)


def is_at(file: Path, handle: TextIO) -> bool:
    """Whether `file` is still the one that was opened as `handle`."""
    with suppress(OSError):
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    return False


@contextmanager
def held(folder: str | Path | None) -> Iterator[None]:
    """Hold the lock of the directory that this program writes to, if it writes to one; of several
    processes the first holds it. A directory that it had to make, and that stays empty, goes again.
    Raises InputError as `take` does."""
    if folder is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    file = Path(folder, LOCK)
    made = not file.parent.exists()
    with take(file) as handle:
        try:
            yield
        finally:
            if is_at(file, handle):
                file.unlink(missing_ok=True)
            with suppress(OSError):
                if made:
                    file.parent.rmdir()


def refuse_held(folder: Path) -> None:
    """Raise InputError where some program writes to `folder`."""
    if (folder / LOCK).exists():
        take(folder / LOCK).close()
