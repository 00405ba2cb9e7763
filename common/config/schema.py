"""Strict configs: a frozen dataclass, a YAML file, a command line; a mistake is one line that names
key, value, place.

    @stage_config
    class Config(TrainConfig):
        '''Supervised finetuning.'''

        learning_rate: Annotated[float, Field(gt=0)] = 1e-3
        '''Peak learning rate.'''

    if __name__ == "__main__":
        cli(Config, main)            # python -m stages.sft.train --config sft.yaml --learning_rate 1e-4

A key's value: default in the class < YAML file < command line. The docstring under a field is its
--help text. Fields are int, float, bool, str, Literal, list of these, each `| None`, with
pydantic's constraints; dict in a file only.
"""

import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
import yaml

from common.config.strict_yaml import Loader, read_yaml
from common.program.allocator import keep_freed_memory
from common.program.entry import guard
from common.program.errors import InputError

T = TypeVar("T")
CLI = "command line"


def check_output_dir(path: str) -> str:
    if not path or not path.isprintable():
        raise ValueError("a directory's name is wanted")
    if ".." in Path(path).parts:
        raise ValueError("a path through `..` may lead where nobody looks for it; write it without")
    try:
        files = [
            str(folder)
            for folder in (Path(path), *Path(path).parents)
            if folder.exists() and not folder.is_dir()
        ]
    except OSError as error:  # a name too long, say
        raise ValueError(str(error.strerror)) from None
    if files:
        raise ValueError(f"{files[0]} is a file; name a directory")
    return path


