"""One way to read a YAML file, strictly: what is not a plain mapping of plain values is refused in
one line that names the place."""

import re
import reprlib
from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.program.errors import InputError
from common.program.files import refuse_irregular


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: `no` is a word, 1e-4 a number, 010 ten; aliases and
    tags are refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # replaces SafeLoader's YAML 1.1 table

    def compose_node(self, parent, index):
        """Refuse an alias, which could make a small file expand without end, and a tag, which could
        make what is no plain value: a date, bytes, an object."""
        event = self.peek_event()
        refused = "aliases are" if isinstance(event, yaml.AliasEvent) else ""
        if tag := getattr(event, "tag", None):
            refused = f"the tag {tag} of {reprlib.repr(getattr(event, 'value', '...'))} is"
        if refused:
            raise yaml.composer.ComposerError(
                problem=f"{refused} not supported", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


_DIGITS = "[0-9](?:_?[0-9])*"  # as int() takes them
for _name, _pattern, _make in (
    ("null", r"null|Null|NULL|~|", lambda text: None),
    ("bool", r"(?i:true|false)", lambda text: text.lower() == "true"),
    ("int", rf"[-+]?{_DIGITS}", int),
    ("float", rf"[-+]?(\.[0-9]+|{_DIGITS}(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
):
    _tag = f"tag:yaml.org,2002:{_name}"
    Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
    Loader.add_constructor(
        _tag, lambda loader, node, make=_make: make(loader.construct_scalar(node))
    )


def _note_lines(node: yaml.Node, path: Path, prefix: str, lines: dict[str, str]) -> None:
    """Note "file:line" of every dotted key in `lines`; refuse a key that occurs twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, here = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
            if key.tag.rpartition(":")[2] in ("null", "bool", "int", "float"):
                key.tag = "tag:yaml.org,2002:str"  # a key is its own text: 1, ~, true
            if name in lines:
                first = lines[name]
                raise InputError(f"{here}: duplicate key `{name}` (first at {first}); keep one")
            lines[name] = here
            _note_lines(value, path, f"{name}.", lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, path, f"{prefix}{i}.", lines)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (the mapping in the file, "file:line" of each dotted key).

    Raises InputError unless the file holds one plain mapping: no duplicate keys, no tags that build
    objects, no aliases.
    """
    path = Path(path)
    if not path.is_dir():
        refuse_irregular(path)
    try:
        values, lines = _read_mapping(path)
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else "?"
        raise InputError(f"{path}:{line}: {error.problem} (not valid in a config)") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"{path}: not a YAML text: {told}") from None
    return {str(key): value for key, value in values.items()}, {"": str(path), **lines}


def _read_mapping(path: Path) -> tuple[dict, dict[str, str]]:
    """As read_yaml, with the errors of yaml and of the file system as they are."""
    loader = Loader(path.read_text(encoding="utf-8-sig"))
    node = loader.get_single_node()
    if not isinstance(node, yaml.MappingNode | None):
        place = f"{path}:{node.start_mark.line + 1}"
        raise InputError(f"{place}: expected lines of `key: value`, found a {node.id}")
    lines: dict[str, str] = {}
    _note_lines(node, path, "", lines)
    return (loader.construct_document(node) if node else {}), lines


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read as strictly as `read_yaml` does."""
    return read_yaml(path)[0]
