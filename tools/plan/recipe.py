"""The steps of a recipe with their configs, as the stages' own `Config` classes read them, before
any of them ran."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from common.config.command_line import CLI, did_you_mean
from common.config.fields import from_text, from_words, kinds_of, schemas_of
from common.config.overrides import Overrides, check_overrides
from common.config.schema import build
from common.config.strict_yaml import load_yaml, read_yaml
from common.program.errors import InputError
from stages.pretrain import prepare
from stages.pretrain import train as pretrain
from stages.reward import collect
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft

CONFIGS = {
    "prepare": prepare.Config,
    "pretrain": pretrain.Config,
    "sft": sft.Config,
    "collect": collect.Config,
    "reward": reward.Config,
    "rl": rl.Config,
}
MODULES = {stage: config.__module__ for stage, config in CONFIGS.items()}
STAGES = {module: stage for stage, module in MODULES.items()}


class Facts(NamedTuple):
    """What only a step's data will tell, as the command line has it; None = not given."""

    rows: float | None = None
    """Rows to train on."""
    length: float | None = None
    """Tokens of a mean row, in collect and rl of prompt and answer."""
    answers: float | None = None
    """Answers of a comparison."""


class Step(NamedTuple):
    """One step of a recipe."""

    name: str
    stage: str
    """A key of CONFIGS."""
    file: Path
    """Its config file, named in messages."""
    config: Any
    """Its config, of the class CONFIGS[stage]."""
    facts: Facts


def read_step(
    file: Path,
    stage: str,
    recipe: Mapping[str, Any],
    args: Mapping[str, Any],
    given: dict[str, str],
) -> Step:
    """Read the config of a step: defaults < its file < the recipe's args < the command line.

    `given` is {key: text} from the command line. Raises InputError for what the stage would refuse.
    """
    keys, facts = split_facts(given, stage)
    written, where = read_yaml(file)
    variables = {name: text for name, text in (recipe.get("variables") or {}).items() if text}
    values = {key: filled(value, variables) for key, value in (written | dict(args) | keys).items()}
    if not values.get("output_dir"):
        values["output_dir"] = f"{recipe.get('output_dir')}/{file.stem}"
    places = dict.fromkeys(values, str(file)) | where
    places |= dict.fromkeys(args, str(file.with_name("pipeline.yaml"))) | dict.fromkeys(keys, CLI)
    return Step(file.stem, stage, file, build(CONFIGS[stage], values, places), facts)


def split_facts(given: Mapping[str, str], stage: str) -> tuple[dict[str, Any], Facts]:
    """Return (keys of the stage's config, facts) from the command line's {key: text}."""
    schemas = schemas_of(CONFIGS[stage])
    keys: dict[str, Any] = {}
    facts: dict[str, float] = {}
    for key, text in given.items():
        if key in Facts._fields:
            facts[key] = positive(key, text)
        elif key not in schemas:
            hint = did_you_mean(key, [*schemas, *Facts._fields])
            raise InputError(f"{CLI}: {key} is not a key of {stage}; {hint}")
        elif "array" in kinds_of(schemas[key]):
            keys[key] = from_words([text], schemas[key])
        else:
            keys[key] = from_text(text, schemas[key])
    return keys, Facts(**facts)


def positive(key: str, text: str) -> float:
    """The number in `text`. Raises InputError unless it is one above 0."""
    value = from_text(text, {"type": "number"})
    if type(value) not in (int, float) or value <= 0:
        raise InputError(f"{CLI}: {key} = {text} is refused; it must be a number above 0")
    return value


def filled(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with ${variable} replaced in its strings; one that has no value yet stays."""
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    return Template(value).safe_substitute(variables) if isinstance(value, str) else value


def read_recipe(path: Path, stage: str | None, overrides: Overrides) -> list[Step]:
    """The steps of a recipe's folder, in order, that train, sample or prepare text.

    `path` may also be the config file of one step; then `stage` is its stage where the recipe does
    not say. Where there is no pipeline.yaml, the configs that are named as stages are the steps.
    """
    if not path.exists():
        raise InputError(f"{path}: no such recipe folder or config file")
    folder, only = (path, None) if path.is_dir() else (path.parent, path.stem)
    recipe = load_yaml(folder / "pipeline.yaml") if (folder / "pipeline.yaml").exists() else {}
    check_shape(folder / "pipeline.yaml", recipe)
    steps = recipe.get("steps", loose_steps(folder))
    if only and stage:
        steps = steps | {only: {"module": MODULES[stage]}}
    steps = {name: step for name, step in steps.items() if step.get("module") in STAGES}
    known = [name for name, step in steps.items() if step["module"] != MODULES["prepare"]]
    if not known or only not in (None, *known):
        there = f"those of {folder} are {', '.join(known) or 'none'} (<step>.yaml)"
        raise InputError(f"{path}: not a step that trains or samples; {there}; or give --stage")
    check_overrides(overrides, list(steps), folder)
    return [
        read_step(
            folder / f"{name}.yaml",
            STAGES[step["module"]],
            recipe,
            step.get("args") or {},
            overrides.get(name, {}),
        )
        for name, step in steps.items()
    ]


def check_shape(file: Path, recipe: Mapping[str, Any]) -> None:
    """Raise InputError where a recipe's steps, or what they hold, are no mappings."""
    found = {"steps": recipe.get("steps", {}), "variables": recipe.get("variables") or {}}
    if isinstance(found["steps"], dict):
        for name, step in found["steps"].items():
            found[f"steps.{name}"] = step
            found[f"steps.{name}.args"] = (isinstance(step, dict) and step.get("args")) or {}
    for key, value in found.items():
        if not isinstance(value, dict):
            raise InputError(f"{file}: {key} = {value!r} is refused; allowed: mapping")


def loose_steps(folder: Path) -> dict[str, dict[str, str]]:
    """The configs in a folder that are named as stages, as a recipe would list them."""
    return {
        name: {"module": module}
        for name, module in MODULES.items()
        if (folder / f"{name}.yaml").exists()
    }
