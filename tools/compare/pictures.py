"""The two plots of a comparison: correct answers by family, and best-of-n beside PPO."""

from pathlib import Path
from typing import Any

from tools.compare.modes import modes
from tools.page import Picture
from tools.plots import COLOURS, error_bars, legend_above, new_figure, picture


def draw_all(result: dict[str, Any], folder: Path) -> dict[str, Picture]:
    """The plots that a comparison has figures for, as PNG files in `folder`, by place in the
    page."""
    pictures = {}
    if result["gold"]:
        file, text = folder / "compare-families.png", "Correct answers by family"
        pictures["families"] = picture(lambda: plot_families(result), file, text)
    if "best_of_n" in result:
        file = folder / "compare-best-of-n.png"
        text = "Gold and reward against the distance from the reference"
        pictures["best_of"] = picture(lambda: plot_best_of(result), file, text)
    return pictures


def plot_families(result: dict[str, Any]) -> Any:
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
    return figure


def plot_best_of(result: dict[str, Any]) -> Any:
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
    return figure
