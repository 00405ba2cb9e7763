"""Ratchets: how long a function or a line may be, and what must be documented."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tests.source_tree import ROOT, files_of, is_function, trees_of

LINES, PARAMETERS, COLUMNS = 60, 8, 100
# Whose columns of words or numbers a reader compares line by line.
TABLES = {
    "common/model/presets.py",
    "data/demo/documents.py",
    "data/demo/gold.py",
    "data/demo/phrases.py",
    "data/demo/words.py",
    "data/demo/world.py",
}
ROOMS = {"common", "data", "stages", "tools"}  # benchmarks and docs hold programs
DIRECTIVES = {"fmt: skip", "fmt: off"}


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file: methods and functions in functions too."""
    return [node for node in ast.walk(tree) if is_function(node)]


def length(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end."""
    return function.end_lineno - function.lineno + 1


def parameters(function: ast.FunctionDef) -> int:
    """Everything that a caller can give; self and cls are not given by a caller."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    stars = [one for one in (given.vararg, given.kwarg) if one]
    return len(names) + len(stars) - (names[:1] in (["self"], ["cls"]))


def long_functions(root: Path) -> list[str]:
    return [
        f"{name}:{function.lineno}: {function.name} has {length(function)} lines"
        for name, tree in trees_of(root).items()
        for function in functions_of(tree)
        if length(function) > LINES
    ]


def wide_functions(root: Path) -> list[str]:
    return [
        f"{name}:{function.lineno}: {function.name} has {parameters(function)} parameters"
        for name, tree in trees_of(root).items()
        for function in functions_of(tree)
        if parameters(function) > PARAMETERS
    ]


def long_lines(root: Path) -> list[str]:
    """Of Python and of C, tests too."""
    found = []
    for name, file in files_of(root, ".py", ".c", ".h", tests=True).items():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS:
                found.append(f"{name}:{number}: {len(line)} columns")
    return found


def kept_from_the_formatter(root: Path) -> set[str]:
    """Files in which a comment keeps ruff from formatting lines."""
    found = set()
    for name, file in files_of(root, ".py", tests=True).items():
        for token in tokenize.generate_tokens(io.StringIO(file.read_text("utf-8")).readline):
            if token.type == tokenize.COMMENT and token.string.lstrip("# ") in DIRECTIVES:
                found.add(name)
    return found


def undocumented(root: Path) -> list[str]:
    """Modules, public classes, public functions and public methods without a docstring."""
    found = []

    def look(nodes: list[ast.stmt], name: str, above: str) -> None:
        for node in nodes:
            defines = is_function(node) or isinstance(node, ast.ClassDef)
            if not defines or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(f"{name}:{node.lineno}: {above}{node.name}")
            if isinstance(node, ast.ClassDef):
                look(node.body, name, f"{node.name}.")

    for name, tree in trees_of(root).items():
        if not ast.get_docstring(tree):
            found.append(f"{name}: the module")
        look(tree.body, name, "")
    return found


def unnamed_rooms(root: Path) -> list[str]:
    """Folders with code whose __init__.py does not begin with one line that says what they hold."""
    trees = {name: tree for name, tree in trees_of(root).items() if name.split("/")[0] in ROOMS}
    folders = {parent for name in trees for parent in Path(name).parents if parent.parts}
    found = []
    for folder in sorted(folders):
        tree = trees.get(f"{folder.as_posix()}/__init__.py")
        line = ((tree and ast.get_docstring(tree)) or "").split("\n")[0]
        if not line.endswith("."):
            found.append(folder.as_posix())
    return found


def test_functions_are_short():
    assert long_functions(ROOT) == []


def test_functions_take_few_parameters():
    assert wide_functions(ROOT) == []


def test_lines_fit_beside_each_other():
    assert long_lines(ROOT) == []


def test_only_tables_are_kept_from_the_formatter():
    assert kept_from_the_formatter(ROOT) <= TABLES


def test_all_that_is_public_is_documented():
    assert undocumented(ROOT) == []


def test_every_room_says_what_it_holds():
    assert unnamed_rooms(ROOT) == []


def test_what_is_exempt_is_there():
    assert all((ROOT / name).is_file() for name in TABLES)


# The checkers, on a file that breaks each rule and on one that does not.

BODY = "    x = 1\n"
CASES = [
    (long_functions, "def f():\n" + BODY * 60, "def f():\n" + BODY * 59),
    (
        long_functions,
        "class C:\n    def f(self):\n" + ("    " + BODY) * 60,
        "@d(\n    1,\n)\ndef f():\n" + BODY * 59,
    ),
    (
        wide_functions,
        "def f(a, b, c, /, d, e, f, *, g, h, i): 0",
        "def f(a, b, c, d, e, f, g, *h): 0",
    ),
    (
        wide_functions,
        "def f(a, b, c, d, e, f, g, *h, **i): 0",
        "def f(self, a, b, c, d, e, f, g, h): 0",
    ),
    (wide_functions, "def f():\n    def g(a, b, c, d, e, f, g, h, i): 0", "x = 1"),
    (long_lines, "#" * 101, "é" * 100),
    (kept_from_the_formatter, "x = 1  # fmt: skip", 'x = "# fmt: skip"'),
    (kept_from_the_formatter, "# fmt: off\nx = 1", "x = 1  # the fmt: skip of others"),
    (undocumented, "x = 1", '"""Doc."""\nx = 1'),
    (undocumented, '"""Doc."""\ndef f(): 0', '"""Doc."""\ndef _f(): 0'),
    (undocumented, '"""Doc."""\nclass C:\n    x = 1', '"""Doc."""\nclass C:\n    """Doc."""'),
    (
        undocumented,
        '"""Doc."""\nclass C:\n    """Doc."""\n    def f(self): 0',
        '"""Doc."""\nclass C:\n    """Doc."""\n    def __len__(self): 0',
    ),
]


@pytest.mark.parametrize(("check", "bad", "good"), CASES)
def test_the_checkers_see_a_broken_rule(tmp_path, check, bad, good):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(good)
    assert not check(tmp_path)
    (tmp_path / "room" / "a.py").write_text(bad)
    assert len(check(tmp_path)) == 1


def test_the_checker_of_rooms(tmp_path):
    for name, text in {
        "common/__init__.py": '"""What all share."""',
        "common/b/c.py": "",
        "data/__init__.py": "",
        "docs/picture.py": "",
        "tools/__init__.py": '"""Algorithms.\n\nHow one is added.\n"""\nimport os',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert unnamed_rooms(tmp_path) == ["common/b", "data"]


def test_the_tests_themselves_are_only_held_to_the_width(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def f():\n" + BODY * 60 + "#" * 101)
    assert not long_functions(tmp_path)
    assert not undocumented(tmp_path)
    assert len(long_lines(tmp_path)) == 1
