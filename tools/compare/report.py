"""The page of a comparison: figures, correctness by family, samples side by side, best-of-n,
checks, lineage, plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import page
from tools.compare.terminal import cell, marks

COLOURS = ("#9aa3ad", "#3b7dd8", "#d9822b", "#2f9e77", "#8e5bb5", "#c2456b")
MODES = {
    "sampled": "sampled at temperature {temperature:g}",
    "greedy": "greedy (the likeliest token each time)",
}


def modes(result: dict[str, Any]) -> list[str]:
    return [mode for mode in MODES if mode in result]


def comparison(result: dict[str, Any], pictures: Sequence[tuple[Path, str]]) -> str:
    """One page from what compare.json holds. `pictures`: (PNG file, what it shows)."""
    names = list(result["models"])
    title = " / ".join(names)
    parts = [page.paragraph(introduction(result))]
    # A reader should see answers before figures: one prompt of each family, the rest folded away.
    rows = result["samples"]
    first = max(
        1, len({row.get("family") for row in rows if row.get("family")}) or min(4, len(rows))
    )
    shown = [sample(row, result) for row in rows]
    parts += [page.heading("Answers"), *shown[:first]]
    parts += (
        [page.details(f"{len(shown) - first} more prompts", shown[first:])]
        if len(shown) > first
        else []
    )
    parts += [page.heading("Figures"), page.paragraph(legend(result), "soft")]
    parts += [figures(result, mode) for mode in modes(result)]
    if "families" in result[modes(result)[0]][names[0]]:
        parts += [page.heading("Correct answers by family"), by_family(result, names)]
    parts += [page.picture(file, text) for file, text in pictures]
    if "best_of_n" in result:
        parts += [page.heading("Best of n: the plain alternative to PPO"), *best_of(result)]
    if "reward_model" in result:
        parts += [
            page.heading("Does the reward model know what is good?"),
            *accuracy(result["reward_model"]),
        ]
    if result.get("checks"):
        lines = [
            [c["name"], f"{c['value']:.3f}", c["wanted"], "yes" if c["passed"] else "NO"]
            for c in result["checks"]
        ]
        parts += [page.heading("Checks"), page.table(["check", "value", "wanted", "holds"], lines)]
    parts += [page.heading("Where the models come from"), origins(result)]
    return page.document(f"Side by side: {title}", parts)


def introduction(result: dict[str, Any]) -> str:
    text = (
        f"{len(result['models'])} models answer the same {result['prompts']} prompts with the same random numbers"
        f" (seed {result['seed']}). A base model knows no roles: it gets the prompt as the start of a document and goes on;"
        " an assistant gets it as a user's message."
    )
    if result.get("gold"):
        text += f" Gold is the ground truth ({result['gold']}), 0 to 1: no stage has seen it."
    return text


def legend(result: dict[str, Any]) -> str:
    text = "In brackets: 95 % intervals, bootstrap over prompts. Length in tokens. Stop rate: answers that ended by themselves."
    if result.get("reference"):
        text += (
            f" KL: mean over answers of log-prob of the model less that of {result['reference']}, nats an answer"
            " (for greedy answers, at temperature 1: a log-ratio, no divergence)."
        )
    return text


def figures(result: dict[str, Any], mode: str) -> str:
    columns = [
        c
        for c in ("gold", "reward", "kl", "stop_rate", "length")
        if c in next(iter(result[mode].values()))
    ]
    rows = [[name, *(cell(row[c]) for c in columns)] for name, row in result[mode].items()]
    caption = MODES[mode].format(**result)
    return page.table(["model", *(c.replace("_", " ") for c in columns)], rows, caption)


def by_family(result: dict[str, Any], names: Sequence[str]) -> str:
    columns = [(mode, name) for mode in modes(result) for name in names]
    kinds = result[columns[0][0]][names[0]]["families"]
    header = ["family", "answers", *(f"{name}, {mode}" for mode, name in columns)]
    rows = [
        [
            kind,
            str(kinds[kind]["n"]),
            *(f"{result[mode][name]['families'][kind]['correct']:.3f}" for mode, name in columns),
        ]
        for kind in kinds
    ]
    return page.table(
        header, rows, "share of answers that say what was asked and nothing against it"
    )


def sample(row: dict[str, Any], result: dict[str, Any]) -> str:
    cards = []
    for name, answers in row["answers"].items():
        said = []
        for mode, answer in answers.items():
            correct = answer.get("correct")
            colour = "" if correct is None else "good" if correct else "bad"
            said.append(
                (
                    mode if len(answers) > 1 else "",
                    answer["text"].strip("\n"),
                    marks(answer),
                    colour,
                )
            )
        cards.append(page.card(name, said))
    return page.beside(row["prompt"], cards)


def best_of(result: dict[str, Any]) -> list[str]:
    table = result["best_of_n"]
    columns = ["gold", "reward", "kl"] if "gold" in table["1"] else ["reward", "kl"]
    rows = [[f"best of {n}", *(cell(row[c]) for c in columns)] for n, row in table.items()]
    last = list(result["models"])[-1]
    if "sampled" in result:
        rows.append(
            [f"{last} (all prompts)", *(cell(result["sampled"][last].get(c)) for c in columns)]
        )
    about = f"the answer of highest reward among n that {result['reference']} gives, on {result['best_of_prompts']} prompts"
    return [page.table(["", *columns], rows, about)]


def accuracy(found: dict[str, Any]) -> list[str]:
    def line(name: str, row: dict[str, Any]) -> list[str]:
        return [name, cell({"mean": row["accuracy"], "ci95": row["ci95"]}), f"{row['n']:,}"]

    about = f"answer pairs of {found['prompts']} held-out prompts, gold scores at least {found['minimum_gap']:g} apart"
    rows = [line(found["pairs"], found), line("all such pairs", found["all"])]
    more = [
        line(name, row) for kind in ("by_family", "by_source") for name, row in found[kind].items()
    ]
    header = ["pairs", "ordered as gold does", "n"]
    return [
        page.table(header, rows, about),
        page.details("by family and source", [page.table(header, more)]),
    ]


def origins(result: dict[str, Any]) -> str:
    header = ["model", "directory", "stage", "steps", "parent", "commit", "seconds"]
    rows = []
    for name, model in result["models"].items():
        commit = (model.get("commit") or "-")[:10] + (" + changes" if model.get("dirty") else "")
        facts = [model.get(key) for key in ("path", "stage", "step", "parent")]
        rows.append(
            [
                name,
                *("-" if fact is None else str(fact) for fact in facts),
                commit,
                cell(model.get("wall_time")),
            ]
        )
    return page.table(header, rows)


def new_figure(panels: int, height: float = 2.9) -> tuple[Any, Any]:
    """(figure, its axes from top to bottom) drawn without a screen; stacked, so that a phone can
    show them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, height * panels + 0.3), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes


def legend_above(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False
    )


def error_bars(axis: Any, x: Sequence[float], rows: Sequence[dict[str, Any]], **style: Any) -> None:
    """Means with their intervals against x."""
    means = [row["mean"] for row in rows]
    below = [row["mean"] - row["ci95"][0] for row in rows]
    above = [row["ci95"][1] - row["mean"] for row in rows]
    axis.errorbar(
        x,
        means,
        yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
        capsize=2,
        **style,
    )


def plot_families(result: dict[str, Any], file: Path) -> None:
    """Correct answers by family, one panel a mode, one bar a model."""
    names, found = list(result["models"]), modes(result)
    figure, axes = new_figure(len(found))
    for axis, mode in zip(axes, found, strict=True):
        kinds = list(result[mode][names[0]]["families"])
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            shares = [result[mode][name]["families"][kind]["correct"] for kind in kinds]
            places = [k + (i - (len(names) - 1) / 2) * width for k in range(len(kinds))]
            axis.bar(places, shares, width * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
        axis.set(
            ylabel=f"correct, {mode}", ylim=(0, 1.02), xticks=range(len(kinds)), xticklabels=kinds
        )
    legend_above(figure, axes[0])
    figure.savefig(file)


def plot_best_of(result: dict[str, Any], file: Path) -> None:
    """Gold and reward against sqrt(KL): best-of-n, the reference, and the models that come after
    it."""
    names = list(result["models"])
    paths = [model["path"] for model in result["models"].values()]
    after = (
        names[paths.index(result["reference"]) :] if result["reference"] in paths else names[-1:]
    )
    kinds = [kind for kind in ("gold", "reward") if kind in result["best_of_n"]["1"]]
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        rows = list(result["best_of_n"].values())
        error_bars(
            axis,
            [row["kl"] ** 0.5 for row in rows],
            [row[kind] for row in rows],
            fmt="o-",
            label="best of n",
            color=COLOURS[3],
            ms=4,
        )
        for n, row in result["best_of_n"].items():
            axis.annotate(
                n,
                (row["kl"] ** 0.5, row[kind]["mean"]),
                textcoords="offset points",
                xytext=(4, -11),
                fontsize=8,
            )
        for name in after if "sampled" in result else ():
            row, colour = result["sampled"][name], COLOURS[names.index(name) % len(COLOURS)]
            error_bars(
                axis, [max(0.0, row["kl"]) ** 0.5], [row[kind]], fmt="s", label=name, color=colour
            )
        axis.set_ylabel(kind)
    axes[-1].set_xlabel("distance from the reference, sqrt(KL / nats)")
    legend_above(figure, axes[0])
    figure.savefig(file)
