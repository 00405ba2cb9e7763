"""The same command again: after a pipeline was killed, and where a run is to start over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import child, result

import pipeline
from common.program.errors import InputError
from pipeline import ROOT

# Waits for a file, then publishes as a stage does; notes each time that it ran.
FAKE = """
import os, pathlib, sys, time
words = sys.argv[1:]
here, out = pathlib.Path(__file__).parent, pathlib.Path(words[words.index("--output_dir") + 1])
(here / "pid").write_text(str(os.getpid()))
with (here / "ran").open("a") as log:
    log.write(out.name + "\\n")
while not (here / "go").exists():
    time.sleep(0.01)
out.mkdir(exist_ok=True)
(out / "stage.json").write_text('{"gate": {"passed": true, "text": "learned"}}')
(out / "manifest.json").write_text("{}")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fake.py").write_text(FAKE)
    steps = {name: {"module": "fake"} for name in ("first", "second")}
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "pipeline.yaml").write_text(
        json.dumps({"output_dir": str(tmp_path / "run"), "steps": steps})
    )
    for name in steps:
        (folder / f"{name}.yaml").write_text("seed: 1\n")
    return folder


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def killed_with_its_stage_at_work(recipe: Path) -> Path:
    """-> the folder of the first step, whose stage still runs."""
    job = subprocess.Popen(
        [sys.executable, ROOT / "pipeline.py", recipe], stdout=subprocess.DEVNULL
    )
    until((recipe.parent / "ran").exists)
    job.kill()
    job.wait()
    return recipe.parent / "run" / "first"


def free(recipe: Path) -> bool:
    try:
        with pipeline.locked(recipe.parent / "run", {}):
            return True
    except InputError:
        return False


def test_a_killed_pipeline_takes_what_its_stage_finished(recipe):
    first = killed_with_its_stage_at_work(recipe)
    with pytest.raises(
        InputError, match="another pipeline, or a stage that it left, is running there"
    ):
        pipeline.main([str(recipe)])
    (first / "state").mkdir()  # as a stage that was killed right after it published leaves it
    (recipe.parent / "go").touch()
    until((first / "manifest.json").exists)
    until(lambda: free(recipe))  # with the stage the lock is gone
    assert pipeline.main([str(recipe)]) == 0
    assert (recipe.parent / "ran").read_text().split() == ["first", "second"]
    assert not (first / "state").exists()
    assert json.loads((first / ".pipeline.json").read_text())["gate"] == "PASS  learned"
    assert pipeline.main([str(recipe)]) == 0
    assert pipeline.main([str(recipe), "--force"]) == 0
    assert (recipe.parent / "ran").read_text().split() == ["first", "second"] * 2


def test_a_directory_of_an_earlier_config_is_not_taken_for_it(recipe):
    (recipe.parent / "go").touch()
    assert pipeline.main([str(recipe)]) == 0
    (recipe / "first.yaml").write_text("seed: 2\n")
    (recipe.parent / "go").unlink()
    (recipe.parent / "ran").unlink()
    first = killed_with_its_stage_at_work(recipe)
    os.kill(int((recipe.parent / "pid").read_text()), signal.SIGKILL)  # before it published
    until(lambda: free(recipe))
    assert (first / "manifest.json").exists()
    (recipe.parent / "go").touch()
    assert pipeline.main([str(recipe)]) == 0
    assert (recipe.parent / "ran").read_text().split() == ["first", "first"]


def test_a_note_is_written_at_once_or_not_at_all(recipe, monkeypatch):
    """Half a note would make a finished step run again."""
    (recipe.parent / "go").touch()
    assert pipeline.main([str(recipe)]) == 0
    note = recipe.parent / "run" / "first" / ".pipeline.json"
    before = note.read_bytes()

    def cut_short(file: int) -> None:
        os.ftruncate(file, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cut_short)
    with pytest.raises(KeyboardInterrupt):
        pipeline.main([str(recipe), "--force"])
    assert note.read_bytes() == before


def test_no_resume(setting, tmp_path):
    """Starts over in an empty folder, in which the pipeline may have left its note; refuses one
    with a state."""
    out = tmp_path / "out"
    keys = setting("sft", output_dir=str(out), resume=False)
    out.mkdir()
    (out / ".pipeline.json").write_text("{}")
    assert child("sft", keys).code == 0
    whole, before = (
        result(out),
        {path: path.read_bytes() for path in out.rglob("*") if path.is_file()},
    )
    ended = child("sft", keys)
    assert ended.code == 2 and ended.err.startswith(f"error: resume false: {out} is not empty"), (
        ended.err
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert (
        child("sft", keys | {"resume": True}).code == 0
    )  # a finished run has no state: this trains again
    assert result(out) == whole
