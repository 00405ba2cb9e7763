"""The floors of the house, checked on the syntax tree of every source file; and the checker itself
on a tree that breaks each rule.

A room imports itself or a room on a lower floor. Rooms on one floor do not know each other. The
maths imports torch alone. No project code is imported inside a function, and no files import each
other in a circle. The ground truth of the demo stays out of every stage's reach.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.source_tree import (
    ROOT,
    import_statements,
    imports_of,
    module_of,
    names_in,
    trees_of,
)

# From the ground up; rooms on one floor stand beside each other. A module belongs to the room with
# the longest name that it starts with.
FLOORS = [
    ["common"],  # the package itself, which holds nothing
    ["common.program"],
    ["common.rows", "common.text"],
    ["common.config"],
    ["common.model"],
    ["common.handoff"],
    ["common.rewards"],
    ["common.train"],
    ["stages"],  # the package itself, which holds nothing
    ["stages.pretrain", "stages.sft", "stages.reward", "stages.rl", "tools", "data"],
    ["tools.plan"],  # takes the stages' own Config
    ["benchmarks", "docs", "tests"],
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The pipeline starts programs; it does not import them.
PIPELINE_IMPORTS = {"pipeline", "common", "common.program", "common.config"}

TORCH_ALONE = ["common/model/ops.py", "stages/rl/maths.py", "stages/reward/loss.py"]
ALGORITHMS = "stages/rl/algorithms/"  # each file but the package's own, too
PLAIN = {"torch", "math", "typing", "collections", "__future__"}

GOLD = "data.demo.gold"
KNOW_GOLD = {"data/demo/labeller.py", "data/demo/prepare.py"}
# Where a config or a command line may name code: the labeller of a stage, the ground truth for
# reports, and the programs of a recipe, whose configs are checked before any of them runs.
LOAD_BY_NAME = {
    *("stages/reward/collect.py", "tools/compare/measure.py", "docs/picture.py"),
    "common/config/check.py",
}
LOADERS = {
    "import_module",
    "__import__",
    "exec",
    "eval",
    "run_module",
    "run_path",
    "spec_from_file_location",
}


def room_of(module: str) -> str | None:
    """The room of a module of the project; None if it stands in none."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in FLOOR_OF or name == "pipeline"), None)


def allowed(importer: str, module: str) -> bool:
    """Whether a file of the room `importer` may import the project's `module`."""
    target = room_of(module)
    if importer == "pipeline":
        return target in PIPELINE_IMPORTS
    if target is None or target == "pipeline":
        return importer in ("benchmarks", "docs", "tests")
    return target == importer or FLOOR_OF[target] < FLOOR_OF[importer]


def strings_of(tree: ast.AST) -> list[tuple[str, int]]:
    """String constants in the code; docstrings (strings that stand alone) are not code."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone
    )
    return [(node.value, node.lineno) for node in constants if isinstance(node.value, str)]


def loads_by_name(tree: ast.AST) -> list[int]:
    """Lines that import a module whose name is only known when they run."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        evaluates_a_model = isinstance(node.func, ast.Attribute) and name == "eval"
        if name in LOADERS and not evaluates_a_model:
            found.append(node.lineno)
    return found


def import_violations(name: str, tree: ast.Module, project: set[str]) -> Iterator[str]:
    """What file `name` imports and may not; `project` are the top names that are ours."""
    room = room_of(module_of(name))
    if room in (None, "common", "stages") and not name.endswith("__init__.py"):
        yield f"{name}: stands in no room"
        return
    algorithm = name.startswith(ALGORITHMS) and not name.endswith("__init__.py")
    for module, line, inside in imports_of(tree):
        where, top = f"{name}:{line}", module.split(".")[0]
        if module.startswith("."):
            yield f"{where}: relative import"
        if top in project and inside:
            yield f"{where}: imports {module} inside a function"
        if top in project and not allowed(room, module):
            yield f"{where}: may not import {module}"
        if (name in TORCH_ALONE or algorithm) and top not in PLAIN:
            yield f"{where}: imports {module}, but torch alone is allowed"
        if (module == GOLD or module.startswith(GOLD + ".")) and name not in KNOW_GOLD:
            yield f"{where}: imports the ground truth"


