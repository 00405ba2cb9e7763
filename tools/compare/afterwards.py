"""What to look at after a comparison: its page, a chat, prompts on which the models differ."""

import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.handoff.locate import read_stage
from common.program.terminal import one_line
from tools.compare.modes import modes

COMMAND = "python -m tools.compare"
EXAMPLES = 3
COMPARED = 400  # characters of two answers, at most, to tell how different they are


def lines(
    result: dict[str, Any], samples: Sequence[dict[str, Any]], page: Path, talks: bool
) -> list[str]:
    """What to look at, as lines for the terminal. `samples`: of all prompts, as compare.json has
    them; `talks`: whether the last model was taught to talk."""
    paths = [model["path"] for model in result["models"].values()]
    found = [f"page: {page}"]
    if talks:
        found.append(f"talk with it: {COMMAND} {shlex.quote(paths[-1])} --chat")
    # Greedy answers do not depend on which other prompts are asked, so these can be seen again.
    mode = modes(result)[-1]
    chosen = examples(samples, list(result["models"]), mode)
    if len(paths) > 1 and chosen:
        found.append("prompts on which the models differ; paste a line to see it:")
        judge = f" --gold {shlex.quote(result['gold'])}" if result["gold"] else ""
        models = shlex.join(paths)
        for row in chosen:
            prompt = shlex.quote(row["prompt"])
            found.append(f"  {COMMAND} {models} --prompt {prompt} --temperature 0{judge}")
    return found


def examples(
    samples: Sequence[dict[str, Any]], names: Sequence[str], mode: str
) -> list[dict[str, Any]]:
    """The samples that show best what the later models have learned, each of another family if
    there are enough."""
    rated = [(interest(row, names, mode), row) for row in samples if can_be_pasted(row["prompt"])]
    rated = sorted((pair for pair in rated if pair[0] > 0), key=lambda pair: -pair[0])
    chosen: list[dict[str, Any]] = []
    seen: set[str | None] = set()
    for _, row in rated:
        if row.get("family") not in seen:
            chosen.append(row)
            seen.add(row.get("family"))
    chosen += [row for _, row in rated if row not in chosen]
    return chosen[:EXAMPLES]


def can_be_pasted(prompt: str) -> bool:
    """Whether a prompt is one line of plain text."""
    return bool(prompt) and prompt == one_line(prompt)


def interest(row: dict[str, Any], names: Sequence[str], mode: str) -> float:
    """How much there is to see: the share of earlier models that are wrong where the last is right;
    without gold, how different the texts of the last two are. 0 to 1."""
    answers = [row["answers"][name][mode] for name in names]
    *earlier, last = answers
    if not earlier:
        return 0.0
    if "correct" in last:
        wrong = sum(not answer["correct"] for answer in earlier)
        return wrong / len(earlier) if last["correct"] else 0.0
    one, other = (answer["text"][:COMPARED] for answer in answers[-2:])
    return 1 - difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def about(path: str) -> str | None:
    """What the text that a model has learned to write from says of itself, e.g. that it is a closed
    world; None where nobody says so.

    Follows stage.json from the model to the base model it came from, to the prepared text, to the
    data stage that wrote the files, whose stage.json holds `about`. All of them must say something:
    a model that has also read other text knows more.
    """
    seen: set[str] = set()
    while (parent := read_stage(path).get("parent")) and path not in seen:
        seen.add(path)
        path = parent
    files = [file for folder in train_data(path) for file in train_data(folder)]
    said = [read_stage(Path(file).parent).get("about") or "" for file in files]
    return " ".join(dict.fromkeys(said)) if said and all(said) else None


def train_data(folder: str) -> list[str]:
    """The files or folders that the stage in a folder was trained on, as its config names them."""
    named = read_stage(folder).get("config", {}).get("train_data") or []
    files = named if isinstance(named, list) else [named]
    return [file for file in files if isinstance(file, str)]
