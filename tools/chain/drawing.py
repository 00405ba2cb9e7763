"""A Markov chain as a picture: states on a circle, arrows with their probabilities. Graphviz
(circo), else matplotlib."""

import html
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.program.files import write_atomically

INSTALL = "Graphviz is not installed (apt-get install graphviz, brew install graphviz): matplotlib draws instead"


class Chain(NamedTuple):
    """States in the order of their tokens, and where each token leads from each: the state less its
    first token, plus it."""

    title: str
    names: list[str]  # of the S states
    tokens: list[str]  # the V symbols
    probabilities: np.ndarray  # (S, V), rows of NaN for states that do not occur
    seen: np.ndarray | None  # (S) whether the training text holds the state; None: not known

    def arrows(self) -> list[tuple[int, int, int, float]]:
        """(state, token, next state, probability), those that do occur."""
        S, V = self.probabilities.shape
        found = (
            (s, v, s * V % S + v, float(self.probabilities[s, v]))
            for s in range(S)
            for v in range(V)
        )
        return [arrow for arrow in found if arrow[3] > 0]


def has_graphviz() -> bool:
    return shutil.which("circo") is not None


def shade(probability: float) -> str:
    """Pale for unlikely, dark for likely."""
    light, dark = (190, 203, 219), (23, 75, 142)
    return "#" + "".join(
        f"{round(a + (b - a) * probability):02x}" for a, b in zip(light, dark, strict=True)
    )


def draw(chain: Chain, file: Path) -> None:
    """file.svg and file.png."""
    if has_graphviz():
        draw_with_graphviz(chain, file)
    else:
        draw_with_matplotlib(chain, file)


def draw_with_graphviz(chain: Chain, file: Path) -> None:
    import graphviz

    font = {"fontname": "Helvetica,Arial,sans-serif"}
    graph = graphviz.Digraph(
        engine="circo",
        node_attr=font | {"shape": "circle", "style": "filled", "fontsize": "18"},
        edge_attr=font,
        graph_attr=font
        | {
            "label": chain.title,
            "labelloc": "t",
            "fontsize": "20",
            "bgcolor": "white",
            "mindist": str(0.6 * len(chain.tokens)),
        },
    )
    for s, name in enumerate(chain.names):
        unseen = chain.seen is not None and not chain.seen[s]
        looks = (
            {"style": "filled,dashed", "fillcolor": "#ffffff"}
            if unseen
            else {"fillcolor": "#dce9f7"}
        )
        graph.node(str(s), graphviz.escape(name), **looks)
    for s, v, t, p in chain.arrows():
        text = html.escape(f"{chain.tokens[v]}  {p:.0%}")  # on white, as circo lays labels on lines
        label = (
            f'<<table border="0" cellpadding="1" bgcolor="white"><tr><td>{text}</td></tr></table>>'
        )
        graph.edge(str(s), str(t), label, color=shade(p), penwidth=f"{0.7 + 2.5 * p:.2f}")
    write_atomically(file.with_suffix(".svg"), graph.pipe("svg"))
    graph.graph_attr["dpi"] = "110"
    write_atomically(file.with_suffix(".png"), graph.pipe("png"))


def round_order(S: int, V: int) -> list[int]:
    """All states so that each leads to the next: prefer the largest token to a state not seen yet
    (Martin 1934)."""
    order = [0]
    while len(order) < S:
        order.append(
            next(t for v in reversed(range(V)) if (t := order[-1] * V % S + v) not in order)
        )
    return order


def draw_with_matplotlib(chain: Chain, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch

    S, V = chain.probabilities.shape
    size = max(7.5, 0.75 * S)  # inches
    figure = Figure(figsize=(size, size), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set(aspect="equal", xlim=(-1.35, 1.35), ylim=(-1.35, 1.35))
    axis.set_title(chain.title, fontsize=15, parse_math=False)
    axis.axis("off")
    angle = {s: math.pi / 2 - 2 * math.pi * n / S for n, s in enumerate(round_order(S, V))}
    at = {s: np.array([math.cos(a), math.sin(a)]) for s, a in angle.items()}
    radius = min(0.13, 1.3 / S)
    for s, v, t, p in chain.arrows():
        looks = {"color": shade(p), "lw": 0.7 + 2.5 * p, "arrowstyle": "-|>", "mutation_scale": 14}
        if s == t:  # a loop on the outside
            side = np.array([-at[s][1], at[s][0]]) * radius * 0.6
            base, label = at[s] * (1 + 0.75 * radius), at[s] * (1.03 + 2.3 * radius)
            axis.add_patch(
                FancyArrowPatch(base + side, base - side, connectionstyle="arc3,rad=-2", **looks)
            )
        else:
            way = at[t] - at[s]
            bow = np.array([way[1], -way[0]]) * 0.18  # arc3 bends to the right of its way
            shrink = radius * size * 72 / 2.8
            looks |= {"shrinkA": shrink, "shrinkB": shrink}
            axis.add_patch(FancyArrowPatch(at[s], at[t], connectionstyle="arc3,rad=0.18", **looks))
            label = at[s] + (0.5 if np.linalg.norm(way) < 7 / S else 0.33) * way + 0.5 * bow
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(
            *label,
            f"{chain.tokens[v]}  {p:.0%}",
            ha="center",
            va="center",
            fontsize=9,
            bbox=box,
            parse_math=False,
        )
    for s, name in enumerate(chain.names):
        unseen = chain.seen is not None and not chain.seen[s]
        looks = {"facecolor": "white", "linestyle": "--"} if unseen else {"facecolor": "#dce9f7"}
        axis.add_patch(circle(at[s], radius, edgecolor="black", zorder=3, **looks))
        axis.text(*at[s], name, ha="center", va="center", fontsize=12, zorder=4, parse_math=False)
    for suffix in (".svg", ".png"):
        figure.savefig(file.with_suffix(suffix))


def circle(place: np.ndarray, radius: float, **looks: Any) -> Any:
    from matplotlib.patches import Circle

    return Circle(place, radius, **looks)
