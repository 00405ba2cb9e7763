"""What a config accepts, and that every refusal is one line that names key, value and place."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from common.config.command_line import cli_args
from common.config.overrides import check_overrides, split_overrides
from common.config.schema import cli, fingerprint, load, stage_config, to_dict
from common.config.strict_yaml import load_yaml
from common.program.entry import guard
from common.program.errors import InputError


@stage_config
class Shared:
    """Keys of every stage."""

    output_dir: str
    """Where the result goes."""
    max_steps: Annotated[int, Field(gt=0)] = 100
    """Updates of the optimizer."""
    parent: str | None = None
    """Directory to start from."""


@stage_config
class Config(Shared):
    """A stage."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate (100% of the schedule)."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic."""
    files: list[str] = []
    """Texts."""
    compile: bool = False
    """Compile the model."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm."""
    depths: list[int] | None = None
    """Layers."""

    def __post_init__(self) -> None:
        if self.max_steps > 1000 and self.compile:
            raise ValueError("max_steps above 1000 with compile is not supported")


def from_yaml(tmp_path: Path, text: str | bytes, *words: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(Config, ["--config", str(file), *words])


def test_defaults_then_file_then_command_line(tmp_path):
    cfg = from_yaml(
        tmp_path,
        "output_dir: a\nmax_steps: 7\nlearning_rate: 1e-4\n",
        "--max_steps",
        "9",
        "--parent",
        "p",
    )
    expected = {
        "output_dir": "a",
        "max_steps": 9,
        "parent": "p",
        "learning_rate": 0.0001,
        "mixed_precision": "no",
        "files": [],
        "compile": False,
        "clip": 1.0,
        "depths": None,
    }
    assert to_dict(cfg) == expected and type(cfg.learning_rate) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.max_steps = 3
    assert cfg.files is not from_yaml(tmp_path, "output_dir: a").files


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # YAML 1.1 reads it as text
        ("learning_rate: 1_0.5", "learning_rate", 10.5),
        ('max_steps: "3"', "max_steps", 3),
        ("max_steps: 1e2", "max_steps", 100),
        ("max_steps: 010", "max_steps", 10),  # YAML 1.1 reads it as eight
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML 1.1 reads it as false
        ("parent: 'null'", "parent", "null"),
        ("parent: null", "parent", None),
        ("parent:", "parent", None),
        ("parent: nan", "parent", "nan"),
        ("parent: 2024-01-01", "parent", "2024-01-01"),  # YAML 1.1 makes a date of it
        ("compile: True", "compile", True),
        ("clip: null", "clip", None),
        ("files: [a, b c]", "files", ["a", "b c"]),
        ("depths: [1, 2]", "depths", [1, 2]),
        ("# only a comment", "max_steps", 100),
        ("\ufeffmax_steps: 5", "max_steps", 5),
    ],
)
def test_yaml_values(tmp_path, text, key, value):
    got = getattr(from_yaml(tmp_path, text, "--output_dir", "x"), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--learning_rate=.5", "learning_rate", 0.5),
        ("--max_steps 1e2", "max_steps", 100),
        ("--max_steps 3 --max_steps 4", "max_steps", 4),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--parent none", "parent", None),
        ("--parent Null", "parent", None),
        ("--parent 12", "parent", "12"),
        ("--parent true", "parent", "true"),
        ("--parent=--odd=name", "parent", "--odd=name"),
        ("--compile true", "compile", True),
        ("--compile False", "compile", False),
        ("--clip none", "clip", None),
        ("--files", "files", []),
        ("--files a b 3", "files", ["a", "b", "3"]),
        ("--depths 1 2", "depths", [1, 2]),
        ("--depths null", "depths", None),
    ],
)
def test_command_line_values(words, key, value):
    got = getattr(load(Config, ["--output_dir", "x", *words.split()]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_steps: 1.5", ["c.yaml:2:", "max_steps = 1.5", "int > 0"]),
        ("max_steps: true", ["c.yaml:2:", "max_steps = True", "int > 0"]),
        ("max_steps: 0", ["c.yaml:2:", "max_steps = 0", "greater than 0"]),
        ("max_steps: -3", ["c.yaml:2:", "max_steps = -3", "greater than 0"]),
        ("max_steps: null", ["c.yaml:2:", "max_steps = None", "int > 0"]),
        ("learning_rate: false", ["c.yaml:2:", "learning_rate = False", "float > 0"]),
        ("learning_rate: .nan", ["c.yaml:2:", "learning_rate = .nan", "float > 0"]),
        ("learning_rate: NaN", ["c.yaml:2:", "learning_rate = NaN", "float > 0"]),
        ("learning_rate: -.inf", ["c.yaml:2:", "learning_rate = -.inf", "float > 0"]),
        ("learning_rate: inf", ["c.yaml:2:", "learning_rate = inf", "finite"]),
        ("learning_rate: 1e999", ["c.yaml:2:", "learning_rate = inf", "finite"]),
        ("clip: 0", ["c.yaml:2:", "clip = 0", "float > 0 | null"]),
        ("mixed_precision: fp16", ["c.yaml:2:", "mixed_precision = fp16", "no | bf16"]),
        ("mixed_precision: false", ["c.yaml:2:", "mixed_precision = False", "no | bf16"]),
        ("compile: maybe", ["c.yaml:2:", "compile = maybe", "true | false"]),
        ("parent: 3", ["c.yaml:2:", "parent = 3", "str | null"]),
        ("files: a.txt", ["c.yaml:2:", "files = a.txt", "list of str"]),
        ("files: [a, 1]", ["c.yaml:2:", "files.1 = 1", "valid string"]),
        ("files: {a: b}", ["c.yaml:2:", "files = {'a': 'b'}", "list of str"]),
        ("depths: [1, 2.5]", ["c.yaml:2:", "depths.1 = 2.5", "valid integer"]),
        ("max_step: 3", ["c.yaml:2:", "unknown key `max_step`", "did you mean `max_steps`?"]),
        ("lr: 3", ["c.yaml:2:", "unknown key `lr`", "learning_rate"]),
        ("\nenv:\n  A: b", ["c.yaml:3:", "unknown key `env`"]),
        ("1: a", ["c.yaml:2:", "unknown key `1`"]),
        ("[a]: b", ["c.yaml:2:", "unhashable"]),
        ("max_steps: 3\nmax_steps: 4", ["c.yaml:3:", "duplicate key `max_steps`", "c.yaml:2"]),
        ("files: {a: 1, a: 2}", ["c.yaml:2:", "duplicate key `files.a`"]),
        (
            "files: !!python/object/apply:os.system [ls]",
            ["c.yaml:2:", "python/object/apply:os.system"],
        ),
        ("files: &a [*a]", ["c.yaml:2:", "aliases"]),
        ("max_steps: !!int x", ["c.yaml", "'x'"]),
        ("files: [!!timestamp 2024-01-01]", ["c.yaml:2:", "timestamp", "'2024-01-01'"]),
        ("parent: !!binary aGk=", ["c.yaml:2:", "the tag", "binary of 'aGk=' is not supported"]),
        ("compile: !!bool maybe", ["c.yaml:2:", "bool of 'maybe'"]),
        ("max_steps: 1__", ["c.yaml:2:", "max_steps = 1__"]),
        ("files: [a", ["c.yaml:", "expected"]),
        ("max_steps: 3\n\tparent: x", ["c.yaml:", "cannot start any token"]),
        ("--- a\n--- b", ["c.yaml:", "document"]),
        ("max_steps: 2000\ncompile: true", ["c.yaml:", "max_steps above 1000 with compile"]),
        ("max_steps: 1.5\nclip: -1", ["c.yaml:2:", "max_steps = 1.5", "(and 1 more)"]),
    ],
)
def test_refused_in_a_file(tmp_path, text, parts):
    with pytest.raises(InputError) as error:
        from_yaml(tmp_path, f"output_dir: x\n{text}\n")
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"- a\n- b\n", ["c.yaml:1:", "sequence"]),
        (b"just text", ["c.yaml:1:", "scalar"]),
        (b"output_dir: \xff", ["c.yaml", "0xff"]),
        (b"output_dir: a\0b", ["c.yaml", "#x0000"]),
        (b"[" * 3000, ["c.yaml", "recursion"]),
        (b"max_steps: 3", ["c.yaml", "`output_dir` is required", "--output_dir"]),
        (b"", ["c.yaml", "`output_dir` is required"]),
    ],
)
def test_refused_files(tmp_path, content, parts):
    with pytest.raises(InputError) as error:
        from_yaml(tmp_path, content)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--max_steps 1.5", ["command line", "max_steps = 1.5", "int > 0"]),
        ("--max_steps true", ["command line", "max_steps = True", "int > 0"]),
        ("--max_steps -3", ["command line", "max_steps = -3", "greater than 0"]),
        ("--max_steps null", ["command line", "max_steps = None", "int > 0"]),
        ("--max_steps", ["command line", "--max_steps", "expected one argument"]),
        ("--max_steps 1 2", ["command line", "unexpected 2"]),
        ("--max_steps=", ["command line", "max_steps = "]),
        ("--max_steps " + "9" * 5000, ["command line", "max_steps = "]),
        ("--learning_rate nan", ["command line", "learning_rate = nan", "finite"]),
        ("--learning_rate fast", ["command line", "learning_rate = fast", "float > 0"]),
        ("--learning_rat 1", ["command line", "--learning_rat", "did you mean `learning_rate`?"]),
        ("--learning-rate 1", ["command line", "--learning-rate", "did you mean `learning_rate`?"]),
        ("--nothing=1", ["command line", "--nothing", "the keys are output_dir"]),
        ("--compile maybe", ["command line", "compile = maybe", "true | false"]),
        ("--mixed_precision fp16", ["command line", "mixed_precision = fp16", "no | bf16"]),
        ("--depths 1 x", ["command line", "depths.1 = x"]),
        ("--config nowhere.yaml", ["config file nowhere.yaml", "No such file"]),
        ("--config .", ["config file .", "directory"]),
    ],
)
def test_refused_on_the_command_line(words, parts):
    with pytest.raises(InputError) as error:
        load(Config, ["--output_dir", "x", *words.split()])
    assert all(part in str(error.value) for part in parts), str(error.value)


