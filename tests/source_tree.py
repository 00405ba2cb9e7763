"""The project's source files as the tests of its architecture and of its style see them."""

import ast
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"runs", "build", "dist"}  # and hidden folders


class Import(NamedTuple):
    """One thing that a file imports."""

    module: str  # dotted; `from a import b` gives both "a" and "a.b", as b may be a module
    line: int
    inside: bool  # in a function


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def files_of(root: Path, *suffixes: str, tests: bool = False) -> dict[str, Path]:
    """All files of the project that end so, by their path from the root."""
    outside = OUTSIDE if tests else {*OUTSIDE, "tests"}
    found = []
    for folder, below, names in os.walk(root):
        top = Path(folder) == root
        # In place: os.walk does not enter what is taken out. A .venv holds 50 000 files.
        below[:] = [n for n in below if not n.startswith(".") and not (top and n in outside)]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes]
    return {file.relative_to(root).as_posix(): file for file in sorted(found)}


parse = functools.cache(ast.parse)  # many tests look at the same files


def trees_of(root: Path, tests: bool = False) -> dict[str, ast.Module]:
    """The syntax tree of every Python file, by its path from the root."""
    files = files_of(root, ".py", tests=tests)
    return {name: parse(path.read_text(encoding="utf-8")) for name, path in files.items()}


def import_statements(
    tree: ast.AST, inside: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """(statement, whether it stands in a function), those for type checkers too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        else:
            in_function = is_function(node) or isinstance(node, ast.Lambda)
            yield from import_statements(node, inside or in_function)


def names_in(statement: ast.Import | ast.ImportFrom) -> list[tuple[str, str]]:
    """(module, dotted name in it) of each thing that is imported; the name is "" for `import a`."""
    if isinstance(statement, ast.Import):
        return [(alias.name, "") for alias in statement.names]
    base = "." * statement.level + (statement.module or "")
    return [(base, f"{base}.{alias.name}") for alias in statement.names]


def imports_of(tree: ast.AST) -> Iterator[Import]:
    """Every import of a file, as modules that may be meant."""
    for statement, inside in import_statements(tree):
        for name in dict.fromkeys(name for pair in names_in(statement) for name in pair if name):
            yield Import(name, statement.lineno, inside)


def module_of(name: str) -> str:
    """The dotted name of a file: "a/b.py" and "a/b/__init__.py" are both "a.b"."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
