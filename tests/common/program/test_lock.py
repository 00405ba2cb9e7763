"""A lock a directory: a second program is refused with one line, whoever started the first."""

import errno
import fcntl
import os
import signal

import pytest

from common.program.errors import InputError
from common.program.lock import held, refuse_held
from tests.forked import program

REFUSED = "is running there; wait for its end, or name another"


def test_one_at_a_time(tmp_path):
    with held(tmp_path / "out"):
        with pytest.raises(InputError, match=f"output_dir .*/out: another program {REFUSED}"):
            held(tmp_path / "out").__enter__()
        with pytest.raises(InputError):
            refuse_held(tmp_path / "out")
        with held(tmp_path / "other"), held(None):
            pass
    refuse_held(tmp_path / "out")
    assert not (tmp_path / "out").exists()  # made for the lock, and nothing came
    with held(tmp_path / "out"):
        (tmp_path / "out" / "file").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]


def test_a_holder_that_is_killed_leaves_nothing_locked(tmp_path):
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        with held(tmp_path):
            os.write(told, b"x")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(InputError):
        refuse_held(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with held(tmp_path):
        pass


def test_the_first_of_several_processes_holds_it(tmp_path, monkeypatch):
    with held(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path):
            pass
        with pytest.raises(InputError):
            refuse_held(tmp_path)


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path), held(tmp_path):
        pass


def test_a_folder_that_cannot_be(tmp_path):
    with (
        pytest.raises(InputError, match="output_dir /proc/x: No such file or directory"),
        held("/proc/x"),
    ):
        pass


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["data.adder.prepare", "stages.pretrain.prepare"])
def test_every_program_takes_it(module, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The fox and the bird. " * 100)
    words = [module, "--output_dir", tmp_path / "out"]
    if "pretrain" in module:
        words += ["--train_data", text, "--vocab_size", "270", "--eval_fraction", "0.2"]
    with held(tmp_path / "out"):
        ended = program(*words)
        assert ended.code == 2 and ended.err.count("\n") == 1 and REFUSED in ended.err
        assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]
    ended = program(*words)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out" / ".lock").exists()
