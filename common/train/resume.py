"""What a run in mid-way needs to go on as if it had never stopped: written whole or not at all,
verified before it is read.

`state/step-N/` holds the whole weights and optimizer moments by parameter name, each process's
random generator (safetensors) and loop.json: the loop's own values, the lengths of the log files,
and what the run must have in common with the one that goes on. Nothing in it says how many
processes wrote it, so any number may go on from it, with or without ZeRO.
"""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config.schema import to_dict
from common.config.training import TrainConfig
from common.handoff.locate import content_of_model, lineage
from common.program.errors import Failure, InputError
from common.program.files import (
    MANIFEST,
    check_room,
    verify,
    write_atomically,
    write_manifest,
)
from common.train.placement import put_moments, whole_moments, whole_weights

LOOP = "loop.json"
# Keys that may change between an interrupted run and the one that goes on: they say where it writes
# and how it reports. The two that make up a micro-batch are free because their product with the
# processes is compared.
FREE = {"output_dir", "resume", "save_steps", "save_total_limit", "report_to"}
FREE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
FREE |= {"rollout_batch_size"}
MODELS = ("parent", "reference", "reward_model", "critic")  # keys that name one


class Saved(NamedTuple):
    """A saved state that a run can go on from."""

    path: Path  # .../state/step-N
    loop: dict[str, Any]  # its loop.json


class BatchShape(NamedTuple):
    """How an update's rows are split."""

    rows: int  # in an update, over all processes
    accumulation: int  # micro-batches of it on each process


def folders(folder: Path) -> dict[Path, int]:
    """{saved state: its step}, newest first; unfinished ones (`step-N.tmp`) are not among them."""
    named = {
        path: path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()
    }
    found = {path: int(step) for path, step in named.items() if step.isdecimal()}
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
    generators_of_all = enumerate(gather_object([random]))
    tensors = {
        "weights.safetensors": whole_weights(accelerator, module),
        "moments.safetensors": whole_moments(accelerator, optimizer, module),
        "random.safetensors": {
            f"{rank}.{key}": state for rank, one in generators_of_all for key, state in one.items()
        },
    }
    if accelerator.is_main_process:
        write_state(folder, tensors, loop)
        drop_old(folder, loop["step"], keep)
    accelerator.wait_for_everyone()


