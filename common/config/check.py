"""Builds the configs of a recipe's steps as their programs will, and runs none of them: so that a
mistake in the last step shows before the first runs.

`python -m common.config.check` is what the pipeline starts, as it imports no stage itself: one
process, so that torch is imported once. It reads a JSON list of `Asked` and writes a JSON object:
`configs`, {step: its whole config}, or `refused`, the line of the first mistake.
"""

import contextlib
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypedDict

from common.config.command_line import cli_args, parse
from common.config.fields import schemas_of
from common.config.schema import build, to_dict
from common.config.strict_yaml import read_yaml
from common.program.entry import guard
from common.program.errors import InputError
from common.rows.sources import FORMATS, PACKED


class Asked(TypedDict):
    """One step, whose module has a `Config`."""

    step: str
    """Its name."""
    module: str
    """The program, as `python -m` has it."""
    file: str
    """Its YAML file."""
    given: dict[str, Any]
    """Keys that win over the file's."""
    places: dict[str, str]
    """{key: where it was given}, for messages."""
    made: list[str]
    """Folders that earlier steps fill: what lies there need not be there yet."""


def config_of(module: str) -> type | None:
    """The Config of what `python -m module` runs. Raises InputError where that has a bug."""
    try:
        found = import_module(module)
        if hasattr(found, "__path__"):
            found = import_module(f"{module}.__main__")
    except Exception as error:  # whatever the code of a recipe's author raises
        raise InputError(f"{module}: cannot run: {type(error).__name__}: {error}") from None
    return getattr(found, "Config", None)


def check(asked: Asked) -> dict[str, Any] | None:
    """The whole config of a step; None where its program has no Config. Raises InputError for the
    first key that the program would refuse, and for a file of rows that is not there."""
    cls = config_of(asked["module"])
    if cls is None:
        return None
    values, where = read_yaml(asked["file"])
    where |= asked["places"]
    known = {key: value for key, value in asked["given"].items() if key in schemas_of(cls)}
    config = to_dict(build(cls, values | asked["given"] | parse(cls, cli_args(known)), where))
    for key, value in config.items():
        for name in value if isinstance(value, list) else [value]:
            if is_missing(name, asked["made"]):
                raise InputError(f"{where.get(key, where[''])}: {key} = {name}: no such file")
    return config


def is_missing(name: Any, made: list[str]) -> bool:
    """Whether a value is the name of a file of rows, which is not there and which no step makes."""
    if not isinstance(name, str) or not name.endswith((*FORMATS, *PACKED)) or " " in name:
        return False
    there = os.path.exists(name)  # noqa: PTH110 -- Path's raises for a name that is too long
    return not there and not any(Path(name).is_relative_to(folder) for folder in made)


def answer(steps: list[Asked]) -> dict[str, Any]:
    """What is written: the configs, or the first mistake."""
    configs = {}
    for asked in steps:
        try:
            configs[asked["step"]] = check(asked)
        except InputError as error:
            return {"refused": f"{error} (step {asked['step']})"}
    return {"configs": configs}


def main() -> None:
    """Answer on stdout."""
    with contextlib.redirect_stdout(sys.stderr):  # whatever a module prints when it is imported
        said = answer(json.load(sys.stdin))
    print(json.dumps(said))


if __name__ == "__main__":
    guard(main)
