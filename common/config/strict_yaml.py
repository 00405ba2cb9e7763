"""One way to read a YAML file, strictly, and the error for what a user got wrong. Import both from
common.config.schema."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from common.program.errors import InputError


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: `no` is a word, 1e-4 a number, 010 ten; aliases are
    refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # replaces SafeLoader's YAML 1.1 table

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                problem="aliases are not supported", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


for _name, _pattern, _make in (
    ("null", r"null|Null|NULL|~|", lambda text: None),
    ("bool", r"(?i:true|false)", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9][0-9_]*", int),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
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
            if name in lines:
                raise InputError(
                    f"{here}: duplicate key `{name}` (first at {lines[name]}); keep one"
                )
            lines[name] = here
            _note_lines(value, path, f"{name}.", lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, path, f"{prefix}{i}.", lines)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """-> (the mapping in the file, "file:line" of each dotted key). Raises InputError for all but
    one plain mapping."""
    path, lines = Path(path), {}
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode | None):
            raise InputError(
                f"{path}:{node.start_mark.line + 1}: expected lines of `key: value`, found a {node.id}"
            )
        _note_lines(node, path, "", lines)
        values = loader.construct_document(node) if node else {}
    except OSError as error:
        raise InputError(f"config file {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(
            f"{path}:{mark.line + 1 if mark else '?'}: {error.problem} (not valid in a config)"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a YAML text: {error}") from None
    return {str(key): value for key, value in values.items()}, {"": str(path), **lines}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read strictly: no duplicate keys, no tags that build objects, no
    aliases."""
    return read_yaml(path)[0]
