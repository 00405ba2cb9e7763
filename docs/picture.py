"""Draw the README's picture from a run of the demo: one prompt, three models, three curves.

    python docs/picture.py runs/demo                     writes docs/picture.svg
    python docs/picture.py runs/demo --prompt "Where do the otter and the owl live?"

Reads compare.json, metrics.jsonl of pretrain, sft and rl, and samples.jsonl of rl. The SVG has a
background and a dark variant of its own, so it can be read on light and on dark pages. Lengths are
in pixels of the picture, which is `WIDTH` of them wide.
"""

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WIDTH, MARGIN, GAP = 960, 28, 20
COLUMN = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
LETTERS = 31  # of an answer's line, which fits into a column in any font
LINE = 23  # from one line of text to the next
CHART = 150  # height of the area of the curves

STYLE = """
text { font-family: -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
.page { fill: #ffffff; stroke: #d1d9e0; }
.card { fill: #f6f8fa; stroke: #d1d9e0; }
.text { fill: #1f2328; font-size: 16px; }
.title { fill: #1f2328; font-size: 18px; font-weight: 600; }
.soft { fill: #59636e; font-size: 15px; }
.prompt { fill: #1f2328; font-size: 20px; font-weight: 600; }
.good { fill: #1a7f37; font-size: 16px; font-weight: 600; }
.bad { fill: #b35900; font-size: 16px; font-weight: 600; }
.grid { stroke: #d1d9e0; }
.one { stroke: #0969da; fill: none; stroke-width: 3; stroke-linejoin: round; }
.two { stroke: #1a7f37; fill: none; stroke-width: 3; stroke-linejoin: round; }
.dot-one { fill: #0969da; } .dot-two { fill: #1a7f37; }
.name-one { fill: #0969da; font-size: 15px; font-weight: 600; }
.name-two { fill: #1a7f37; font-size: 15px; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; stroke: #3d444d; }
  .card { fill: #151b23; stroke: #3d444d; }
  .text, .title, .prompt { fill: #f0f6fc; }
  .soft { fill: #9198a1; }
  .good, .name-two { fill: #3fb950; }
  .bad { fill: #f0a04b; }
  .grid { stroke: #3d444d; }
  .one { stroke: #58a6ff; } .name-one, .dot-one { fill: #58a6ff; }
  .two { stroke: #3fb950; } .dot-two { fill: #3fb950; }
}
"""

Points = list[tuple[float, float]]  # (step, value), in the order of the steps


class Curve(NamedTuple):
    """One line of a chart."""

    name: str  # written above the chart, in the line's colour
    points: Points
    dots: bool = False  # drawn as dots, as it was measured now and then


