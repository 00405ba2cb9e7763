"""python -m tools: every tool in one line, without torch; and how programs are named."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.program.errors import InputError
from tools import __main__ as listing

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str, folder: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_tool_is_listed_in_one_line(capsys):
    found = listing.tools()
    assert list(found) == ["chain", "compare", "curves", "overoptimise", "plan"]
    listing.main([])
    lines = capsys.readouterr().out.splitlines()
    for name, text in found.items():
        assert f"  tools.{name:<14}{text}" in lines and text.endswith(".")
    assert max(map(len, lines)) <= 120


def test_a_word_that_is_no_option():
    with pytest.raises(InputError, match=r"there is no tool plna; did you mean `plan`\?"):
        listing.main(["plna"])
    with pytest.raises(InputError, match=r"type python -m tools\.plan to run it"):
        listing.main(["plan", "configs/demo"])


def test_the_list_does_not_wait_for_torch():
    code = (
        "import sys; from tools import __main__ as t; t.main([]); assert 'torch' not in sys.modules"
    )
    assert "tools.compare" in python("-c", code)


@pytest.mark.parametrize("words", [["-m", "tools"], ["pipeline.py", "--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error(words, unbuffered):
    started = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert started.stdout and started.stderr
    started.stdout.close()
    with started.stderr as said:
        assert said.read() == b""
    assert started.wait() in (0, 141)


def test_a_terminal_that_lacks_a_character():
    code = "from common.program.entry import guard; guard(lambda: print('caf\u00e9 \u00b7'))"
    words = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "caf\\xe9 \\xb7\n"


@pytest.mark.parametrize("words", [["-m", "tools"], ["pipeline.py"]])
def test_version(words):
    assert re.match(r"state-of-gpt \d+\.\d+\.\d+", python(*words, "--version"))


@pytest.mark.heavy
@pytest.mark.parametrize("words", [["-m", "stages.sft.train"], ["stages/sft/train.py"]])
def test_a_stage_runs_as_a_module_and_as_a_file(words):
    assert python(*words, "--help").startswith(f"usage: python {' '.join(words)} [--config FILE]")
