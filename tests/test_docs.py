"""README and docs name what exists: links, modules, files, recipes, make targets.

Nothing is run: this takes a second.
"""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data").glob("*/README.md")),
]
OURS = ("stages", "tools", "common", "data", "benchmarks", "tests")
MADE = ("runs/",)  # what only a run makes
# What an exercise or an example tells the reader to make.
TO_BE_MADE = (
    "data/calculator",
    "configs/calculator",
    "stages/dpo/",
    "stages/rl/algorithms/reinforce.py",
)


def links(text: str) -> list[str]:
    """Targets of the page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def without_blocks(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def without_code(text: str) -> str:
    """The text without any code."""
    return re.sub(r"`[^`]*`", "", without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors that code hosts make of the headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


def commands(text: str) -> list[str]:
    """What a reader may type: lines of code blocks, and code within a line or over two of them."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    inside = re.findall(r"`([^`]+)`", without_blocks(text))
    indented = re.findall(r"^    (\S.*)$", text, re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in inside] + indented
    starts = r"(\w+=\S+ )?(python|make|accelerate launch|head|tail) "
    return [line.strip() for line in lines if re.match(starts, line.strip())]


def words_of(command: str) -> list[str]:
    """The command's words, without settings of the environment and without a comment.

    Of `python -c "...` only the start is on its line.
    """
    if ' -c "' in command:
        return ["python", "-c"]
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def faults(command: str) -> list[str]:
    """What the command names that does not exist."""
    words = words_of(command)
    if words[0] == "make":
        return [f"target {word}" for word in words[1:] if "=" not in word and not target(word)]
    found = []
    if "-m" in words[:-1]:
        module = words[words.index("-m") + 1]
        if module.split(".")[0] in OURS and not exists(module):
            found.append(f"module {module}")
    elif words[0] == "python" and words[1][0] != "-" and not (ROOT / words[1]).is_file():
        found.append(f"file {words[1]}")
    if "pipeline.py" in words:
        recipe = words[words.index("pipeline.py") + 1]
        if not (ROOT / recipe / "pipeline.yaml").is_file():
            found.append(f"recipe {recipe}")
        found += [f"step {step} of {recipe}" for step in steps(words) if not step_of(recipe, step)]
    found += [f"path {word}" for word in words[1:] if is_path(word) and not path_exists(word)]
    return found


def target(name: str) -> bool:
    """Whether the Makefile has such a target."""
    return bool(re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), re.M))


def exists(module: str) -> bool:
    """Whether the module is there, and for a package whether it can be run."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return False
    if spec is None:
        return False
    return not spec.submodule_search_locations or find_spec(f"{module}.__main__") is not None


def steps(words: list[str]) -> list[str]:
    """The steps whose keys, or start or end, are named: --sft.learning_rate=1e-3, --to sft."""
    named = [word[2:].split(".")[0] for word in words if re.match(r"--\w+\.\w+", word)]
    ends = [words[i + 1] for i, word in enumerate(words) if word in ("--from", "--to")]
    return named + ends


def step_of(recipe: str, step: str) -> bool:
    """Whether the recipe has the step."""
    text = (ROOT / recipe / "pipeline.yaml").read_text()
    return bool(re.search(rf"^  {re.escape(step)}:", text, re.M))


def is_path(word: str) -> bool:
    """Whether the word means something of the repository, or what a recipe makes."""
    return word.startswith((*(f"{name}/" for name in (*OURS, "configs", "docs")), *MADE))


def path_exists(word: str) -> bool:
    """Whether it is there. What a run makes is taken as given."""
    return word.startswith(MADE) or (ROOT / word.split("::")[0]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text, missing = page.read_text(), []
    for link in links(text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page: Path) -> None:
    found = {command: faults(command) for command in commands(page.read_text())}
    assert not {command: missing for command, missing in found.items() if missing}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Code in backticks that looks like a path of the repository, but for what a reader makes."""
    named = re.findall(r"`([\w./-]+)`", without_blocks(page.read_text()))
    paths = [name for name in named if is_path(name) and not name.startswith(TO_BE_MADE)]
    assert not [name for name in paths if not path_exists(name)]


def test_the_checks_notice() -> None:
    for bad in (
        "python -m stages.sft.trian --parent x",
        "python compare.py runs/demo",
        "python pipeline.py configs/dem",
        "python pipeline.py configs/demo --stf.learning_rate=1",
        "python pipeline.py configs/demo --to stf",
        "make dmeo",
        "accelerate launch --config_file configs/accelerate/zero9.yaml -m stages.sft.train",
        "OMP_NUM_THREADS=1 python -m tools.comprae runs/demo/sft",
    ):
        assert faults(bad), bad
        assert commands(f"```sh\n{bad}\n```") == [bad]
    assert links("[a](b.md), ![c](d.svg) and `[e](f)`") == ["b.md", "d.svg"]
    assert anchors("# A file's Name, or two\n```\n# no\n```") == {"a-files-name-or-two"}


def test_readme_is_short_and_names_no_commit() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    hashes = [word for word in re.findall(r"\b[0-9a-f]{7,40}\b", text) if re.search("[a-f]", word)]
    assert not hashes
