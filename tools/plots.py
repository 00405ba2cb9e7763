"""What the tools' plots share: size, colours, legend, error bars. Drawn without a screen."""

from collections.abc import Sequence
from typing import Any

COLOURS = ("#9aa3ad", "#3b7dd8", "#d9822b", "#2f9e77", "#8e5bb5", "#c2456b")


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
    """The names of an axis' lines, in one row over the figure."""
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
