"""One bit flipped, or a file cut short, in a saved state or in a published directory: noticed, and
passed over or refused."""

import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from children import FULL, STAGES, child, on_call, same, uninterrupted

import common.train.run
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.program.errors import InputError
from common.rows.shards import Shards
from common.train.resume import newest_state

FLIPS, CUTS = (
    (30, 10) if FULL else (6, 4)
)  # of each stage's states, and of each kind of published directory
UPDATES = {"rl": 4}


def files_of(folder: Path) -> list[Path]:
    """All that the directory vouches for: not the logs, nor what an unfinished run keeps beside,
    nor the hidden note of whose folder it is."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and "state" not in path.relative_to(folder).parts
    ]
    return sorted(path for path in found if path.suffix != ".jsonl" and path.name[0] != ".")


def flip(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file} flipped"


def cut(file: Path, rng: random.Random) -> str:
    most = file.stat().st_size - 2  # JSON that lacks its last line end alone says the same
    size = rng.choice([0, rng.randrange(most), most])
    os.truncate(file, size)
    return f"{file} cut to {size} bytes"


def each_damage(files: list[Path], seed: int, check: Callable[[], bool]) -> int:
    """How often check() says that it noticed what was done to one of the files, which are as before
    afterwards."""
    rng, noticed = random.Random(seed), 0
    for damage in [flip] * FLIPS + [cut] * CUTS:
        file = rng.choice(files)
        before = file.read_bytes()
        what = damage(file, rng)
        assert check(), f"not noticed: {what}"
        noticed += 1
        file.write_bytes(before)
    return noticed


def killed(stage: str, keys: dict, step: int) -> None:
    """The run is killed in its step number `step` (from 0)."""
    die = lambda: os._exit(9)  # noqa: E731
    assert (
        child(
            stage,
            keys,
            lambda: on_call(common.train.run, "update", step * UPDATES.get(stage, 1), die),
        ).code
        == 9
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_state_is_passed_over(stage, setting, tmp_path):
    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    whole, _ = uninterrupted(tmp_path, stage, keys)
    killed(stage, keys, 5)
    states = tmp_path / "cut" / "state"
    assert newest_state(states)[0].name == "step-4"

    def check() -> bool:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            path, loop = newest_state(states)
        return path.name == "step-2" and loop["step"] == 2 and "step-4" in str(said[0].message)

    assert each_damage(files_of(states / "step-4"), 1, check) == FLIPS + CUTS
    flip(states / "step-4" / "moments.safetensors", random.Random(2))
    ended = child(stage, keys)
    assert ended.code == 0 and f"going on from {states / 'step-2'}" in ended.out, ended.err
    assert re.search(r"state passed over: \S+step-4/moments.safetensors: damaged", ended.err)
    same(tmp_path / "cut", whole)


def test_what_is_saved_after_a_damaged_state_stays(setting, tmp_path):
    """One kept state, damaged: the run begins anew, and its own saves, of earlier steps, must not
    give way to that one."""
    keys = setting("sft", output_dir=str(tmp_path / "cut"), save_total_limit=1)
    whole, _ = uninterrupted(tmp_path, "sft", keys)
    killed("sft", keys, 5)
    flip(tmp_path / "cut" / "state" / "step-4" / "weights.safetensors", random.Random(3))
    killed("sft", keys, 3)
    ended = child("sft", keys)
    assert ended.code == 0 and "going on from" in ended.out and "step-2" in ended.out, ended.err
    same(tmp_path / "cut", whole)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_log_that_lost_lines_is_named_and_goes_on(lost, all_of_it, setting, tmp_path):
    keys = setting("sft", output_dir=str(tmp_path / "cut"))
    killed("sft", keys, 5)
    log = tmp_path / "cut" / lost
    if all_of_it:
        log.unlink()
    else:
        os.truncate(log, 20)  # in the middle of a line
    ended = child("sft", keys)
    assert ended.code == 0 and f"{log}: lines are missing" in ended.err
    assert log.read_bytes()[:8] == b'{"step":'


@pytest.fixture
def published(setting, tmp_path) -> dict[str, tuple[list[Path], Callable[[], object]]]:
    """What each stage hands on: its files, and the reading of them by the next one."""
    shards = tmp_path / "shards"
    shutil.copytree(setting("pretrain")["train_data"], shards)
    found = {
        "shards": (
            files_of(shards),
            lambda: (load_tokenizer(str(shards)), Shards(str(shards), "train", 32)),
        )
    }
    for stage in STAGES:
        folder = tmp_path / stage
        lora_r = 0 if stage == "pretrain" else 2
        assert (
            child(stage, setting(stage, output_dir=str(folder), max_steps=1, lora_r=lora_r)).code
            == 0
        )
        shutil.rmtree(folder / "end")  # of these tests alone
        kind = "reward" if stage == "reward" else "lm"
        files = [file for file in files_of(folder) if "critic" not in file.parts]
        found[stage] = (files, lambda f=str(folder), k=kind: (load_model(f, k), load_tokenizer(f)))
    critic = tmp_path / "rl" / "critic"
    found["critic"] = (files_of(critic), lambda: load_model(str(critic), "reward"))
    return found


def test_a_damaged_directory_is_refused(published):
    for number, (files, read) in enumerate(published.values()):
        read()

        def check(read=read) -> bool:
            try:
                read()
            except InputError as error:
                return "damaged" in str(error) or "missing" in str(error)
            return False

        assert each_damage(files, number, check) == FLIPS + CUTS
        for file in files:
            content = file.read_bytes()
            file.unlink()
            with pytest.raises(InputError):
                read()
            file.write_bytes(content)


def test_other_names_beside_the_states(tmp_path):
    """No step's number, though a digit to isdigit()."""
    for name in ("step-\u00b2", "step-", "step-x", "step-4.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert newest_state(tmp_path) is None
