"""What the keys of a config class allow: in words for --help and for errors, and as a value read
from a word of the command line.

All of it is taken from the JSON schema that pydantic makes of the class.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pydantic
import yaml

from common.config.strict_yaml import Loader

Schema = Mapping[str, Any]  # the JSON schema of one key

TYPES = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "true | false",
    "object": "mapping",
}
BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "minItems": "length >=",
}
PATH, ROWS = "path", "rows"  # `format` of a string that names what is read
LONGEST_SCALAR = 100  # characters; a longer word is no number, and int() refuses very long digits


def schemas_of(cls: type) -> dict[str, dict[str, Any]]:
    """Return {key: its JSON schema}.

    `description` is the docstring under the field, of the nearest class that has one.
    """
    whole = pydantic.TypeAdapter(cls).json_schema()
    schemas, classes = whole["properties"], whole.get("$defs", {})
    for key, schema in schemas.items():
        if "anyOf" in schema:  # a class of ours is a mapping, of which pydantic gives the name only
            schema["anyOf"] = [
                classes.get(kind.get("$ref", "").removeprefix("#/$defs/"), kind)
                for kind in schema["anyOf"]
            ]
        owners = (getattr(owner, "__pydantic_fields__", {}).get(key) for owner in cls.__mro__)
        described = (field.description for field in owners if field and field.description)
        schema["description"] = next(described, "")
    return schemas


def kinds_of(schema: Schema) -> dict[str, dict[str, Any]]:
    """The alternatives of a key by JSON type: `float | None` -> {"number": ..., "null": ...}."""
    return {kind.get("type", "any"): kind for kind in schema.get("anyOf", [schema])}


def describe(schema: Schema) -> str:
    """What a key allows: `float > 0 | null`, `no | bf16 | fp16`, `list of str`."""
    return " | ".join(_describe_kind(name, kind) for name, kind in kinds_of(schema).items())


def _describe_kind(name: str, kind: Schema) -> str:
    """One alternative with its bounds."""
    if name == "array":
        text = f"list of {describe(kind['items'])}"
    elif "properties" in kind:
        text = f"mapping of {', '.join(kind['properties'])}"
    else:
        text = " | ".join(map(str, choices(kind))) or TYPES.get(name, name)
    bounds = [f"{sign} {kind[bound]}" for bound, sign in BOUNDS.items() if bound in kind]
    return " ".join([text, *bounds])


def choices(kind: Schema) -> list[Any]:
    """The values of a Literal; empty for other types."""
    return kind.get("enum") or ([kind["const"]] if "const" in kind else [])


class Input(NamedTuple):
    """What a config names to be read."""

    key: str
    path: str  # a file, a folder or a Hub id
    is_rows: bool  # of a folder all files are read


def inputs_of(cfg: Any) -> Iterator[Input]:
    """The values of all keys of the types InputPath and RowsPath, those in lists too."""
    for key, schema in schemas_of(type(cfg)).items():
        kinds = (kind.get("items", kind) for kind in kinds_of(schema).values())
        formats = {kind["format"] for kind in kinds if kind.get("format") in (PATH, ROWS)}
        value = getattr(cfg, key)
        for path in value if isinstance(value, list) else [value]:
            if formats and path is not None:
                yield Input(key, path, ROWS in formats)


def from_text(text: str, schema: Schema) -> Any:
    """A word of the command line as YAML reads it in a file, but kept as it is for a key that takes
    a str.

    The result may still be wrong for the key: pydantic refuses it later.
    """
    kinds = kinds_of(schema)
    for kind in kinds.values():
        for choice in choices(kind):
            if text == str(choice):
                return choice
    if "null" in kinds and text.lower() in ("null", "none"):
        return None
    if "string" in kinds or len(text) > LONGEST_SCALAR:
        return text
    loader = Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def from_words(words: list[str], schema: Schema) -> list[Any] | None:
    """The words after a key that takes a list; a single `null` is None where the key allows it."""
    kinds = kinds_of(schema)
    if "null" in kinds and [word.lower() for word in words] in (["null"], ["none"]):
        return None
    return [from_text(word, kinds["array"]["items"]) for word in words]
