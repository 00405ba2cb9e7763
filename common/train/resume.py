"""What a run in mid-way needs to go on as if it had never stopped: written whole or not at all,
verified before it is read.

`state/step-N/` holds the whole weights and optimizer moments by parameter name, each process's
random generator (safetensors) and loop.json: the loop's own values, the lengths of the log files,
and what the run must have in common with the one that goes on. Nothing in it says how many
processes wrote it, so any number may go on from it, with or without ZeRO.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.program.errors import Failure, InputError
from common.program.files import (
    MANIFEST,
    check_room,
    dump,
    verify,
    write_atomically,
    write_manifest,
)
from common.train.placement import put_moments, whole_moments, whole_weights

LOOP = "loop.json"


def folders(folder: Path) -> dict[Path, int]:
    """{saved state: its step}, newest first; unfinished ones (`step-N.tmp`) are not among them."""
    found = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    found = {path: int(step) for path, step in found.items() if step.isdigit()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def generators(device: torch.device) -> dict[str, Tensor]:
    """State of the random generators that training draws from, on this process."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def save_state(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    loop: dict[str, Any],
    random: dict[str, Tensor],
    keep: int,
) -> None:
    """Write `folder`/step-N of loop["step"] = N; then drop all but the newest `keep`. Every process
    must call it.

    Raises Failure when the disk has no room: what was saved before is untouched then.
    """
    target = folder / f"step-{loop['step']}"
    temporary = target.with_name(target.name + ".tmp")
    tensors = {
        "weights.safetensors": whole_weights(accelerator, module),
        "moments.safetensors": whole_moments(accelerator, optimizer, module),
        "random.safetensors": {
            f"{n}.{key}": t
            for n, one in enumerate(gather_object([random]))
            for key, t in one.items()
        },
    }
    if accelerator.is_main_process:
        try:
            for unfinished in folder.glob("step-*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            temporary.mkdir(parents=True)
            check_room(
                folder,
                sum(
                    t.numel() * t.element_size()
                    for group in tensors.values()
                    for t in group.values()
                ),
            )
            for name, group in tensors.items():
                save_file(group, temporary / name)
            # The logs too: else a power cut could leave the state ahead of them.
            for file in [
                *(temporary / name for name in tensors),
                *(folder.parent / name for name in loop["logs"]),
            ]:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            write_atomically(temporary / LOOP, dump(loop))
            write_manifest(temporary, [temporary / name for name in (*tensors, LOOP)])
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except Exception as error:  # safetensors has errors of its own for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            last = next(iter(folders(folder)), None)
            kept = f"{last} is as it was" if last else "nothing was saved before"
            raise Failure(
                f"{target}: could not be saved: {error}; {kept}. Make room, then the same command goes on"
            ) from None
        saved = folders(folder)
        # One of a later step was passed over as damaged: it would only take the place of a good
        # one.
        good = [path for path, step in saved.items() if step <= loop["step"]][:keep]
        for old in saved.keys() - set(good):
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


def load_weights(module: nn.Module, path: Path) -> None:
    """Before the module is prepared, which may split it."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path / "weights.safetensors").items():
            parameters[name].copy_(tensor)


def load_moments(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    """Optimizer and generators as they were. With other processes than wrote it, the generators go
    on from the seed."""
    put_moments(accelerator, optimizer, module, load_file(path / "moments.safetensors"))
    saved, rank, device = (
        load_file(path / "random.safetensors"),
        accelerator.process_index,
        accelerator.device,
    )
    if {int(name.split(".")[0]) for name in saved} == set(range(accelerator.num_processes)):
        torch.set_rng_state(saved[f"{rank}.cpu"])
        if device.type == "cuda" and f"{rank}.cuda" in saved:
            torch.cuda.set_rng_state(saved[f"{rank}.cuda"], device)


def check_same_run(path: Path, noted: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError naming the first key in which the run that left this state differs from the
    one that is to go on."""
    for key in sorted(noted.keys() | now.keys()):
        if noted.get(key) != now.get(key):
            raise InputError(
                f"{path}: is of a run with {key} = {noted.get(key)}, this one has {now.get(key)}; give it back its {key}, "
                f"or start over with another output_dir or without {path.parent}"
            )