@stage_config
class Switches:
    """Flags."""

    compile: bool = False
    """Compile the model."""
    resume: bool = True
    """Go on from a saved state."""
    bias: bool | None = None
    """Biases; null = as the family has them."""
    steps: int = 1
    """Updates."""


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("", (False, True, None, 1)),
        ("--compile", (True, True, None, 1)),
        ("--compile --steps 3", (True, True, None, 3)),
        ("--steps 3 --compile=false --no_resume", (False, False, None, 3)),
        ("--no_resume --resume", (False, True, None, 1)),
        ("--resume false --bias", (False, False, True, 1)),
        ("--bias null", (False, True, None, 1)),
    ],
)
def test_a_bare_flag_is_true_and_no_turns_off_what_is_on(words, values):
    assert tuple(to_dict(load(Switches, words.split())).values()) == values


@pytest.mark.parametrize(
    "words", ["--no_compile", "--no_bias", "--no_steps", "--no_resume=false", "--no_resume x"]
)
def test_no_is_only_for_what_is_on(words, capsys):
    with pytest.raises(InputError, match=r"command line: .*(--no_|unexpected x)"):
        load(Switches, words.split())
    with pytest.raises(SystemExit):
        load(Switches, ["--help"])
    assert "--no_resume" in (text := capsys.readouterr().out) and "--no_compile" not in text


