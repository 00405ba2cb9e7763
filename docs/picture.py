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
LETTERS = 36  # of an answer's line, which is about as wide as a column inside its padding
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
  .one { stroke: #58a6ff; } .name-one { fill: #58a6ff; }
  .two { stroke: #3fb950; }
}
"""

Points = list[tuple[float, float]]  # (step, value), in the order of the steps


class Curve(NamedTuple):
    """One line of a chart."""

    name: str  # written above the chart, in the line's colour
    points: Points


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
    """The sample to show: that of the prompt, or the one with the largest difference.

    Among equal differences it is the one with the shortest answers. Ends the program when the
    prompt is not among the samples of compare.json.
    """
    if prompt is not None:
        for sample in samples:
            if sample["prompt"] == prompt:
                return sample
        known = "\n  ".join(sample["prompt"] for sample in samples)
        sys.exit(f"compare.json has no answers to {prompt!r}; it has those to\n  {known}")

    def difference(sample: dict[str, Any]) -> tuple[float, int]:
        answers = {name: kinds["sampled"] for name, kinds in sample["answers"].items()}
        gain = round(answers["rl"]["gold"] - answers["sft"]["gold"], 1)
        return gain, -sum(len(answer["text"]) for answer in answers.values())

    return max(samples, key=difference)


def read(run: Path, prompt: str | None) -> tuple[str, list[Stage]]:
    """(prompt, the three columns) of a run of the demo."""
    report = json.loads((run / "compare.json").read_text())
    sample = pick(report["samples"], prompt)
    metrics = {name: rows_of(run / name / "metrics.jsonl") for name in ("pretrain", "sft", "rl")}
    gold = gold_by_rollout(run, report["gold"])
    kl = metrics["rl"][-1]["kl"]
    told = {
        "pretrain": (
            "1. Pretraining: base",
            "goes on with the document",
            "next-token loss",
            "step",
        ),
        "sft": ("2. SFT: assistant", "answers, carelessly", "loss on answers", "step"),
        "rl": ("4. RL: better assistant", "answers well", f"ends at KL {kl:.1f} nats", "rollout"),
    }
    curves = {
        "pretrain": [Curve("held-out loss", column(metrics["pretrain"], "eval_loss"))],
        "sft": [
            Curve("training", column(metrics["sft"], "loss")),
            Curve("held out", column(metrics["sft"], "eval_loss")),
        ],
        "rl": [
            Curve("reward model", column(metrics["rl"], "score")),
            Curve("ground truth", gold),
        ],
    }
    stages = []
    for name, (title, about, chart_title, unit) in told.items():
        answer = sample["answers"][name]["sampled"]
        verdict = f"ground truth: {answer['gold']:.2f} of 1"
        text, good = " ".join(answer["text"].split()), answer["gold"] > 0.5
        stages.append(Stage(title, about, text, verdict, good, chart_title, unit, curves[name]))
    return sample["prompt"], stages


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """One line of text whose baseline begins (or ends, or has its middle) at x, y."""
    where = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {where} class="{kind}">{escape(words)}</text>'


def wrapped(answer: str, most: int = 9) -> list[str]:
    """The answer in lines; what does not fit into `most` of them becomes an ellipsis."""
    return textwrap.wrap(answer, LETTERS, max_lines=most, placeholder=" …")


def plot(stage: Stage, x: float, y: float, width: float) -> list[str]:
    """The curves of a stage in a field whose upper left corner is x, y."""
    points = [point for curve in stage.curves for point in curve.points]
    last, high = max(step for step, _ in points), max(0.0, *(value for _, value in points))
    low = min(0.0, *(value for _, value in points))
    span = (high - low) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        return x + width * step / (last or 1), y + CHART * (high - value) / span

    zero = place(0, 0)[1]
    parts = [f'<path d="M{x:.0f} {zero:.1f}h{width:.0f}" class="grid"/>']
    for curve, kind in zip(stage.curves, ("one", "two"), strict=False):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*p) for p in curve.points))
        parts.append(f'<polyline points="{path}" class="{kind}"/>')
    below = y + CHART + LINE
    parts += [
        text(x, below, "0", "soft"),
        text(x + width, below, f"{last:g} {stage.unit}s", "soft", "end"),
    ]
    return parts


def legend(stage: Stage, x: float, y: float, width: float) -> list[str]:
    """Title of the chart, and a line for each curve: its name, and from where to where it went."""
    parts = [text(x, y, stage.chart_title, "title")]
    for number, (curve, kind) in enumerate(zip(stage.curves, ("one", "two"), strict=False), 1):
        first, last = curve.points[0][1], curve.points[-1][1]
        parts.append(text(x, y + number * LINE, curve.name, f"name-{kind}"))
        change = f"{first:.2f} → {last:.2f}"
        parts.append(text(x + width, y + number * LINE, change, "soft", "end"))
    return parts


def draw(prompt: str, stages: Sequence[Stage]) -> str:
    """The picture as SVG."""
    lines = max(len(wrapped(stage.answer)) for stage in stages)
    top, pad = 92, 16
    chart_top = top + 2 * LINE + 26 + (lines + 1) * LINE + 58
    height = chart_top + 3 * LINE + CHART + LINE + 2 * pad + MARGIN - 14
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
        parts += plot(stage, x, chart_top + 3 * LINE, width)
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