OutputDir = Annotated[str, pydantic.AfterValidator(check_output_dir)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
def stage_config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass; subclasses, decorated alike, inherit
    fields and help."""
    rules = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
        "validate_default": True,
    }
    for name in inspect.get_annotations(cls):
        value = vars(cls).get(name)
        if isinstance(value, list):  # dataclasses refuse `= []`; every config gets its own copy
            setattr(cls, name, dataclasses.field(default_factory=value.copy))
        elif name not in vars(cls) and hasattr(
            cls, name
        ):  # `parent: str` alone drops the inherited default: required
            setattr(cls, name, pydantic.Field())
    return pydantic.dataclasses.dataclass(
        cls, frozen=True, kw_only=True, config=pydantic.ConfigDict(**rules)
    )


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars (for stage.json)."""
    return dataclasses.asdict(cfg)


def fingerprint(obj: Any) -> str:
    """sha256 (hex) of the canonical JSON of `obj`: key order and formatting do not matter, values
    do."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def _schemas(cls: type) -> dict[str, dict[str, Any]]:
    """JSON schema of each field; `description` is the docstring of the nearest class that has
    one."""
    schemas = pydantic.TypeAdapter(cls).json_schema()["properties"]
    for key, schema in schemas.items():
        owners = (getattr(owner, "__pydantic_fields__", {}).get(key) for owner in cls.__mro__)
        schema["description"] = next(
            (field.description for field in owners if field and field.description), ""
        )
    return schemas


def _kinds(schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The alternatives of a field by JSON type: `float | None` -> {"number": ..., "null": ...}."""
    return {kind.get("type", "any"): kind for kind in schema.get("anyOf", [schema])}


def _describe(schema: Mapping[str, Any]) -> str:
    """What a field allows: `float > 0 | null`, `no | bf16 | fp16`, `list of str`."""
    names = {
        "integer": "int",
        "number": "float",
        "string": "str",
        "boolean": "true | false",
        "object": "mapping",
    }
    signs = {
        "exclusiveMinimum": ">",
        "minimum": ">=",
        "exclusiveMaximum": "<",
        "maximum": "<=",
        "minItems": "length >=",
    }
    words = []
    for name, kind in _kinds(schema).items():
        text = " | ".join(map(str, _choices(kind))) or names.get(name, name)
        text = f"list of {_describe(kind['items'])}" if name == "array" else text
        words.append(
            " ".join(
                [text, *(f"{sign} {kind[bound]}" for bound, sign in signs.items() if bound in kind)]
            )
        )
    return " | ".join(words)


def _choices(kind: Mapping[str, Any]) -> list[Any]:
    return kind.get("enum") or ([kind["const"]] if "const" in kind else [])


def _from_text(text: str, schema: Mapping[str, Any]) -> Any:
    """A word of the command line as YAML would read it there, but kept as it is for a field that
    takes a str."""
    kinds = _kinds(schema)
    chosen = [choice for kind in kinds.values() for choice in _choices(kind) if text == str(choice)]
    if chosen:
        return chosen[0]
    if "null" in kinds and text.lower() in ("null", "none"):
        return None
    if "string" in kinds or len(text) > 100:
        return text
    loader = Loader("")
    return loader.construct_object(
        yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    )


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors."""

    def error(self, message: str):
        raise InputError(f"{CLI}: {message}; see --help")


def _parse(cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """{key: value} of what the command line gives, "config" (a path) among them. Prints help and
    exits 0 on --help."""
    schemas, fields, seen = _schemas(cls), cls.__pydantic_fields__, {"config"}
    about = sys.modules[cls.__module__].__doc__ or cls.__doc__
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        description=about,
        usage="%(prog)s [--config FILE] [--key value ...]",
        formatter_class=raw,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of keys; the command line wins over it"
    )
    for owner in cls.__mro__[:-1]:  # own keys first, then the shared ones
        group = parser.add_argument_group(
            (owner.__doc__ or owner.__name__).strip().split("\n")[0].rstrip(".")
        )
        for key in [
            key for key in inspect.get_annotations(owner) if key in schemas and key not in seen
        ]:
            seen.add(key)
            default = fields[key].get_default(call_default_factory=True)
            default = "REQUIRED" if fields[key].is_required() else f"default {json.dumps(default)}"
            about = f"({_describe(schemas[key])}; {default}) {schemas[key]['description']}"
            kinds = _kinds(schemas[key])
            nargs = "*" if "array" in kinds else "?" if "boolean" in kinds else None
            const = "true" if nargs == "?" else None
            group.add_argument(
                f"--{key}", metavar="X", nargs=nargs, const=const, help=about.replace("%", "%%")
            )
            if "boolean" in kinds and fields[key].default is True:
                group.add_argument(
                    f"--no_{key}",
                    dest=key,
                    action="store_const",
                    const="false",
                    help=f"--{key} false",
                )
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        key = word.partition("=")[0].removeprefix("--")
        if not word.startswith("--"):
            raise InputError(f"{CLI}: unexpected {word}; options are written --key value")
        raise InputError(f"{CLI}: unknown key --{key}; {did_you_mean(key, list(schemas))}")
    values = vars(known)
    for key, text in values.items():
        if isinstance(text, list):
            null = "null" in _kinds(schemas[key]) and [word.lower() for word in text] in (
                ["null"],
                ["none"],
            )
            values[key] = (
                None
                if null
                else [_from_text(word, _kinds(schemas[key])["array"]["items"]) for word in text]
            )
        elif key != "config":
            values[key] = _from_text(text, schemas[key])
    return values


def did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"the keys are {', '.join(known)}"


def cli_args(overrides: Mapping[str, Any]) -> list[str]:
    """{"seed": 3, "parent": None, "files": ["a", "b"]} -> ["--seed", "3", "--parent", "null",
    "--files", "a", "b"]."""
    args = []
    for key, value in overrides.items():
        items = value if isinstance(value, list | tuple) else [value]
        words = [item if isinstance(item, str) else json.dumps(item) for item in items]
        if any(
            word.startswith("-") for word in words
        ):  # only `--key=-text` says that the dash belongs to the value
            if len(words) > 1:
                raise InputError(
                    f"{key}: on a command line no item of a list can start with `-`: {' '.join(words)}"
                )
            args.append(f"--{key}={words[0]}")
        else:
            args += [f"--{key}", *words]
    return args


def _build(cls: type[T], values: Mapping[str, Any], where: Mapping[str, str]) -> T:
    """cls(**values), every refusal as one InputError line; `where` tells the place ("file:line") of
    each dotted key."""
    fields, schemas = cls.__pydantic_fields__, _schemas(cls)
    for key, value in values.items():
        if key not in fields:
            raise InputError(
                f"{where[key]}: unknown key `{key}`; {did_you_mean(key, list(fields))}"
            )
        kinds = _kinds(schemas[key])
        if (
            isinstance(value, bool)
            and {"integer", "number"} & kinds.keys()
            and "boolean" not in kinds
        ):
            # pydantic alone would take true for 1
            raise InputError(
                f"{where[key]}: {key} = {value} is refused; allowed: {_describe(schemas[key])}"
            )
    try:
        return cls(**values)
    except pydantic.ValidationError as failure:
        first, *others = failure.errors(include_url=False)
    loc = [str(part) for part in first["loc"]]
    key, message = ".".join(loc), first["msg"].removeprefix("Value error, ")
    place = next(where[k] for n in range(len(loc), -1, -1) if (k := ".".join(loc[:n])) in where)
    if first["type"] == "missing":
        message = f"`{key}` is required" + (
            f": set it in the file or with --{key}" if len(loc) == 1 else ""
        )
    elif first["type"] == "unexpected_keyword_argument":
        message = f"unknown key `{key}`"
    elif loc:  # otherwise a check over several keys (__post_init__), whose message names them
        value = first["input"]
        plain = isinstance(value, str) and value.isprintable() and 0 < len(value) < 200
        shown = value if plain else reprlib.repr(value)
        message = f"{key} = {shown} is refused: {message}"
        message += f"; allowed: {_describe(schemas[key])}" if key in schemas else ""
    raise InputError(f"{place}: {message}" + (f" (and {len(others)} more)" if others else ""))


def load(cls: type[T], argv: Sequence[str]) -> T:
    """`--config file.yaml` then `--key value` (the command line wins). Prints help and exits 0 on
    --help."""
    given = _parse(cls, argv)
    path = given.pop("config", None)
    values, where = read_yaml(path) if path else ({}, {"": CLI})
    return _build(cls, values | given, where | dict.fromkeys(given, CLI))


def cli(
    cls: type[T],
    main: Callable[[T], Any],
    argv: Sequence[str] | None = None,
    words: str | None = None,
) -> None:
    """Run main(config from the command line) as a program. `words`: the key that takes what stands
    before the first option."""

    def program() -> None:
        keep_freed_memory()
        given = list(sys.argv[1:] if argv is None else argv)
        named = [f"--{words}"] if words and given and not given[0].startswith("-") else []
        main(load(cls, [*named, *given]))

    guard(program)