class Stage(NamedTuple):
    """One column of the picture: a stage, what its model answers, how it learned."""

    title: str
    about: str  # one short line: what this model does when it is asked
    answer: str
    verdict: str  # what the ground truth says of the answer
    good: bool  # whether the verdict is a good one
    chart_title: str
    unit: str  # of the steps of the chart
    curves: list[Curve]
    note: tuple[str, str] = ("", "")  # one more line below the names of the curves


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(step, value) of the rows that have the key."""
    return [(row["step"], row[key]) for row in rows if key in row]


def gold_by_rollout(run: Path, gold: str) -> Points:
    """Mean judgement of the ground truth on the answers that rl kept from each rollout."""
    judge: Callable[..., Any] = import_module(gold).judge
    found = defaultdict(list)
    for row in rows_of(run / "rl" / "samples.jsonl"):
        found[row["step"]].append(judge(row["prompt"], row["answer"], row["stopped"]).score)
    return [(step, sum(scores) / len(scores)) for step, scores in sorted(found.items())]


def pick(samples: Sequence[dict[str, Any]], prompt: str | None) -> dict[str, Any]:
    """The sample to show: that of the prompt, or the one that shows the largest difference.

    That is where the assistant's answer is wrong but not nonsense, the answer after RL is right,
    and gold differs most. Ends the program when there is no such sample.
    """
    if prompt is not None:
        samples = [sample for sample in samples if sample["prompt"] == prompt]
    else:
        samples = [sample for sample in samples if is_telling(*golds(sample))]
    if not samples:
        sys.exit("compare.json has no such sample: name another prompt of it with --prompt")
    return max(samples, key=lambda sample: round(golds(sample)[1] - golds(sample)[0], 1))


def golds(sample: dict[str, Any]) -> tuple[float, float]:
    """What the ground truth says of the sampled answers of the assistant, and of that after RL."""
    answers = sample["answers"]
    return answers["sft"]["sampled"]["gold"], answers["rl"]["sampled"]["gold"]


def is_telling(before: float, after: float) -> bool:
    """Whether the first is wrong but no nonsense, and the second right."""
    return 0.1 < before < 0.5 < after


def read(run: Path, prompt: str | None) -> tuple[str, list[Stage]]:
    """(prompt, the three columns) of a run of the demo."""
    report = json.loads((run / "compare.json").read_text())
    sample = pick(report["samples"], prompt)
    metrics = {name: rows_of(run / name / "metrics.jsonl") for name in ("pretrain", "sft", "rl")}
    kl = column(metrics["rl"], "kl")
    told = {
        "pretrain": ("Base model", "continues a document", "loss on the next token", "step"),
        "sft": ("Assistant (SFT)", "answers, with careless errors", "loss on answers", "step"),
        "rl": ("After RL (PPO)", "answers well", "score of the answers", "rollout"),
    }
    curves = {name: losses(metrics[name]) for name in ("pretrain", "sft")}
    curves["rl"] = [
        Curve("reward model", column(metrics["rl"], "score")),
        Curve("ground truth", gold_by_rollout(run, report["gold"])),
    ]
    notes = {"rl": ("distance (KL)", f"{change(kl)} nats")}
    stages = []
    for name, (title, about, chart_title, unit) in told.items():
        answer = sample["answers"][name]["sampled"]
        stages.append(
            Stage(
                title,
                about,
                answer["text"].strip(),
                f"ground truth: {answer['gold']:.2f} of 1",
                answer["gold"] > 0.5,
                chart_title,
                unit,
                curves[name],
                notes.get(name, ("", "")),
            )
        )
    return sample["prompt"], stages


def losses(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """The two losses of a stage."""
    return [
        Curve("training", column(rows, "loss")),
        Curve("held out", column(rows, "eval_loss"), dots=True),
    ]


def change(points: Points) -> str:
    """From where to where some points go."""
    return f"{points[0][1]:.2f} → {points[-1][1]:.2f}"


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """One line of text whose baseline begins (or ends, or has its middle) at x, y."""
    where = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {where} class="{kind}">{escape(words)}</text>'


def wrapped(answer: str, most: int = 9) -> list[str]:
    """The answer in lines; what does not fit into `most` of them becomes an ellipsis."""
    lines = [part for line in answer.splitlines() for part in textwrap.wrap(line, LETTERS)]
    return lines if len(lines) <= most else [*lines[: most - 1], "…"]


def plot(stage: Stage, x: float, y: float, width: float) -> list[str]:
    """The curves of a stage in a field whose upper left corner is x, y."""
    points = [point for curve in stage.curves for point in curve.points]
    last = max(step for step, _ in points) or 1
    values = [0.0, *(value for _, value in points)]
    low, high = min(values), max(values)

    def place(step: float, value: float) -> tuple[float, float]:
        """Where a point is in the picture."""
        return x + width * step / last, y + CHART * (high - value) / ((high - low) or 1)

    parts = [f'<path d="M{x:.0f} {place(0, 0)[1]:.1f}h{width:.0f}" class="grid"/>']
    for curve, kind in zip(stage.curves, ("one", "two"), strict=True):
        places = [place(*point) for point in curve.points]
        if curve.dots:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="dot-{kind}"/>'
                for px, py in places
            ]
        else:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline points="{path}" class="{kind}"/>')
    below = y + CHART + LINE
    parts.append(text(x, below, "0", "soft"))
    parts.append(text(x + width, below, f"{last:g} {stage.unit}s", "soft", "end"))
    return parts


def legend(stage: Stage, x: float, y: float, width: float) -> list[str]:
    """Title of the chart, and a line for each curve: its name, and from where to where it went."""
    rows = [(curve.name, change(curve.points)) for curve in stage.curves] + [stage.note]
    parts = [text(x, y, stage.chart_title, "title")]
    for number, ((name, told), kind) in enumerate(
        zip(rows, ("name-one", "name-two", "soft"), strict=True), 1
    ):
        parts.append(text(x, y + number * LINE, name, kind))
        parts.append(text(x + width, y + number * LINE, told, "soft", "end"))
    return parts


def draw(prompt: str, stages: Sequence[Stage]) -> str:
    """The picture as SVG."""
    lines = max(len(wrapped(stage.answer)) for stage in stages)
    top, pad = 92, 16
    chart_top = top + 2 * LINE + 34 + (lines + 1) * LINE + 30
    height = chart_top + 4 * LINE + CHART + LINE + pad + MARGIN
    parts = [
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="14" class="page"/>',
        text(WIDTH / 2, 54, f"“{prompt}”", "prompt", "middle"),
    ]
    for number, stage in enumerate(stages):
        left = MARGIN + number * (COLUMN + GAP)
        x, width = left + pad, COLUMN - 2 * pad
        box = (
            f'<rect x="{left}" y="{top - 8}" width="{COLUMN}" height="{height - top - MARGIN + 8}"'
        )
        parts.append(f'{box} rx="10" class="card"/>')
        parts.append(text(x, top + LINE, stage.title, "title"))
        parts.append(text(x, top + 2 * LINE, stage.about, "soft"))
        y = top + 2 * LINE + 34
        parts += [text(x, y + n * LINE, row, "text") for n, row in enumerate(wrapped(stage.answer))]
        kind = "good" if stage.good else "bad"
        parts.append(text(x, y + lines * LINE + 8, stage.verdict, kind))
        parts += legend(stage, x, chart_top, width)
        parts += plot(stage, x, chart_top + 4 * LINE, width)
    label = escape(f"Answers of three models to: {prompt}")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
    return "\n".join(
        [f'{head} aria-label="{label}">', f"<style>{STYLE}</style>", *parts, "</svg>\n"]
    )


def main() -> None:
    """Read the run, draw it, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of configs/demo")
    parser.add_argument("--prompt", help="a prompt of compare.json; without it the clearest one")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "picture.svg")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # for the module of the ground truth
    prompt, stages = read(args.run, args.prompt)
    args.output.write_text(draw(prompt, stages))
    print(args.output)


if __name__ == "__main__":
    main()