def write_state(folder: Path, tensors: dict[str, dict[str, Tensor]], loop: dict[str, Any]) -> None:
    """Write `folder`/step-N whole, or not at all. Raises Failure when it cannot be written."""
    target = folder / f"step-{loop['step']}"
    temporary = target.with_name(target.name + ".tmp")
    try:
        for unfinished in folder.glob("step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)
        check_room(folder, sum(t.nbytes for group in tensors.values() for t in group.values()))
        for name, group in tensors.items():
            save_file(group, temporary / name)
        # The logs too: else a power cut could leave the state ahead of them.
        logs = [folder.parent / name for name in loop["logs"]]
        for file in [*(temporary / name for name in tensors), *logs]:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        # No `dump`: a metric may be infinite, the gradient norm of a step that fp16 skipped say.
        write_atomically(temporary / LOOP, json.dumps(loop, indent=2).encode())
        write_manifest(temporary, [temporary / name for name in (*tensors, LOOP)])
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except Exception as error:  # safetensors has errors of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        last = next(iter(folders(folder)), None)
        kept = f"{last} is as it was" if last else "nothing was saved before"
        raise Failure(
            f"{target}: could not be saved: {error}; {kept}. "
            "Make room, then the same command goes on"
        ) from None


def drop_old(folder: Path, step: int, keep: int) -> None:
    """Drop all saved states but the newest `keep` up to `step`. One of a later step was passed over
    as damaged: it would only take the place of a good one."""
    saved = folders(folder)
    good = [path for path, its_step in saved.items() if its_step <= step][:keep]
    for old in saved.keys() - set(good):
        shutil.rmtree(old)


def drop_all(folder: Path) -> None:
    """Drop all saved states, and `folder` where nothing of another is in it."""
    for old in folder.glob("step-*"):
        if old.name.removesuffix(".tmp").removeprefix("step-").isdecimal():
            shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def newest_state(folder: Path) -> Saved | None:
    """The newest state that is whole; a damaged one is named and passed over."""
    for path in folders(folder):
        try:
            if not (path / MANIFEST).exists():
                raise InputError(f"{path}: the save was cut short (no {MANIFEST})")
            verify(path)
            return Saved(path, json.loads((path / LOOP).read_text()))
        except InputError as error:
            warnings.warn(f"state passed over: {error}", stacklevel=2)
    return None


def load_weights(module: nn.Module, path: Path) -> None:
    """Put the saved weights into a module that is not yet prepared, which may split it."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path / "weights.safetensors").items():
            parameters[name].copy_(tensor)


def load_moments(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    """Put optimizer and generators back as they were. With another number of processes than wrote
    it, the generators go on from the seed."""
    put_moments(accelerator, optimizer, module, load_file(path / "moments.safetensors"))
    saved = load_file(path / "random.safetensors")
    rank, device = accelerator.process_index, accelerator.device
    if {int(name.split(".")[0]) for name in saved} == set(range(accelerator.num_processes)):
        torch.set_rng_state(saved[f"{rank}.cpu"])
        if device.type == "cuda" and f"{rank}.cuda" in saved:
            torch.cuda.set_rng_state(saved[f"{rank}.cuda"], device)


def batch_shape(cfg: TrainConfig, processes: int, found: Saved | None) -> BatchShape:
    """How the rows of an update are split over the processes of this run.

    Where only the number of processes is not that of the state, the rows of an update stay, and so
    the place in the data: the accumulation gives way. Raises InputError where it cannot.
    """
    micro, asked = cfg.per_device_train_batch_size, rows_per_process(cfg)
    rows = asked * processes
    if found and found.loop["per_process"] == asked:
        rows = found.loop["run"]["global_batch"]
    if found and rows % (micro * processes):
        raise InputError(
            f"{found.path}: is of a run with {rows} rows an update, which {processes} processes of "
            f"per_device_train_batch_size {micro} cannot share; change one of the two"
        )
    return BatchShape(rows, rows // (micro * processes))


def rows_per_process(cfg: TrainConfig) -> int:
    """Rows of an update on one process, as the config asks for them."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps


def identity(cfg: TrainConfig, global_batch: int) -> dict[str, Any]:
    """What a run that goes on must share with the one that left the state."""
    config = {key: value for key, value in to_dict(cfg).items() if key not in FREE}
    parent = lineage(cfg.parent).get("parent_hash")
    models = {
        f"{key}'s content": content_of_model(path) for key in MODELS if (path := config.get(key))
    }
    return {**config, **models, "parent_hash": parent, "global_batch": global_batch}


def with_new_keys(noted: dict[str, Any], cfg: TrainConfig, now: dict[str, Any]) -> dict[str, Any]:
    """What a state notes of its run; keys that the config has gained since then count with their
    defaults, and contents of models that were not noted yet as they are `now`."""
    fields = type(cfg).__pydantic_fields__  # type: ignore[attr-defined]
    gained = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if not field.is_required() and key not in FREE
    }
    contents = {key: value for key, value in now.items() if key.endswith("'s content")}
    return gained | contents | noted


def check_same_run(path: Path, noted: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError naming the first key in which the run that left this state differs from the
    one that is to go on."""
    for key in sorted(noted.keys() | now.keys()):
        if noted.get(key) != now.get(key):
            raise InputError(
                f"{path}: is of a run with {key} = {noted.get(key)}, this one has {now.get(key)}; "
                f"give it back its {key}, or start over with another output_dir or without "
                f"{path.parent}"
            )


def check_empty(folder: Path) -> None:
    """Raise InputError when a run that starts over (resume false) would write among old files."""
    # Hidden files are the pipeline's notes.
    if any(not path.name.startswith(".") for path in folder.glob("*")):
        raise InputError(
            f"resume false: {folder} is not empty; to start over name an empty output_dir, "
            "or clear it"
        )
