"""The page of a comparison: what compare.json holds, laid out as rows for its template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import page
from tools.compare.changes import table_of
from tools.compare.checks import value_of
from tools.compare.modes import MODES, modes
from tools.compare.numbers import NUMBERS, columns, marks
from tools.compare.terminal import cell


def comparison(result: dict[str, Any], pictures: dict[str, page.Picture], folder: Path) -> str:
    """One page from what compare.json holds, with these pictures; `folder`: where it will lie."""
    names, rows = list(result["models"]), result["samples"]
    # A reader should see answers before figures: one prompt of each family, the rest folded away.
    kinds = {row.get("family") for row in rows if row.get("family")}
    families = "families" in result[modes(result)[0]][names[0]]
    return page.render(
        "compare.html",
        title=f"Side by side: {' / '.join(names)}",
        result=result,
        samples=[sample(row) for row in rows],
        first=max(1, len(kinds) or min(4, len(rows))),
        figures=[figures(result, mode) for mode in modes(result)],
        families=by_family(result, names) if families else None,
        changes=changes(result["changes"]) if result["changes"] else None,
        pictures={"families": None, "best_of": None} | pictures,
        legend=legend(result),
        best_of=best_of(result) if "best_of_n" in result else None,
        accuracy=accuracy(result["reward_model"]) if "reward_model" in result else None,
        checks=checks(result) if result.get("checks") else None,
        origins=origins(result, folder),
    )


def figures(result: dict[str, Any], mode: str) -> page.Table:
    """Means over all answers of a mode, one row a model."""
    shown = columns(next(iter(result[mode].values())))
    rows = [[name, *(cell(row[c]) for c in shown)] for name, row in result[mode].items()]
    header = ["model", *(c.replace("_", " ") for c in shown)]
    return page.Table(header, rows, MODES[mode].format(**result))


def legend(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the columns of the figures mean."""
    shown = columns(next(iter(result[modes(result)[0]].values())))
    return [
        (number.column.replace("_", " "), number.about)
        for number in NUMBERS
        if number.column in shown
    ]


def by_family(result: dict[str, Any], names: Sequence[str]) -> page.Table:
    """Shares of correct answers, one row a family, one column a mode and model."""
    shown = [(mode, name) for mode in modes(result) for name in names]
    kinds = result[shown[0][0]][names[0]]["families"]
    header = ["family", "answers", *(f"{name}, {mode}" for mode, name in shown)]
    rows = []
    for kind in kinds:
        shares = [result[mode][name]["families"][kind]["correct"] for mode, name in shown]
        rows.append([kind, str(kinds[kind]["n"]), *(f"{share:.3f}" for share in shares)])
    about = "share of answers that say what was asked and nothing against it"
    return page.Table(header, rows, about)


def changes(found: dict[str, Any]) -> page.Table:
    """What each family has gained or lost, and what of it may be chance."""
    about = (
        f"correct answers of {found['after']} less those of {found['before']}; in brackets what "
        "may be chance (paired bootstrap over prompts, all families judged together)"
    )
    return page.Table(*table_of(found), about)


def sample(row: dict[str, Any]) -> page.Sample:
    """A prompt with one card a model, which holds its answer in every mode."""
    cards = []
    for name, answers in row["answers"].items():
        said = []
        for mode, answer in answers.items():
            correct = answer.get("correct")
            colour = "" if correct is None else "good" if correct else "bad"
            label = mode if len(answers) > 1 else ""
            said.append(page.Answer(label, answer["text"].strip("\n"), marks(answer), colour))
        cards.append(page.Card(name, said))
    return page.Sample(row["prompt"], cards)


def best_of(result: dict[str, Any]) -> page.Table:
    """Best-of-n by n, and the last model under it."""
    table = result["best_of_n"]
    shown = columns(table["1"])
    rows = [[f"best of {n}", *(cell(row[c]) for c in shown)] for n, row in table.items()]
    last = list(result["models"])[-1]
    if "sampled" in result:
        figures = result["sampled"][last]
        rows.append([f"{last} (all prompts)", *(cell(figures.get(c)) for c in shown)])
    about = f"the answer of highest reward among n that {result['reference']} gives"
    return page.Table(["", *shown], rows, f"{about}, on {result['best_of_prompts']} prompts")


def accuracy(found: dict[str, Any]) -> dict[str, page.Table]:
    """How often the reward model orders answers as gold does: the headline, and its parts."""

    def line(name: str, row: dict[str, Any]) -> list[str]:
        """One row: a subset of the pairs."""
        return [name, cell({"mean": row["accuracy"], "ci95": row["ci95"]}), f"{row['n']:,}"]

    about = (
        f"answer pairs of {found['prompts']} held-out prompts, "
        f"gold scores at least {found['minimum_gap']:g} apart"
    )
    header = ["pairs", "ordered as gold does", "n"]
    main = [line(found["pairs"], found), line("all such pairs", found["all"])]
    kinds = ("by_family", "by_source")
    parts = [line(name, row) for kind in kinds for name, row in found[kind].items()]
    return {"main": page.Table(header, main, about), "parts": page.Table(header, parts)}


def checks(result: dict[str, Any]) -> page.Table:
    """Every check, what was wanted of it, whether it holds."""
    rows = [
        [c["name"], value_of(c), c["wanted"], "yes" if c["passed"] else "NO"]
        for c in result["checks"]
    ]
    return page.Table(["check", "value", "wanted", "holds"], rows)


def origins(result: dict[str, Any], folder: Path) -> page.Table:
    """Where each model lies and what made it."""
    header = ["model", "directory", "stage", "steps", "parent", "commit", "seconds"]
    rows = []
    for name, model in result["models"].items():
        commit = (model.get("commit") or "-")[:10] + (" + changes" if model.get("dirty") else "")
        facts = [model.get(key) for key in ("stage", "step", "parent")]
        facts = ["-" if fact is None else str(fact) for fact in facts]
        rows.append(
            [name, page.link(model["path"], folder), *facts, commit, cell(model.get("wall_time"))]
        )
    return page.Table(header, rows)