def code_violations(root: Path) -> list[str]:
    """Every broken rule of the source files below `root`, as "file:line: what is wrong"."""
    trees = trees_of(root)
    project, found = {name.split("/")[0].removesuffix(".py") for name in trees}, []
    for name, tree in trees.items():
        found += import_violations(name, tree, project)
        if not name.startswith("data/"):
            named = [(text, line) for text, line in strings_of(tree) if "data.demo" in text]
            found += [f"{name}:{line}: names {text!r}" for text, line in named]
        if name not in LOAD_BY_NAME:
            found += [f"{name}:{line}: loads code by name" for line in loads_by_name(tree)]
    return found


def config_violations(root: Path) -> list[str]:
    """Configs that name code of data/demo where no hook for it exists."""
    found = []

    def walk(value: object, key: str, name: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, str(k), name)
        elif isinstance(value, list):
            for v in value:
                walk(v, key, name)
        elif isinstance(value, str) and "data.demo" in value:
            file = Path(name)
            hook = file.name == "collect.yaml" and key in ("labeller", "contrast")
            report = key == "gold" and (file.stem == "compare" or "overoptimise" in name)
            step = file.name == "pipeline.yaml" and key == "module" and value == "data.demo.prepare"
            if not ((hook and value.startswith("data.demo.labeller:")) or report or step):
                found.append(f"{name}: {key}: {value}")

    for file in sorted((root / "configs").rglob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        walk(content, "", file.relative_to(root).as_posix())
    return found


def imported_files(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the project whose code runs before its own. The packages above a module
    run too, except those that are on their way already, as they are its own."""
    trees = trees_of(root, tests=True)
    ours = {module_of(name) for name in trees}
    edges: dict[str, set[str]] = {}
    for name, tree in trees.items():
        here = module_of(name)
        own = {here.rsplit(".", n)[0] for n in range(here.count(".") + 1)}
        named = [
            pair
            for statement, inside in import_statements(tree)
            if not inside
            for pair in names_in(statement)
        ]
        asked = {name if name in ours else module for module, name in named} & ours
        above = {m.rsplit(".", n)[0] for m in asked for n in range(1, m.count(".") + 1)}
        edges[here] = (asked | ((above & ours) - own)) - {here}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which needs all others: the strongly connected parts."""
    reach = {start: reachable(edges, start) for start in edges}
    parts = {frozenset(m for m in reach[n] if n in reach[m]) for n in edges if n in reach[n]}
    return sorted(sorted(part) for part in parts)


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """All modules that `start` needs, directly or through others."""
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += edges[module]
    return seen


def test_every_room_imports_itself_or_a_lower_floor():
    assert code_violations(ROOT) == []


def test_configs_name_the_demo_only_where_a_hook_is():
    assert config_violations(ROOT) == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(imported_files(ROOT)) == []


@pytest.mark.parametrize("name", sorted({*TORCH_ALONE, *LOAD_BY_NAME, *KNOW_GOLD, "pipeline.py"}))
def test_the_files_that_the_rules_name_are_there(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rl"])
def test_who_has_read_one_train_py_knows_four(stage):
    """Docstring with the launch line, frozen Config, main(cfg), cli; no Trainer class."""
    tree = ast.parse((ROOT / f"stages/{stage}/train.py").read_text(encoding="utf-8"))
    assert f"accelerate launch -m stages.{stage}.train --config " in ast.get_docstring(tree)
    classes = {
        node.name: [ast.unparse(d) for d in node.decorator_list]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert classes["Config"] == ["stage_config"]
    assert not any("Trainer" in name for name in classes)
    assert functions[-1] == "main"
    assert ast.unparse(tree.body[-1]).endswith("cli(Config, main)")


def test_a_program_run_as_a_file_finds_the_project_before_it_imports_it():
    """Python looks for modules in the file's own folder alone, until sys.path has the root."""
    programs = 0
    for name, tree in trees_of(ROOT).items():
        at = [node.lineno for node in tree.body if ast.unparse(node).startswith("if not __package")]
        if not at:
            continue
        programs += 1
        early = [
            f"{name}:{found.line}: {found.module}"
            for found in imports_of(tree)
            if found.line < at[0] and room_of(found.module)
        ]
        assert early == []
    assert programs >= 6


# The checker, on a tree that breaks each rule once: file, its code, what is said about it.
BROKEN = [
    (
        "common/model/ops.py",
        "import numpy",
        "common/model/ops.py:1: imports numpy, but torch alone is allowed",
    ),
    ("common/program/files.py", "import common.rows", "files.py:1: may not import common.rows"),
    ("common/rows/a.py", "from common.text import b", "a.py:1: may not import common.text.b"),
    ("common/text/a.py", "import common.rows.b", "a.py:1: may not import common.rows.b"),
    ("common/model/a.py", "import common.handoff.hf", "may not import common.handoff.hf"),
    ("common/handoff/a.py", "import common.train.run", "may not import common.train.run"),
    ("common/train/run.py", "from stages.rl import x", "run.py:1: may not import stages.rl"),
    ("common/train/run.py", "from tools import page", "run.py:1: may not import tools.page"),
    ("common/rows/a.py", "import pipeline", "a.py:1: may not import pipeline"),
    (
        "common/model/late.py",
        "def f():\n    import common.model.ops",
        "common/model/late.py:2: imports common.model.ops inside a function",
    ),
    ("common/model/near.py", "from .ops import x", "common/model/near.py:1: relative import"),
    ("common/model/eager.py", "x = __import__('a')", "eager.py:1: loads code by name"),
    ("common/loose.py", "x = 1", "common/loose.py: stands in no room"),
    ("stages/loose.py", "x = 1", "stages/loose.py: stands in no room"),
    ("loose.py", "x = 1", "loose.py: stands in no room"),
    ("stages/rl/train.py", "import stages.sft.train", "may not import stages.sft.train"),
    ("stages/rl/train.py", "from tools.compare import x", "may not import tools.compare"),
    ("stages/rl/train.py", "import data.demo.world", "may not import data.demo.world"),
    (
        "stages/rl/maths.py",
        "from common.model.ops import whiten",
        "stages/rl/maths.py:1: imports common.model.ops, but torch alone is allowed",
    ),
    (
        "stages/rl/algorithms/grpo.py",
        "from stages.rl import rollout",
        "stages/rl/algorithms/grpo.py:1: imports stages.rl, but torch alone is allowed",
    ),
    (
        "stages/reward/loss.py",
        "import torch, os",
        "stages/reward/loss.py:1: imports os, but torch alone is allowed",
    ),
    (
        "stages/reward/collect.py",
        "def f():\n    from data.demo import gold",
        "stages/reward/collect.py:2: imports the ground truth",
    ),
    ("stages/sft/train.py", "GOLD = 'data.demo.gold'", "train.py:1: names 'data.demo.gold'"),
    ("tools/curves.py", "import stages.rl.train", "curves.py:1: may not import stages.rl.train"),
    ("tools/compare/a.py", "import tools.plan", "a.py:1: may not import tools.plan"),
    ("data/demo/world.py", "from data.demo.gold import judge", "world.py:1: imports the ground"),
    ("data/other/prepare.py", "import stages.sft.train", "may not import stages.sft.train"),
    ("data/other/prepare.py", "from tools import page", "may not import tools.page"),
    ("pipeline.py", "from common.rows.shards import pad", "may not import common.rows.shards"),
    ("pipeline.py", "import stages.sft.train", "pipeline.py:1: may not import stages.sft.train"),
]
HOUSE = ["common/rows/b.py", "stages/rl/a.py", "data/demo/a.py", "tools/a.py", "pipeline.py"]


def house(root: Path, code: dict[str, str]) -> None:
    """Files with this code, and one file in every part of the house."""
    for file in [*HOUSE, *code]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        text = '"""Docstrings may name data.demo.gold."""\n'
        (root / file).write_text(code.get(file, text))


@pytest.mark.parametrize(
    ("name", "code", "expected"), BROKEN, ids=[f"{name}-{code}" for name, code, _ in BROKEN]
)
def test_the_checker_sees_a_broken_rule(tmp_path, name, code, expected):
    house(tmp_path, {name: code})
    assert any(expected in said for said in code_violations(tmp_path))


GOOD = {
    "common/model/a.py": "from common.program.files import x\nimport common.config.schema",
    "common/handoff/hf.py": "def f():\n    from safetensors.torch import x\n    model.eval()",
    "stages/rl/train.py": "import common.model.ops\nfrom stages.rl import algorithms, rollout",
    "stages/rl/algorithms/__init__.py": "from stages.rl.algorithms import ppo",
    "stages/rl/algorithms/ppo.py": "import math\nfrom typing import NamedTuple\nimport torch.nn",
    "data/demo/labeller.py": "from data.demo import flaws, gold",
    "tools/plan/recipe.py": "from stages.rl import train\nfrom tools import page",
    "tools/compare/a.py": "from tools import page\nfrom common.train import run",
    "pipeline.py": "import os\nfrom common.config.schema import load\nimport common.program.entry",
    "benchmarks/a.py": "import stages.rl.train, pipeline, tools.page",
    "tests/test_x.py": "import stages.rl.train, data.demo.gold",
}


def test_the_checker_lets_good_code_pass(tmp_path):
    house(tmp_path, GOOD)
    assert code_violations(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ({"a/b.py": "import a.c", "a/c.py": "from a.b import x"}, [["a.b", "a.c"]]),
        ({"a/b.py": "import a.c", "a/c.py": "def f():\n    import a.b"}, []),
        ({"a/b.py": "from a import c", "a/c.py": "if T:\n    from a import b"}, [["a.b", "a.c"]]),
        ({"a.py": "import b", "b.py": "import c", "c.py": "import a"}, [["a", "b", "c"]]),
        ({"a/__init__.py": "from a import b", "a/b.py": "import os"}, []),
        ({"a/__init__.py": "from a import b", "a/b.py": "from a import x"}, [["a", "a.b"]]),
        # Who imports a module of a package runs the package first.
        ({"a/__init__.py": "import b", "a/c.py": "", "b.py": "import a.c"}, [["a", "b"]]),
        ({"a/b.py": "import a.b.c", "a/d.py": "from a import b"}, []),
    ],
)
def test_the_checker_sees_a_circle(tmp_path, code, found):
    for name, text in code.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(imported_files(tmp_path)) == found


@pytest.mark.parametrize(
    ("name", "text", "good"),
    [
        (
            "demo/collect.yaml",
            "labeller: data.demo.labeller:rank\ncontrast: data.demo.labeller:contrast",
            True,
        ),
        ("demo/collect.yaml", "labeller: data.demo.gold:judge", False),
        ("demo/compare.yaml", "gold: data.demo.gold", True),
        ("demo-overoptimise/report.yaml", "gold: data.demo.gold", True),
        ("demo/pipeline.yaml", "steps:\n  - {name: data, module: data.demo.prepare}", True),
        ("demo/pipeline.yaml", "steps:\n  - {name: data, module: data.demo.gold}", False),
        ("demo/rl.yaml", "train_data: runs/demo/data/rl_prompts.jsonl", True),
        ("demo/rl.yaml", "reward: [data.demo.gold]", False),
        ("demo/reward.yaml", "labeller: data.demo.labeller:rank", False),
    ],
)
def test_the_checker_of_configs(tmp_path, name, text, good):
    (tmp_path / "configs" / name).parent.mkdir(parents=True)
    (tmp_path / "configs" / name).write_text(text)
    assert (config_violations(tmp_path) == []) == good
