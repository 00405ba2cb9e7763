"""A Markov chain as a picture: states on a circle, arrows with their probabilities. Graphviz
(circo), else matplotlib."""

import html
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.program.files import write_atomically

INSTALL = (
    "Graphviz is not installed (apt-get install graphviz, brew install graphviz): "
    "matplotlib draws instead"
)


class Chain(NamedTuple):
    """States in the order of their tokens, and where each token leads from each: the state less its
    first token, plus it."""

    title: str
    names: list[str]  # of the S states
    tokens: list[str]  # the V symbols
    probabilities: np.ndarray  # (S, V), rows of NaN for states that do not occur
    seen: np.ndarray | None  # (S) whether the training text holds the state; None: not known

    def is_unseen(self, state: int) -> bool:
        """Whether the training text is known not to hold the state."""
        return self.seen is not None and not self.seen[state]

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
    """Whether its program circo is installed."""
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
    """As `draw`, with circo."""
    import graphviz

    font = {"fontname": "Helvetica,Arial,sans-serif"}
    whole = {
        **font,
        "label": chain.title,
        "labelloc": "t",
        "fontsize": "20",
        "bgcolor": "white",
        "mindist": str(0.6 * len(chain.tokens)),
    }
    node = {**font, "shape": "circle", "style": "filled", "fontsize": "18"}
    graph = graphviz.Digraph(engine="circo", node_attr=node, edge_attr=font, graph_attr=whole)
    for s, name in enumerate(chain.names):
        looks = {"fillcolor": "#dce9f7"}
        if chain.is_unseen(s):
            looks = {"style": "filled,dashed", "fillcolor": "#ffffff"}
        graph.node(str(s), graphviz.escape(name), **looks)
    for s, v, t, p in chain.arrows():
        text = html.escape(f"{chain.tokens[v]}  {p:.0%}")
        cell = f"<td>{text}</td>"  # on white, as circo lays labels on lines
        label = f'<<table border="0" cellpadding="1" bgcolor="white"><tr>{cell}</tr></table>>'
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
    """As `draw`, with the states in an order in which each leads to the next."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    S, V = chain.probabilities.shape
    size = max(7.5, 0.75 * S)  # inches
    figure = Figure(figsize=(size, size), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set(aspect="equal", xlim=(-1.35, 1.35), ylim=(-1.35, 1.35))
    axis.set_title(chain.title, fontsize=15, parse_math=False)
    axis.axis("off")
    angles = {s: math.pi / 2 - 2 * math.pi * n / S for n, s in enumerate(round_order(S, V))}
    places = {s: np.array([math.cos(a), math.sin(a)]) for s, a in angles.items()}
    radius = min(0.13, 1.3 / S)
    for arrow in chain.arrows():
        add_arrow(axis, chain, arrow, places, radius)
    for s, name in enumerate(chain.names):
        unseen = chain.is_unseen(s)
        looks = {"facecolor": "white", "linestyle": "--"} if unseen else {"facecolor": "#dce9f7"}
        axis.add_patch(circle(places[s], radius, edgecolor="black", zorder=3, **looks))
        text = {"ha": "center", "va": "center", "fontsize": 12, "zorder": 4, "parse_math": False}
        axis.text(*places[s], name, **text)
    for suffix in (".svg", ".png"):
        figure.savefig(file.with_suffix(suffix))


def add_arrow(
    axis: Any,
    chain: Chain,
    arrow: tuple[int, int, int, float],
    places: dict[int, np.ndarray],
    radius: float,
) -> None:
    """One arrow with its token and probability; a loop lies on the outside of the circle."""
    from matplotlib.patches import FancyArrowPatch

    s, v, t, p = arrow
    S = len(chain.names)
    looks = {"color": shade(p), "lw": 0.7 + 2.5 * p, "arrowstyle": "-|>", "mutation_scale": 14}
    if s == t:
        side = np.array([-places[s][1], places[s][0]]) * radius * 0.6
        base, label = places[s] * (1 + 0.75 * radius), places[s] * (1.03 + 2.3 * radius)
        begin, end, looks["connectionstyle"] = base + side, base - side, "arc3,rad=-2"
    else:
        begin, end, looks["connectionstyle"] = places[s], places[t], "arc3,rad=0.18"
        way = end - begin
        bow = np.array([way[1], -way[0]]) * 0.18  # arc3 bends to the right of its way
        shrink = radius * axis.figure.get_figwidth() * 72 / 2.8
        looks |= {"shrinkA": shrink, "shrinkB": shrink}
        label = begin + (0.5 if np.linalg.norm(way) < 7 / S else 0.33) * way + 0.5 * bow
    axis.add_patch(FancyArrowPatch(begin, end, **looks))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    text = {"ha": "center", "va": "center", "fontsize": 9, "bbox": box, "parse_math": False}
    axis.text(*label, f"{chain.tokens[v]}  {p:.0%}", **text)


def circle(place: np.ndarray, radius: float, **looks: Any) -> Any:
    """A circle for matplotlib, which is imported only when it draws."""
    from matplotlib.patches import Circle

    return Circle(place, radius, **looks)
