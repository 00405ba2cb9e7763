"""A config class on the command line: `--key value`, --help with every key, --version; and back
from values to words."""

import argparse
import difflib
import inspect
import json
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass

from common.config.fields import describe, from_text, from_words, kinds_of, schemas_of
from common.program.entry import program_name
from common.program.errors import InputError
from common.program.version import version_line

CLI = "command line"  # the place that an error names for a value from there


class _ShowVersion(argparse.Action):
    """--version, which asks git for the commit only when it is given."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Print the version and exit with 0."""
        print(version_line())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse as all our programs use it: no abbreviations, the description as it is written,
    --version, and errors that are an InputError."""

    def __init__(self, **more: Any) -> None:
        """`more` goes to argparse; `prog` is by default the words that started this program."""
        super().__init__(
            prog=more.pop("prog", None) or program_name(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )
        self.add_argument(
            "--version",
            nargs=0,
            action=_ShowVersion,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="show the program's version and the commit, and exit",
        )

    def error(self, message: str):
        """Raise InputError, where argparse would print the usage and exit."""
        raise InputError(f"{CLI}: {message}; see --help")


def parse(cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """Return {key: value} of what the command line gives, "config" (a path) among them.

    Prints help and exits with 0 on --help. Raises InputError for a key that `cls` does not have.
    """
    schemas = schemas_of(cls)
    known, unknown = _parser_of(cls, schemas).parse_known_args(argv)
    for word in unknown:
        key = word.partition("=")[0].removeprefix("--")
        if not word.startswith("--"):
            raise InputError(f"{CLI}: unexpected {word}; options are written --key value")
        raise InputError(f"{CLI}: unknown key --{key}; {did_you_mean(key, list(schemas))}")
    values = vars(known)
    for key, given in values.items():
        if isinstance(given, list):
            values[key] = from_words(given, schemas[key])
        elif key != "config":
            values[key] = from_text(given, schemas[key])
    return values


def _parser_of(cls: type, schemas: Mapping[str, Any]) -> Parser:
    """A parser with one group of keys for each class: its own first, then the inherited ones."""
    parser = Parser(
        description=sys.modules[cls.__module__].__doc__ or cls.__doc__,
        usage="%(prog)s [--config FILE] [--key value ...]",
        argument_default=argparse.SUPPRESS,
    )
    about = "YAML file of keys; the command line wins over it"
    parser.add_argument("--config", metavar="FILE", help=about)
    seen = {"config"}
    assert is_pydantic_dataclass(cls)  # as stage_config makes them
    for owner in cls.__mro__[:-1]:
        title = (owner.__doc__ or owner.__name__).strip().split("\n")[0].rstrip(".")
        group = parser.add_argument_group(title)
        for key in inspect.get_annotations(owner):
            if key in schemas and key not in seen:
                seen.add(key)
                _add_key(group, key, schemas[key], cls.__pydantic_fields__[key])
    return parser


def _add_key(group: Any, key: str, schema: Mapping[str, Any], field: Any) -> None:
    """Add --key, and --no_key for a switch that is on by default."""
    kinds = kinds_of(schema)
    value = field.get_default(call_default_factory=True)
    default = "REQUIRED" if field.is_required() else f"default {json.dumps(value)}"
    about = f"({describe(schema)}; {default}) {schema['description']}".replace("%", "%%")
    more: dict[str, Any] = {}
    if "array" in kinds:
        more = {"nargs": "*"}
    elif "boolean" in kinds:  # `--key` alone means true
        more = {"nargs": "?", "const": "true"}
    group.add_argument(f"--{key}", metavar="X", help=about, **more)
    if "boolean" in kinds and field.default is True:
        off = {"action": "store_const", "const": "false", "help": f"--{key} false"}
        group.add_argument(f"--no_{key}", dest=key, **off)


def did_you_mean(key: str, known: Sequence[str], what: str = "keys") -> str:
    """The hint that ends a message about an unknown key: the nearest known one, or all of them.

    `what` they are called."""
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"the {what} are {', '.join(known)}"


def cli_args(values: Mapping[str, Any]) -> list[str]:
    """The words that `parse` reads back as `values`.

    {"seed": 3, "parent": None, "files": ["a", "b"]} -> ["--seed", "3", "--parent", "null",
    "--files", "a", "b"]. Raises InputError for what no command line can express: a list with
    an item that starts with `-`, a NUL, half a surrogate pair, a text of 128 KB.
    """
    args = []
    for key, value in values.items():
        items = value if isinstance(value, list | tuple) else [value]
        words = [item if isinstance(item, str) else json.dumps(item) for item in items]
        if not all(map(_is_word, words)):
            raise InputError(f"{key}: a command line cannot hold {reprlib.repr(value)}")
        if not any(word.startswith("-") for word in words):
            args += [f"--{key}", *words]
        elif len(words) == 1:  # only `--key=-text` says that the dash belongs to the value
            args.append(f"--{key}={words[0]}")
        else:
            refused = f"no item of a list can start with `-`: {' '.join(words)}"
            raise InputError(f"{key}: on a command line {refused}")
    return args


def _is_word(text: str) -> bool:
    """Whether the system can hand `text` to a program: it holds no NUL and no half a surrogate
    pair, and has less than Linux' MAX_ARG_STRLEN bytes."""
    try:
        return b"\0" not in os.fsencode(text) and len(os.fsencode(text)) < 2**17
    except UnicodeEncodeError:
        return False
