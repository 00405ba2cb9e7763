"""The rules of imports, checked on the syntax tree of every source file; and the checker itself on
a tree that breaks each.

stages -> common, never back, never stage -> other stage; the maths imports torch alone; pipeline.py
imports common.config.schema alone; no project code is imported inside a function; the ground truth
stays out of every stage's reach.
"""

import ast
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"tests", "runs", "build", "dist"}  # and hidden folders
TORCH_ALONE = {"common/ops.py", "stages/rl/ppo.py", "stages/reward/loss.py"}
PLAIN = {"torch", "math", "typing", "collections", "__future__"}
GOLD = "data.demo.gold"
KNOW_GOLD = {"data/demo/labeller.py", "data/demo/prepare.py"}
LOAD_BY_NAME = {
    "stages/reward/collect.py",
    "common/measure.py",
}  # the labeller, and compare's ground truth, from configs
SOFT_LIMIT, HARD_LIMIT = 300, 320


class Import(NamedTuple):
    module: str  # dotted; for `from a import b` both "a" and "a.b", as b may be a module
    line: int
    inside: bool  # in a function


def sources(root: Path) -> dict[str, Path]:
    """All Python files that are the project, by path from the root."""
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    kept = (
        file
        for file in files
        if file.parts[0] not in SKIPPED and not any(part.startswith(".") for part in file.parts)
    )
    return {file.as_posix(): root / file for file in sorted(kept)}


def imports_of(tree: ast.AST, inside: bool = False) -> list[Import]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [Import(base, node.lineno, inside)]
            found += [Import(f"{base}.{alias.name}", node.lineno, inside) for alias in node.names]
        else:
            found += imports_of(
                node,
                inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
            )
    return found


def strings_of(tree: ast.AST) -> list[tuple[str, int]]:
    """String constants in the code; docstrings (strings that stand alone) are not code."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone
    )
    return [(node.value, node.lineno) for node in constants if isinstance(node.value, str)]


def loads_by_name(tree: ast.AST) -> list[int]:
    """Lines that import a module whose name is only known when they run."""
    names = {
        "import_module",
        "__import__",
        "exec",
        "eval",
        "run_module",
        "run_path",
        "spec_from_file_location",
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in names
        # model.eval() is PyTorch's
        and not (isinstance(node.func, ast.Attribute) and node.func.attr == "eval")
    ]


def allowed(importer: str, module: str) -> bool:
    """Whether project file `importer` may import the project's `module`."""
    room, target = importer.split("/")[0], module.split(".")[0]
    if importer == "pipeline.py":
        return (
            module == "common.config.schema"
            or module.startswith("common.config.schema.")
            or module == "common"
        )
    if room == "common":
        return target == "common"
    if room == "stages":
        own = ".".join(importer.split("/")[:2])
        # tools.compare.measure loads the ground truth for compare
        return (
            (target == "common" and not module.startswith("tools.compare.measure"))
            or module == own
            or module.startswith(own + ".")
        )
    if room == "data":
        return target == "common" or module.startswith("data.")
    return (
        room in ("benchmarks", target) or target == "common"
    )  # compare.py and its like stand on common alone


def code_violations(root: Path) -> list[str]:
    found = []
    files = sources(root)
    project = {name.split("/")[0].removesuffix(".py") for name in files}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, line, inside in imports_of(tree):
            where, top = f"{name}:{line}", module.split(".")[0]
            if module.startswith("."):
                found.append(f"{where}: relative import")
            if top in project and inside:
                found.append(f"{where}: imports {module} inside a function")
            if top in project and not allowed(name, module):
                found.append(f"{where}: may not import {module}")
            if name in TORCH_ALONE and top not in PLAIN:
                found.append(f"{where}: imports {module}, but torch alone is allowed")
            if (module == GOLD or module.startswith(GOLD + ".")) and name not in KNOW_GOLD:
                found.append(f"{where}: imports the ground truth")
        if not name.startswith("data/"):
            found += [
                f"{name}:{line}: names {text!r}"
                for text, line in strings_of(tree)
                if "data.demo" in text
            ]
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
        walk(
            yaml.safe_load(file.read_text(encoding="utf-8")), "", file.relative_to(root).as_posix()
        )
    return found


def test_import_rules():
    assert code_violations(ROOT) == []


