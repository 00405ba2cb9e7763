"""Output that cannot fail the work: a reader that has gone, a full disk, a closed file, an encoding
that lacks a character; and control characters of data, names and warnings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.handoff.report import Gate
from common.train.log import Log
from tests.forked import forked

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys, pathlib, warnings
from common.program.entry import guard
def main():
    for _ in range(3000):
        print("caf\\u00e9 \\u2192 \\U0001f98a", flush=True)
        print("caf\\u00e9 \\u2192 \\U0001f98a", file=sys.stderr)
        sys.stderr.isatty()
    warnings.warn("a warning")
    with pathlib.Path(sys.argv[1]).open("w") as file:
        file.write("done")
guard(main)
"""
PLACES = {
    "closed stdout": ">&-",
    "closed stderr": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "full disk": ">/dev/full",
    "full disk for all": ">/dev/full 2>&1",
    "reader gone": "| true",
    "reader of all gone": "2>&1 | true",
    "latin-1": ">/dev/null",
    "C": ">/dev/null",
}
LANGUAGE = {"latin-1": {"PYTHONIOENCODING": "latin-1"}, "C": {"LC_ALL": "C", "PYTHONUTF8": "0"}}


@pytest.mark.parametrize("place", PLACES)
def test_the_work_is_done(place, tmp_path):
    script = f'"$0" -c "$1" "$2" {PLACES[place]}; echo "${{PIPESTATUS[0]}}" > "$2.code"'
    words = ["bash", "-c", script, sys.executable, PROGRAM, str(tmp_path / "file")]
    env = {**os.environ, **LANGUAGE.get(place, {})}
    done = subprocess.run(
        words, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", errors="replace"
    )
    assert (tmp_path / "file.code").read_text() == "0\n", done.stderr
    assert (tmp_path / "file").read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    lost = "stdout: [Errno 28] No space left on device; what follows is not shown\n"
    assert done.stderr.count(lost) == (place == "full disk")


def test_a_result_that_does_not_arrive_is_a_failure():
    code = "from common.program.entry import guard; from common.program.terminal import print_json"
    code += "; guard(lambda: print_json({'a': 1}))"
    words = ["bash", "-c", '"$0" -c "$1" > /dev/full', sys.executable, code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("No space left on device; the result is cut short")


def test_control_characters_stay_in_the_program(tmp_path):
    wild = "a\x1b[31m\x9b\u202e\r\x07 é"
    tame = "a\\x1b[31m\\x9b\\u202e\\r\\x07 é"

    def work() -> None:
        import warnings

        from common.program.entry import guard
        from common.program.terminal import print_json

        def main() -> None:
            Log("sft", tmp_path, True).say(wild)
            print(Gate(True, wild).line("sft"))
            print_json({"a": wild})
            warnings.resetwarnings()
            warnings.showwarning = print_warning
            warnings.warn(wild, stacklevel=1)
            raise KeyError(wild)

        def print_warning(message, kind, file, line, *_):
            sys.stderr.write(warnings.formatwarning(message, kind, file, line))

        guard(main)

    ended = forked(work)
    assert ended.out.startswith(f"{tame}\ngate sft: PASS  {tame}\n")
    assert json.loads(ended.out.split("\n", 2)[2]) == {"a": wild}
    assert ended.out.count("\x1b") == ended.err.count("\x1b") == 0
    assert f"UserWarning: {tame}" in ended.err and "KeyError" in ended.err
    assert (ended.out + ended.err).replace("\n", "").isprintable()
