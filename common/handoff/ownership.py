"""Who wrote what is in an output_dir: a program replaces and deletes only what it wrote itself, and
never what it reads.

A hidden file notes which stage writes to the folder, from before its first file on.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.config.fields import Input, inputs_of
from common.handoff.report import STAGE
from common.program.errors import InputError
from common.program.files import MANIFEST, dump, write_atomically

OWNER = ".owner"


def claim(
    cfg: Any, stage: str, names: Sequence[str], resumes: bool = False, signed: bool = True
) -> Path:
    """Make cfg.output_dir the folder of this stage, and return it.

    names: patterns of the files and folders that the stage may write there, beside stage.json and
    the manifest. resumes: the folder is known to be of this very run. signed: the stage begins to
    write; else it calls `sign` when it does. Raises InputError, before anything is touched, where
    one of the names is taken by what the config reads or by what another wrote.
    """
    folder, names = Path(cfg.output_dir), (*names, STAGE, MANIFEST)
    for given in inputs_of(cfg):
        refuse_input(folder, given, names)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    taken = [entry for entry in there if any(fnmatchcase(entry, name) for name in names)]
    writer = writer_of(folder)
    if taken and not resumes and writer != stage:
        by = f"was written by {writer}" if writer else f"was not written by {stage}"
        fix = "name an empty output_dir, or move it away"
        raise InputError(f"output_dir {folder}: {taken[0]} is there and {by}; {fix}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {folder}: {error.strerror or error}") from None
    if signed:
        sign(folder, stage)
    return folder


def sign(folder: Path, stage: str) -> None:
    """Note whose folder it is."""
    write_atomically(folder / OWNER, dump({"stage": stage}))


def refuse_input(folder: Path, given: Input, names: Sequence[str]) -> None:
    """Raise InputError when a program that writes `names` in `folder` would overwrite this input,
    or read its own output as rows."""
    key, path, is_rows = given
    out, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real == out:
        same = f"output_dir {folder}: is {key} too, which would be overwritten"
        raise InputError(f"{same}; name another directory")
    if real.is_relative_to(out):
        entry = real.relative_to(out).parts[0]
        if any(fnmatchcase(entry, name) for name in names):
            lies = f"{key} {path}: lies in output_dir {folder}, where {entry} would be overwritten"
            raise InputError(f"{lies}; name another directory")
    if is_rows and out.is_relative_to(real) and real.is_dir():
        lies = f"output_dir {folder}: lies in {key} {path}, of which all files are read"
        raise InputError(f"{lies}; name a directory outside")


def writer_of(folder: Path) -> str | None:
    """The stage that writes to a folder, or that has published it; None where none did."""
    for name, keys in ((OWNER, {"stage"}), (STAGE, {"stage", "gate"})):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(content, dict) and keys <= content.keys():
                return str(content["stage"])
    return None
