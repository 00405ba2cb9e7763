"""What the tools' plots share: size, colours, legend, error bars. Drawn without a screen."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.page import Picture

COLOURS = ("#9aa3ad", "#3b7dd8", "#d9822b", "#2f9e77", "#8e5bb5", "#c2456b")


# Backgrounds and inks of the pages (tools/templates/base.html).
THEMES = {"light": ("#ffffff", "#1c2024"), "dark": ("#15181b", "#e6e8ea")}


def picture(draw: Callable[[], Any], file: Path, text: str) -> Picture:
    """Draw a figure twice, for pages of light and of dark background: FILE.png and FILE-dark.png.

    `draw` makes the figure (see `new_figure`); `text` says what it shows.
    """
    from matplotlib import rc_context

    files = {"light": file, "dark": file.with_name(f"{file.stem}-dark{file.suffix}")}
    for theme, target in files.items():
        back, ink = THEMES[theme]
        colours = dict.fromkeys(("figure.facecolor", "axes.facecolor"), back)
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with rc_context(colours | dict.fromkeys(inked, ink)):
            draw().savefig(target)
    return Picture(file, text, files["dark"])


def ink() -> str:
    """The colour of the text in the figure that is being drawn."""
    from matplotlib import rcParams

    return rcParams["text.color"]


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
