"""Strict configs: a frozen dataclass, a YAML file, a command line; a mistake is one line that names
key, value and place.

    @stage_config
    class Config(TrainConfig):
        '''Supervised finetuning.'''

        learning_rate: Annotated[float, Field(gt=0)] = 1e-3
        '''Peak learning rate.'''

    if __name__ == "__main__":
        cli(Config, main)

The command line is then `--config sft.yaml --learning_rate 1e-4`.

A key's value: default in the class < YAML file < command line. The docstring under a field is its
--help text. Fields are int, float, bool, str, Literal, list of these, each `| None`, with
pydantic's constraints; dict in a file only.
"""

import dataclasses
import hashlib
import inspect
import json
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic

from common.config.command_line import CLI, did_you_mean, parse
from common.config.fields import PATH, ROWS, describe, kinds_of, schemas_of
from common.config.strict_yaml import read_yaml
from common.program.allocator import keep_freed_memory
from common.program.entry import guard
from common.program.errors import InputError
from common.program.lock import held

T = TypeVar("T")


def check_output_dir(path: str) -> str:
    """Return `path`; raise ValueError unless a stage can write a directory of that name."""
    if not path or not path.isprintable():
        raise ValueError("a directory's name is wanted")
    if ".." in Path(path).parts:
        raise ValueError("a path through `..` may lead where nobody looks for it; write it without")
    refuse_tilde(path)
    try:
        for folder in (Path(path), *Path(path).parents):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file; name a directory")
    except OSError as error:  # a name too long, say
        raise ValueError(str(error.strerror)) from None
    return path


def check_input_path(path: str) -> str:
    """Return `path`; raise ValueError for a name that nothing can have."""
    if not path or "\0" in path:
        raise ValueError("a file, a folder or a Hub id is wanted")
    refuse_tilde(path)
    return path


def refuse_tilde(path: str) -> None:
    """Raise ValueError for a path that a shell would have expanded: here it would mean a folder of
    the name `~`."""
    if path.startswith("~"):
        raise ValueError("`~` is not expanded here; write the path in full")


OutputDir = Annotated[str, pydantic.AfterValidator(check_output_dir)]
# What is read. `common.handoff.ownership` sees to it that nothing of it is overwritten.
InputPath = Annotated[
    str,
    pydantic.AfterValidator(check_input_path),
    pydantic.WithJsonSchema({"type": "string", "format": PATH}),
]
RowsPath = Annotated[  # as common.rows.sources reads them
    str,
    pydantic.AfterValidator(check_input_path),
    pydantic.WithJsonSchema({"type": "string", "format": ROWS}),
]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
def stage_config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass; subclasses, decorated alike, inherit
    fields and help."""
    config = pydantic.ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )
    for name in inspect.get_annotations(cls):
        own = name in vars(cls)
        value = vars(cls).get(name)
        if isinstance(value, list):  # dataclasses refuse `= []`; every config gets its own copy
            setattr(cls, name, dataclasses.field(default_factory=value.copy))
        elif not own and hasattr(cls, name):  # `parent: str` alone: the inherited default goes
            setattr(cls, name, pydantic.Field())
    make = pydantic.dataclasses.dataclass  # its stub forgets which class it was given
    return make(cls, frozen=True, kw_only=True, config=config)  # type: ignore[return-value]


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars (for stage.json)."""
    return dataclasses.asdict(cfg)


def fingerprint(obj: Any) -> str:
    """sha256 (hex) of the canonical JSON of `obj`: key order and formatting do not matter, values
    do."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def build(cls: type[T], values: Mapping[str, Any], where: Mapping[str, str]) -> T:
    """Return cls(**values), with every refusal as one InputError line.

    `where` tells the place ("file:line") of each dotted key; "" is the place of the whole.
    """
    schemas = schemas_of(cls)
    for key, value in values.items():
        if key not in schemas:
            hint = did_you_mean(key, list(schemas))
            raise InputError(f"{where[key]}: unknown key `{key}`; {hint}")
        kinds = kinds_of(schemas[key])
        number = {"integer", "number"} & kinds.keys() and "boolean" not in kinds
        if isinstance(value, bool) and number:  # pydantic alone would take true for 1
            allowed = describe(schemas[key])
            raise InputError(f"{where[key]}: {key} = {value} is refused; allowed: {allowed}")
    try:
        return cls(**values)
    except pydantic.ValidationError as failure:
        first, *others = failure.errors(include_url=False)
    more = f" (and {len(others)} more)" if others else ""
    raise InputError(f"{_place(first, where)}: {_reason(first, schemas)}{more}")


def _place(error: Mapping[str, Any], where: Mapping[str, str]) -> str:
    """The place of the key that pydantic refused, or of the nearest one around it."""
    parts = [str(part) for part in error["loc"]]
    around = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
    return next(where[key] for key in around if key in where)


def _reason(error: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """What pydantic refused, in our words."""
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        fix = f": set it in the file or with --{key}" if len(error["loc"]) == 1 else ""
        return f"`{key}` is required{fix}"
    if error["type"] == "unexpected_keyword_argument":
        kinds = kinds_of(schemas[str(error["loc"][0])])
        known = list(kinds.get("object", {}).get("properties", ()))
        hint = f"; {did_you_mean(str(error['loc'][-1]), known)}" if known else ""
        return f"unknown key `{key}`{hint}"
    if not key:  # a check over several keys (__post_init__), whose message names them
        return message
    value = error["input"]
    plain = isinstance(value, str) and value.isprintable() and 0 < len(value) < 200
    shown = value if plain else reprlib.repr(value)
    allowed = f"; allowed: {describe(schemas[key])}" if key in schemas else ""
    return f"{key} = {shown} is refused: {message}{allowed}"


def load(cls: type[T], argv: Sequence[str]) -> T:
    """Read `--config file.yaml`, then `--key value`, which wins. Prints help and exits with 0 on
    --help; raises InputError for every mistake."""
    given = parse(cls, argv)
    path = given.pop("config", None)
    values, where = read_yaml(path) if path else ({}, {"": CLI})
    return build(cls, values | given, where | dict.fromkeys(given, CLI))


def cli(
    cls: type[T],
    main: Callable[[T], Any],
    argv: Sequence[str] | None = None,
    words: str | None = None,
) -> None:
    """Run main(config from the command line) as a program, as `guard` does; it alone writes to the
    config's output_dir.

    `words` is the key that takes what stands before the first option.
    """

    def program() -> None:
        """Read the command line, then run."""
        keep_freed_memory()
        given = list(sys.argv[1:] if argv is None else argv)
        named = [f"--{words}"] if words and given and not given[0].startswith("-") else []
        cfg = load(cls, [*named, *given])
        with held(getattr(cfg, "output_dir", None)):
            main(cfg)

    guard(program)
