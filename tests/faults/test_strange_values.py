"""Every key of every config, and every value of every file that is read, replaced by strange ones:
the program does its work, or ends with one line. Never a traceback, a hang or a hunger for memory.

`make test` takes a sample; FAULTS=1 takes all, more than 6 000.
"""

import json
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.fields import schemas_of
from common.config.schema import cli
from tests.faults.conftest import STAGES
from tests.forked import Ended, forked

STRANGE = [
    *(None, True, -1, 0, 1, 0.5, -1e-5, 1e30, 1e308, 10**30, 2**31, 10_000_000),
    *("", "x", "1e-5", "１", "null", "../x", "~", "/", "/dev/full", "a\0b", "\x1b[2J\u202e"),
    *([], [[]], [None], ["x"], {}, {"a": 1}),
]
ALL = bool(os.environ.get("FAULTS"))
SHARE = 200  # one case of so many runs where not all do
SECONDS, MEMORY = 60, 3 * 2**30  # that a case may take, beside what the test process has
# What a model directory and a folder of shards hold, and the program that reads it.
FILES = [
    *(("lm", name, "sft") for name in ("config.json", "stage.json", "manifest.json")),
    *(("lm", name, "sft") for name in ("tokenizer.json", "tokenizer_config.json")),
    ("reward", "config.json", "rl"),
    *(("shards", name, "pretrain") for name in ("shards.json", "stage.json", "manifest.json")),
]


def is_taken(*names: object) -> bool:
    """Whether a case is in the sample."""
    return ALL or zlib.crc32(repr(names).encode()) % SHARE == 0


def run(stage: str, file: Path) -> Ended:
    """The stage with this config, in a child that may take only so much."""

    def work() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the child: it hangs
        signal.alarm(SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        cli(STAGES[stage].Config, STAGES[stage].main, ["--config", str(file)])

    return forked(work)


def check(case: tuple, ended: Ended) -> list[str]:
    """What is wrong with the way in which a case ended: nothing, or one line."""
    errors = [line for line in ended.err.splitlines() if "error: " in line]
    whole = ended.out + ended.err
    controls = any(not c.isprintable() and c not in "\n\t\r" for c in whole)
    good = ended.code in (0, 1, 2) and "Traceback" not in whole and not controls
    if good and len(errors) == (ended.code != 0):
        return []
    said = "Traceback" if "Traceback" in whole else "controls" if controls else "lines"
    return [f"{case}: exit {ended.code}, {said}: {ended.err[-300:]!r}"]


def report(bad: list[str]) -> None:
    """Fail, with every bad case on a line."""
    assert not bad, f"{len(bad)} cases:\n" + "\n".join(bad)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.timeout(3600)
def test_values_of_configs(stage, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, usual = [], good(stage)
    for key in schemas_of(STAGES[stage].Config):
        for n, value in enumerate(STRANGE):
            if not is_taken(stage, key, n):
                continue
            # Where it writes elsewhere than in this test's folder is for the output_dir tests.
            folder = tmp_path / f"{key}-{n}"
            content = {**usual, "output_dir": str(folder), key: value}
            if value in ("~", "/", "../x") and key == "output_dir":
                continue
            file = tmp_path / "config.yaml"
            file.write_text(yaml.safe_dump(content, allow_unicode=False))
            bad += check((stage, key, value), run(stage, file))
            shutil.rmtree(folder, ignore_errors=True)
    report(bad)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON file; of long lists only the first ones."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2])
    if isinstance(value, dict):
        inside = list(value.items())[:40]
    for key, one in inside:
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))
        else:
            yield (*path, key)


def with_value(content: Any, path: tuple, value: Any) -> Any:
    """A copy of the content with another value at that place."""
    if not path:
        return value
    copy = json.loads(json.dumps(content))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return copy


@pytest.mark.parametrize(("kind", "name", "stage"), FILES)
@pytest.mark.timeout(3600)
def test_values_of_files(kind, name, stage, good, made, tmp_path):
    folder, bad, usual = tmp_path / "read", [], good(stage)
    key = {"lm": "parent", "reward": "reward_model", "shards": "train_data"}[kind]
    config = {**usual, "output_dir": str(tmp_path / "out"), key: str(folder)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    if not (Path(made[kind]) / name).exists():
        pytest.skip(f"{kind} has no {name}")
    content = json.loads((Path(made[kind]) / name).read_text())
    for path in places(content):
        for n, value in enumerate(STRANGE):
            if not is_taken(kind, name, path, n):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            shutil.copytree(made[kind], folder)
            # Else the manifest would notice, and no reader would see the value.
            if name != "manifest.json":
                (folder / "manifest.json").unlink(missing_ok=True)
                if name != "stage.json":
                    (folder / "stage.json").unlink(missing_ok=True)
            (folder / name).write_text(json.dumps(with_value(content, path, value)))
            bad += check((kind, name, path, value), run(stage, tmp_path / "config.yaml"))
    report(bad)
