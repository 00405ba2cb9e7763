"""Killed at every boundary between two file operations of a save or a publication, with the file
before it whole, half written or empty: the run goes on from the last state that was whole, and ends
as if nothing had been."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from children import FORGET, FULL, STAGES, child, on_call, same, uninterrupted

import common.train.resume
import common.train.run
from common.program.files import verify

# The state before the save that is hit, and the last one before the end, of 7 steps saved every 2.
SAVED, LAST = 2, 6
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR


class Operations:
    """In a child: counts what is done to files in `folder` from `arm()` on, and dies right before
    number `at`.

    left: what becomes of a file that was opened for writing in the operation before: "whole",
    "half" or "empty".
    """

    def __init__(self, folder: Path, at: int | None, left: str) -> None:
        self.folder, self.at, self.left = str(folder), at, left
        self.armed, self.writing, self.seen = False, "", []
        for owner in (
            common.train.resume,
            safetensors.torch,
        ):  # Rust's writing raises no audit event
            real = owner.save_file
            owner.save_file = lambda tensors, name, *rest, real=real, **more: (
                sys.audit("open", str(name), "wb", os.O_WRONLY),
                real(tensors, name, *rest, **more),
            )
        sys.addaudithook(self.hook)

    def arm(self) -> None:
        self.armed = True

    def hook(self, event: str, args: tuple) -> None:
        if not self.armed or not (
            event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES)
        ):
            return
        path, inside_rmtree = str(args[0]), event in ("os.remove", "os.rmdir") and args[1] != -1
        if not (path.startswith(self.folder) or inside_rmtree):
            return
        if len(self.seen) == self.at:
            self.armed = False
            if self.left != "whole":
                os.truncate(
                    self.writing,
                    Path(self.writing).stat().st_size // 2 if self.left == "half" else 0,
                )
            os._exit(9)
        self.writing = path if event == "open" and "a" not in str(args[1]) else ""
        self.seen.append(self.writing)

    def note(self) -> None:
        self.armed = False
        (Path(self.folder).parent / "operations.json").write_text(json.dumps(self.seen))


def in_save(operations: Operations) -> None:
    """The second save, of step 4: with save_total_limit 1 it also drops the first."""
    on_call(common.train.run, "save_state", 1, operations.arm)
    if operations.at is None:
        on_call(common.train.run, "save_state", 2, operations.note)


def in_publish(operations: Operations) -> None:
    on_call(common.train.run.Run, "publish", 0, operations.arm)

    def forget(run: common.train.run.Run) -> None:
        FORGET(run)
        operations.note()

    common.train.run.Run.forget = forget


def crashes(
    folder: Path, stage: str, keys: dict, place: Callable[[Operations], None]
) -> list[tuple[int, str]]:
    """All (operation, what it left of its file) at which the run can be killed there; a sample of
    them in a short run."""
    ended = child(stage, keys, lambda: place(Operations(Path(keys["output_dir"]), None, "whole")))
    assert ended.code == 0, ended.err
    seen = json.loads((folder / "operations.json").read_text())
    found = [(n, "whole") for n in range(len(seen))]
    found += [
        (n + 1, left) for n, file in enumerate(seen[:-1]) if file for left in ("half", "empty")
    ]
    assert len(found) > 20
    return sorted(found) if FULL else sorted(found)[3::15]


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        (s, p)
        for s in STAGES
        for p in (in_save, in_publish)
        if FULL or (s, p) in (("sft", in_save), ("rl", in_publish))
    ],
)
def test_killed_between_two_file_operations(stage, place, setting, tmp_path):
    lora_r = 2 if place == in_publish and stage != "pretrain" else 0  # with an adapter to publish
    keys = setting(stage, lora_r=lora_r, save_total_limit=1 if place == in_save else 2)
    whole, _ = uninterrupted(tmp_path, stage, keys)
    for at, left in crashes(
        tmp_path, stage, keys | {"output_dir": str(tmp_path / "counted")}, place
    ):
        folder = tmp_path / f"{at}-{left}"
        folder.mkdir()
        cut = keys | {"output_dir": str(folder / "cut")}
        ended = child(
            stage, cut, lambda a=at, n=left, c=cut: place(Operations(Path(c["output_dir"]), a, n))
        )
        assert ended.code == 9, f"{folder}: {ended.err}"
        manifest = Path(cut["output_dir"], "manifest.json")
        published = (
            place == in_publish and manifest.exists() and (stage != "rl" or not_before(manifest))
        )
        if published:
            verify(manifest.parent)
        ended = child(stage, cut)
        assert ended.code == 0, f"{folder}: {ended.err}"
        resumed = re.search(r"going on from \S+/state/step-(\d+)", ended.out)
        if not published:  # of a stage that is published nothing can be lost
            assert resumed and int(resumed[1]) >= (SAVED if place == in_save else LAST), (
                f"{folder}: {ended.out}"
            )
        same(cut["output_dir"], whole)
        left_over = [
            path.name for path in Path(cut["output_dir"]).rglob("*") if ".tmp" in path.name
        ]
        assert not left_over
        assert not Path(cut["output_dir"], "state").exists()


def not_before(manifest: Path) -> bool:
    """The directory of PPO counts only when its critic's does."""
    critic = manifest.parent / "critic"
    assert (critic / manifest.name).exists(), "published before its critic"
    verify(critic)
    return True