def test_configs_name_the_demo_only_where_a_hook_is():
    assert config_violations(ROOT) == []


def test_every_room_was_looked_at():
    names = sources(ROOT)
    for name in [
        *TORCH_ALONE,
        *LOAD_BY_NAME,
        *KNOW_GOLD,
        "pipeline.py",
        "compare.py",
        "plan.py",
        "common/model.py",
    ]:
        assert name in names, name


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
    assert classes["Config"] == ["stage_config"] and not any("Trainer" in name for name in classes)
    assert functions[-1] == "main" and ast.unparse(tree.body[-1]).endswith("cli(Config, main)")


def test_files_are_short():
    """More than 300 lines is a warning, more than 320 a failure."""
    lengths = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in sources(ROOT).items()
    }
    for name, lines in lengths.items():
        if lines > SOFT_LIMIT:
            warnings.warn(f"{name} has {lines} lines, the soft limit is {SOFT_LIMIT}", stacklevel=1)
    assert {name: lines for name, lines in lengths.items() if lines > HARD_LIMIT} == {}


# The checker, on a tree that breaks each rule once

BROKEN = {
    "common/ops.py": ("import numpy", "common/ops.py:1: imports numpy, but torch alone is allowed"),
    "common/run.py": ("from stages.rl import ppo", "common/run.py:1: may not import stages.rl"),
    "common/late.py": (
        "def f():\n    import common.model.ops",
        "common/late.py:2: imports common.model.ops inside a function",
    ),
    "common/near.py": ("from .ops import x", "common/near.py:1: relative import"),
    "common/eager.py": (
        "x = __import__('common.model.ops')",
        "common/eager.py:1: loads code by name",
    ),
    "stages/rl/train.py": (
        "import stages.sft.train",
        "stages/rl/train.py:1: may not import stages.sft.train",
    ),
    "stages/rl/ppo.py": (
        "from common.model.ops import whiten",
        "stages/rl/ppo.py:1: imports common.model.ops, but torch alone is allowed",
    ),
    "stages/rl/cheat.py": (
        "from common import measure",
        "stages/rl/cheat.py:1: may not import tools.compare.measure",
    ),
    "stages/reward/loss.py": (
        "import torch, os",
        "stages/reward/loss.py:1: imports os, but torch alone is allowed",
    ),
    "stages/reward/collect.py": (
        "def f():\n    from data.demo import gold",
        "stages/reward/collect.py:2: may not import data.demo",
    ),
    "stages/sft/train.py": (
        "GOLD = 'data.demo.gold'",
        "stages/sft/train.py:1: names 'data.demo.gold'",
    ),
    "data/demo/world.py": (
        "from data.demo.gold import judge",
        "data/demo/world.py:1: imports the ground truth",
    ),
    "data/other/prepare.py": (
        "import stages.sft.train",
        "data/other/prepare.py:1: may not import stages.sft.train",
    ),
    "pipeline.py": (
        "from common.rows.shards import pad",
        "pipeline.py:1: may not import common.rows.shards",
    ),
    "compare.py": (
        "from stages.rl.algorithms.ppo import gae",
        "compare.py:1: may not import stages.rl.algorithms.ppo",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_checker_sees_a_broken_rule(tmp_path, name):
    code, expected = BROKEN[name]
    for file in ["common/a.py", "stages/rl/a.py", "data/demo/a.py", "pipeline.py", name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(
            '"""Docstrings may name data.demo.gold."""\n' if file != name else code
        )
    assert expected in code_violations(tmp_path)


GOOD = {
    "stages/rl/train.py": "from common.model.ops import x\nfrom stages.rl.algorithms.ppo import gae\nfrom stages.rl import rollout",
    "stages/rl/ppo.py": "import math\nfrom typing import NamedTuple\nfrom torch.nn import functional as F",
    "data/demo/labeller.py": "from data.demo import flaws, gold",
    "pipeline.py": "import os\nfrom common.config.schema import load",
    "common/hf.py": "def f():\n    from safetensors.torch import load_file\n    model.eval()",
    "tests/test_x.py": "import stages.rl.train, data.demo.gold",
}


def test_the_checker_lets_good_code_pass(tmp_path):
    for name, code in GOOD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    assert code_violations(tmp_path) == []


@pytest.mark.parametrize(
    "name, text, good",
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
