"""What a run in mid-way needs to go on as if it had never stopped: written whole or not at all, verified before it is read.

`state/step-N/` holds what accelerate saves (weights, optimizers, scaler, random generators) and loop.json: the loop's own
values, the lengths of the log files, and what the run must have in common with the one that goes on from it.
"""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common.checkpoint import MANIFEST, dump, verify, write_atomically, write_manifest
from common.config import InputError

LOOP = "loop.json"
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # at each save it warns of tied embeddings, which load well


def folders(folder: Path) -> list[Path]:
    """Saved states, newest first; unfinished ones (`step-N.tmp`) are not among them."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def save_state(accelerator: Accelerator, folder: Path, step: int, loop: dict[str, Any], keep: int) -> None:
    """Write `folder`/step-N; then drop all but the newest `keep`. Every process must call it."""
    target, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomically(temporary / LOOP, dump(loop))
        write_manifest(temporary, [file for file in temporary.rglob("*") if file.is_file()])
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in folders(folder)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest state that is whole, and its loop.json; a damaged one is named and passed over."""
    for path in folders(folder):
        try:
            if not (path / MANIFEST).exists():
                raise InputError(f"{path}: the save was cut short (no {MANIFEST})")
            verify(path)
            return path, json.loads((path / LOOP).read_text())
        except InputError as error:
            warnings.warn(f"state passed over: {error}", stacklevel=2)
    return None


def check_same_run(path: Path, noted: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError naming the first key in which the run that left this state differs from the one that is to go on."""
    for key in sorted(noted.keys() | now.keys()):
        if noted.get(key) != now.get(key):
            raise InputError(
                f"{path}: is of a run with {key} = {noted.get(key)}, this one has {now.get(key)}; give it back its {key}, "
                f"or start over with another output_dir or without {path.parent}"
            )
