"""Signals while a program imports its libraries, which takes seconds: one line, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).resolve().parents[3]
STAGE = "interrupted: not begun; the same command starts it\n"
TORCH = """
import os, pathlib, signal
os.kill(os.getpid(), signal.{kind})
for _ in range(10**5):
    pass
os._exit(7)
"""


def start(module: str, kind: str, folder: Path, **more) -> subprocess.CompletedProcess:
    """The module's program, which gets the signal while it imports what it takes for torch."""
    (folder / "torch.py").write_text(TORCH.format(kind=kind))
    env = {**os.environ, "PYTHONPATH": str(folder), **more.pop("env", {})}
    words = [sys.executable, "-m", module]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, **more)


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("module", ["stages.sft.train", "stages.reward.collect"])
def test_a_stage_says_that_nothing_has_begun(module, kind, tmp_path):
    done = start(module, kind, tmp_path, env={"EXIT_CODE_FILE": str(tmp_path / "code")})
    assert (done.returncode, done.stderr) == (75, STAGE)
    assert (tmp_path / "code").read_text() == "75"


def test_a_tool_ends_without_a_traceback(tmp_path):
    done = start("tools.compare", "SIGINT", tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("module", ["stages.sft.train", "tools.compare"])
@pytest.mark.parametrize("kind", ["SIGINT", "SIGHUP"])
def test_what_is_ignored_stays_ignored(kind, module, tmp_path):
    """As under nohup, or in a script's `command &`."""

    def ignore() -> None:
        signal.signal(getattr(signal, kind), signal.SIG_IGN)

    assert start(module, kind, tmp_path, preexec_fn=ignore).returncode == 7


def test_a_rank_ends_when_its_launcher_is_gone(tmp_path):
    """Its launcher is the shell, which is gone at once."""
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "RANK": "1", "WORLD_SIZE": "2"}
    script = '"$0" -m stages.sft.train & read -r _ < <(sleep 1); kill -9 $$'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stderr == f"process 1 of 2: {STAGE}"
