"""The tools: programs that look at runs and recipes.

python -m tools.compare --help
"""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from common.config.command_line import CLI, Parser, did_you_mean
from common.program.entry import guard
from common.program.errors import InputError

HERE = Path(__file__).resolve().parent
MAIN = 'if __name__ == "__main__":'  # what makes a module a program


def tools() -> dict[str, str]:
    """{name: what it is for, in one line} of all tools, in alphabetical order.

    Both are read from the source, so that nothing waits for torch.
    """
    packages = {
        file.parent.name: file.with_name("__init__.py") for file in HERE.glob("*/__main__.py")
    }
    modules = {file.stem: file for file in HERE.glob("[a-z]*.py") if MAIN in file.read_text()}
    found = packages | modules
    return {name: purpose(found[name]) for name in sorted(found)}


def purpose(file: Path) -> str:
    """The first paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def main(argv: Sequence[str]) -> None:
    """List the tools. Raises InputError for a word that is no option of this program."""
    found = tools()
    lines = [f"  tools.{name:<14}{text}" for name, text in found.items()]
    parser = Parser(
        usage="python -m tools.NAME [options]",
        description=__doc__,
        epilog="tools:\n" + "\n".join(lines),
    )
    _, words = parser.parse_known_args(argv)
    if words and words[0] in found:
        raise InputError(f"{CLI}: type python -m tools.{words[0]} to run it")
    if words:
        hint = did_you_mean(words[0], [*found], "tools")
        raise InputError(f"{CLI}: there is no tool {words[0]}; {hint}")
    parser.print_help()


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
