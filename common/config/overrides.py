"""Keys of one step on the command line of a whole recipe: `--sft.learning_rate=1e-3`."""

import re
from collections.abc import Sequence

from common.config.command_line import CLI, did_you_mean
from common.program.errors import InputError

Overrides = dict[str, dict[str, str]]  # {step: {key: text}}


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Return (the other words, {step: {key: text}}) of a command line."""
    others, overrides = [], Overrides()
    for word in argv:
        if match := re.fullmatch(r"--([\w-]+)\.(\w+)=(.*)", word, re.DOTALL):
            step, key, text = match.groups()
            overrides.setdefault(step, {})[key] = text
        else:
            others.append(word)
    return others, overrides


def check_overrides(overrides: Overrides, steps: Sequence[str], recipe: object) -> None:
    """Raise InputError for the first step that the recipe does not have."""
    for step, keys in overrides.items():
        if step not in steps:
            key, text = next(iter(keys.items()))
            hint = did_you_mean(step, steps, "steps")
            raise InputError(f"{CLI}: --{step}.{key}={text}: {recipe} has no step {step}; {hint}")
