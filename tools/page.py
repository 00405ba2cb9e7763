"""Reports as HTML pages: values in, one self-contained file out. The HTML is in tools/templates/.

A page needs nothing else: styles inside, pictures as data: URIs, no script, nothing fetched.
"""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

DOCTYPE = b"<!doctype html>"  # what each of our pages begins with
FOLD = 240  # characters: of a longer answer only the beginning is seen until someone opens it


class Link(NamedTuple):
    """A cell of a table that leads somewhere."""

    text: str
    href: str


class Table(NamedTuple):
    """A table of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]  # the first cell of each is its heading
    caption: str = ""


class Picture(NamedTuple):
    """A PNG file, perhaps with another for pages of dark background."""

    file: Path
    text: str  # what it shows
    dark: Path | None = None


class Answer(NamedTuple):
    """What a model said."""

    label: str  # stands above it; "": nothing does
    text: str
    remarks: str  # stands below it
    colour: str  # "good", "bad" or ""


class Card(NamedTuple):
    """The answers of one model to a prompt."""

    title: str
    answers: Sequence[Answer]


class Sample(NamedTuple):
    """A prompt and the models' answers to it, beside each other."""

    prompt: str
    cards: Sequence[Card]


def link(path: str, folder: Path | None) -> str | Link:
    """A link from a page in `folder` to a directory; plain text where there is no such directory.

    It is relative, so that page and directory can be moved together.
    """
    if folder is None or not Path(path).is_dir():
        return path
    return Link(path, "./" + quote(os.path.relpath(path, folder)) + "/")


def is_page(file: Path) -> bool:
    """Whether a file is an HTML page, or empty."""
    with file.open("rb") as handle:
        start = handle.read(len(DOCTYPE))
    return start.lower() in (DOCTYPE, b"")


def data_uri(file: Path) -> str:
    """The content of a PNG file as a URI that holds all of it."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def environment() -> Environment:
    """Jinja over tools/templates: every value is text and gets escaped; an unknown name is an
    error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["data_uri"] = data_uri
    found.globals["fold"] = FOLD
    return found


def render(template: str, **values: Any) -> str:
    """The page that a template of tools/templates makes of these values."""
    return environment().get_template(template).render(values)