def test_an_annotation_alone_makes_an_inherited_key_required():
    @stage_config
    class Child(Shared):
        parent: str

    with pytest.raises(InputError, match="`parent` is required"):
        load(Child, ["--output_dir", "x"])
    assert load(Child, ["--output_dir", "x", "--parent", "p"]).parent == "p"


def test_a_wrong_default_is_refused_too():
    @stage_config
    class Wrong:
        steps: Annotated[int, Field(gt=0)] = 0

    with pytest.raises(InputError, match="steps = 0 is refused"):
        load(Wrong, [])


def test_help_has_every_key_with_type_default_and_inherited_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        load(Config, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in (
        "A stage:",
        "Keys of every stage:",
        "--config FILE",
        "--output_dir X (str; REQUIRED) Where the result goes.",
        "--max_steps X (int > 0; default 100) Updates of the optimizer.",
        "--parent X (str | null; default null) Directory to start from.",
        "--learning_rate X (float > 0; default 0.001) Peak learning rate (100% of the schedule).",
        '--mixed_precision X (no | bf16; default "no") Arithmetic.',
        "--files [X ...] (list of str; default []) Texts.",
        "--clip X (float > 0 | null; default 1.0) Largest gradient norm.",
    ):
        assert part in out


def test_cli_args_are_read_back_as_they_were():
    values = {
        "output_dir": "a b",
        "max_steps": 3,
        "parent": None,
        "learning_rate": 1e-05,
        "files": ["x", "y"],
        "compile": True,
    }
    words = cli_args(values)
    assert words[:2] == ["--output_dir", "a b"] and words[4:6] == ["--parent", "null"]
    cfg = to_dict(load(Config, words))
    assert {key: cfg[key] for key in values} == values
    assert load(Config, cli_args({"output_dir": "-odd", "files": []})).output_dir == "-odd"
    with pytest.raises(InputError, match="-y"):
        cli_args({"files": ["x", "-y"]})


def test_load_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {b: [1, no, 1e3]}\nc: ~\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": {"b": [1, "no", 1000.0]}, "c": None}


def test_fingerprint_sees_values_not_order():
    one = fingerprint({"a": 1, "b": [1, 2]})
    assert one == fingerprint({"b": [1, 2], "a": 1}) and len(one) == 64
    assert (
        len(
            {
                one,
                fingerprint({"a": 1, "b": [2, 1]}),
                fingerprint({"a": 1.5, "b": [1, 2]}),
                fingerprint({"a": 1}),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("rows.jsonl:3: bad\nrow"), 2, "error: rows.jsonl:3: bad row\n"),
        (OSError(1, "Operation not permitted"), 2, "error: [Errno 1] Operation not permitted\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, text, capsys, tmp_path, monkeypatch):
    def main(cfg):
        raise error

    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / "code"))
    with pytest.raises(SystemExit) as stop:
        cli(Config, main, ["--output_dir", "x"])
    assert stop.value.code == code and capsys.readouterr().err == text
    assert (tmp_path / "code").read_text() == str(code)


def test_a_program_that_ends_well_exits_with_zero_and_other_errors_keep_their_traceback(capsys):
    seen = []
    cli(Config, seen.append, ["--output_dir", "x"])
    assert seen[0].output_dir == "x"
    with pytest.raises(SystemExit) as stop:
        guard(lambda: 75)
    assert stop.value.code == 75
    with pytest.raises(SystemExit) as stop:
        cli(Config, lambda cfg: 1 / 0, ["--output_dir", "x"])
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert re.search(r"^error: .*ZeroDivisionError: division by zero$", told.splitlines()[-1])


def test_as_a_program(tmp_path):
    (tmp_path / "program.py").write_text(
        '"""Doc of the program."""\nfrom __future__ import annotations\n'
        "from common.config.schema import cli, stage_config\n\n\n"
        '@stage_config\nclass Config:\n    count: int = 1\n    """How many."""\n\n\n'
        'if __name__ == "__main__":\n    cli(Config, lambda cfg: print(cfg.count))\n'
    )

    def run(*words: str) -> subprocess.CompletedProcess:
        root = Path(__file__).parents[3]
        return subprocess.run(
            [sys.executable, tmp_path / "program.py", *words],
            env={"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )

    assert run("--count", "3").stdout == "3\n"
    bad = run("--count", "x")
    assert bad.returncode == 2 and bad.stderr.startswith(
        "error: command line: count = x is refused: "
    )
    assert bad.stderr.count("\n") == 1
    shown = run("--help").stdout
    assert "Doc of the program." in shown and "(int; default 1) How many." in shown
    assert shown.startswith(f"usage: python {tmp_path / 'program.py'} [--config FILE]")
    assert re.fullmatch(r"state-of-gpt \d+\.\d+\.\d+( \(commit \w+\))?\n", run("--version").stdout)


def test_keys_of_one_step():
    words = ["configs/demo", "--sft.rate=1=2", "--seed", "3", "--sft.text=a\nb", "--rl.x="]
    others, overrides = split_overrides(words)
    assert others == ["configs/demo", "--seed", "3"]
    assert overrides == {"sft": {"rate": "1=2", "text": "a\nb"}, "rl": {"x": ""}}
    check_overrides(overrides, ["sft", "rl"], "demo")
    with pytest.raises(InputError, match=r"--rl\.x=: demo has no step rl; the steps are sft"):
        check_overrides(overrides, ["sft"], "demo")
