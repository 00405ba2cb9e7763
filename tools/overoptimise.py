"""What is true while PPO drives the reward model's score up (over-optimisation).

    python -m tools.overoptimise --config configs/demo-overoptimise/report.yaml

Reads samples.jsonl of PPO runs, judges the answers kept there, and draws gold (the ground truth)
and proxy (the reward model's score) against d = sqrt(KL) to the reference, with the curve of
best-of-n from the reference beside it (Gao 2022, figure 1).
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from common.config.schema import InputPath, OutputDir, RowsPath, cli, stage_config
from common.config.training import Seed
from common.handoff.locate import lineage, load_tokenizer, read_stage
from common.handoff.ownership import claim
from common.handoff.publish import load_model
from common.handoff.report import Gate, stage_report, write_stage_report
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.rows.sources import Row, read_rows
from tools import page, plots
from tools.compare.checks import failures, want
from tools.compare.measure import (
    Gold,
    Judges,
    answer_prompts,
    best_of_table,
    families,
    interval,
    is_finite,
    load_gold,
    mean,
    read_prompts,
)
from tools.compare.terminal import cell

COLUMNS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "prompt": str,
    "answer": str,
    "score": (int, float),
    "kl": (int, float),
    "stopped": bool,
}


@stage_config
class Config:
    """Report gold and proxy against the distance from the reference."""

    runs: Annotated[list[InputPath], Field(min_length=1)]
    """Directories of PPO runs, one curve: a later one went on from an earlier one (steps are
    counted on)."""
    output_dir: OutputDir
    """Where overoptimise.json, overoptimise.html, overoptimise.png and stage.json go."""
    gold: str
    """Module with judge(prompt, answer, stopped), the ground truth."""
    reward: InputPath | None = None
    """The reward model, for best-of-n; null = the one that the runs used."""
    reference: InputPath | None = None
    """The model that best-of-n draws from; null = the one that the runs' KL is measured from."""
    prompts: RowsPath | None = None
    """Prompts for best-of-n; null = leave it out."""
    best_of: Annotated[int, Field(gt=0)] = 64
    """Largest n."""
    best_of_prompts: Annotated[int, Field(gt=0)] = 100
    """Prompts used for it."""
    window: Annotated[int, Field(gt=0)] = 4
    """Logged rollouts pooled into one point of the curve."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    """Longest answer of best-of-n; as in the runs."""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Answers sampled at once."""
    seed: Seed = 0
    """Seed of best-of-n's answers."""


def same_origin(runs: Sequence[str], key: str, otherwise: str) -> str:
    """Config value `key` (null: `otherwise`) that all runs share. InputError where they differ or
    it is not noted."""
    found = {}
    for run in runs:
        config = read_stage(run).get("config", {})
        value = config.get(key) or config.get(otherwise)
        if not isinstance(value, str):
            raise InputError(f"{run}: no finished PPO run there (stage.json names no {key})")
        found[str(Path(value).resolve())] = value
    if len(found) > 1:
        named = ", ".join(found.values())
        raise InputError(f"runs: their {key}s differ ({named}), so they are no one curve")
    return next(iter(found.values()))


def read_episodes(runs: Sequence[str], gold: Gold) -> list[dict[str, Any]]:
    """Rows of all samples.jsonl with "gold", "correct" and "family"; steps of a later run follow
    the earlier one's."""
    episodes: list[dict[str, Any]] = []
    for run in runs:
        before = max((row["step"] for row in episodes), default=0)
        for row in read_rows(str(Path(run) / "samples.jsonl")):
            for column, kind in COLUMNS.items():
                value = row.data.get(column)
                number = kind not in (str, bool)
                if not isinstance(value, kind) or (number and not is_finite(value)):
                    needed = "a PPO run's samples are needed"
                    raise InputError(f"{row.origin}: {column} is {value!r}; {needed}")
            episodes.append(judged(row, gold) | {"step": before + row.data["step"]})
    return episodes


def judged(row: Row, gold: Gold) -> dict[str, Any]:
    """A row with what the ground truth says of its answer."""
    try:
        truth = gold(row.data["prompt"], row.data["answer"], row.data["stopped"])
    except ValueError as error:
        raise InputError(f"{row.origin}: {error}") from None
    return {
        **row.data,
        "gold": float(truth.score),
        "correct": bool(truth.correct),
        "family": truth.family,
    }


def series(episodes: Sequence[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Means over `window` consecutive logged steps, the newest window whole: one row a point of the
    curve."""
    steps = sorted({row["step"] for row in episodes})
    ends = range(len(steps), 0, -window)
    windows = [set(steps[max(0, end - window) : end]) for end in reversed(ends)]
    return [point_of([row for row in episodes if row["step"] in inside]) for inside in windows]


def point_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One point of the curve, from the episodes of its steps."""
    correct: dict[str, list[bool]] = {}
    for row in rows:
        correct.setdefault(row["family"], []).append(row["correct"])
    return {
        "first_step": min(row["step"] for row in rows),
        "last_step": max(row["step"] for row in rows),
        "kl": mean([row["kl"] for row in rows]),
        "gold": interval([row["gold"] for row in rows]),
        "proxy": interval([row["score"] for row in rows]),
        "stop_rate": mean([row["stopped"] for row in rows]),
        "correct": {kind: mean(correct[kind]) for kind in sorted(correct)},
    }


def best_of(cfg: Config, source: str, reference: str, reward: str) -> dict[str, Any]:
    """Best-of-n from the reference on the prompts in `source`: the curve of choosing instead of
    training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = (load_model(reward, "reward").to(device), load_tokenizer(reward))
    gold = load_gold(cfg.gold)
    prompts = read_prompts(source, cfg.best_of_prompts)
    families(gold, prompts)  # refuses prompts that gold cannot judge, before the work
    many = [messages for messages in prompts for _ in range(cfg.best_of)]
    with tqdm(
        total=len(many),
        unit="answer",
        desc=f"best of {cfg.best_of}",
        disable=not sys.stderr.isatty(),
    ) as bar:
        found = answer_prompts(
            load_model(reference, "lm").to(device),
            load_tokenizer(reference),
            many,
            Judges(scorer, None, gold),
            is_reference=True,
            progress=bar.update,
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
            batch_size=cfg.batch_size,
        )
    return {"best_of_n": best_of_table(found, cfg.best_of), "best_of_prompts": len(prompts)}


def assess(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"peak", "end", "checks"}: over-optimised = after gold's peak the proxy did not fall, gold
    did."""
    peak, end = max(points, key=lambda point: point["gold"]["mean"]), points[-1]
    rise = end["proxy"]["mean"] - peak["proxy"]["mean"]
    gap = peak["gold"]["ci95"][0] - end["gold"]["ci95"][1]
    checks = [
        want("proxy, end - gold's peak", rise, at_least=0),
        want("gold, its interval at the peak above that at the end", gap, above=0),
    ]
    return {"peak": peak, "end": end, "checks": checks}


def typical(episodes: Sequence[dict[str, Any]], point: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each family the answer of median proxy score at a point of the curve."""
    rows = [row for row in episodes if point["first_step"] <= row["step"] <= point["last_step"]]
    found = []
    for kind in sorted({row["family"] for row in rows}):
        own = sorted((row for row in rows if row["family"] == kind), key=lambda row: row["score"])
        found.append({**own[len(own) // 2], "kind": kind})
    return found


def draw(result: dict[str, Any]) -> Any:
    """Gold above, proxy below, both against sqrt(KL)."""
    figure, axes = plots.new_figure(2)
    points, peak = result["ppo"], distance(result["peak"])
    chosen = list(result.get("best_of_n", {}).values())
    looks = {"ms": 3, "lw": 1.2}
    for axis, kind, other in zip(axes, ("gold", "proxy"), ("gold", "reward"), strict=True):
        ppo = looks | {"fmt": "o-", "color": plots.COLOURS[2], "label": "PPO"}
        plots.error_bars(axis, list(map(distance, points)), [p[kind] for p in points], **ppo)
        if chosen:
            best = looks | {"fmt": "s-", "color": plots.COLOURS[1], "label": "best of n"}
            places = [row["kl"] ** 0.5 for row in chosen]
            plots.error_bars(axis, places, [row[other] for row in chosen], **best)
        axis.axvline(peak, color=plots.COLOURS[0], lw=1, ls="--")
        axis.set_ylabel("gold (ground truth)" if kind == "gold" else "proxy (reward model)")
    plots.legend_above(figure, axes[0])
    axes[1].set_xlabel(
        "distance from the reference, sqrt(KL / nats); dashed: PPO's gold at its best"
    )
    return figure


def distance(point: dict[str, Any]) -> float:
    """sqrt(KL) of a point; an estimate of KL below 0 counts as 0."""
    return math.sqrt(max(0.0, point["kl"]))


def render(
    result: dict[str, Any], episodes: Sequence[dict[str, Any]], png: Path, passed: bool
) -> str:
    """The page of a report: the plot, typical answers, every point of the curves."""
    text = "Gold and proxy against the square root of KL, PPO and best of n"
    return page.render(
        "overoptimise.html",
        title="Over-optimisation: what the proxy sees and what is true",
        result=result,
        peak=described(result["peak"]),
        end=described(result["end"]),
        passed=passed,
        picture=plots.picture(lambda: draw(result), png, text),
        samples=typical_pairs(result, episodes),
        points=table_of_points(result["ppo"]),
        best_of=table_of_best(result) if "best_of_n" in result else None,
        runs=", ".join(f"{run} ({n} steps)" for run, n in result["runs"].items()),
    )


def described(point: dict[str, Any]) -> dict[str, str]:
    """A point of the curve in words."""
    return {
        "steps": f"{point['first_step']} to {point['last_step']}",
        "gold": cell(point["gold"]),
        "proxy": cell(point["proxy"]),
        "kl": f"{point['kl']:.1f}",
    }


def typical_pairs(result: dict[str, Any], episodes: Sequence[dict[str, Any]]) -> list[page.Sample]:
    """One answer of each family at gold's peak, and one at the end beside it."""
    last = {row["kind"]: row for row in typical(episodes, result["end"])}
    found = []
    for row in typical(episodes, result["peak"]):
        pair = [("at gold's peak", row), ("at the end", last.get(row["kind"]))]
        cards = [page.Card(when, [as_answer(r)]) for when, r in pair if r]
        found.append(page.Sample(f"{row['kind']}: the answer of median proxy score", cards))
    return found


def as_answer(row: dict[str, Any]) -> page.Answer:
    """An episode as the page shows it."""
    remarks = f"gold {row['gold']:.2f} · proxy {row['score']:+.2f}"
    return page.Answer(row["prompt"], row["answer"], remarks, "good" if row["correct"] else "bad")


def table_of_points(points: Sequence[dict[str, Any]]) -> page.Table:
    """PPO's curve, one row a point."""
    kinds = sorted({kind for point in points for kind in point["correct"]})
    rows = []
    for p in points:
        row = [f"{p['first_step']}-{p['last_step']}", f"{p['kl']:.2f}", cell(p["gold"])]
        row += [cell(p["proxy"]), f"{p['stop_rate']:.2f}"]
        row += [f"{p['correct'][kind]:.2f}" if kind in p["correct"] else "-" for kind in kinds]
        rows.append(row)
    header = ["steps", "KL", "gold", "proxy", "stop rate", *(f"correct {kind}" for kind in kinds)]
    about = "nats an answer; in brackets 95 % intervals (bootstrap)"
    return page.Table(header, rows, about)


def table_of_best(result: dict[str, Any]) -> page.Table:
    """Best-of-n, one row for each n."""
    rows = [
        [n, f"{r['kl']:.2f}", cell(r["gold"]), cell(r["reward"])]
        for n, r in result["best_of_n"].items()
    ]
    prompts = f"{result['best_of_prompts']} held-out prompts"
    about = f"{result['reference']}, {prompts}; KL = ln n - (n-1)/n"
    return page.Table(["n", "KL", "gold", "proxy"], rows, about)


def gate_of(result: dict[str, Any]) -> Gate:
    """Whether over-optimisation is established, and the curve in one line."""
    failed = failures(result["checks"])
    points = (result["ppo"][0], result["peak"], result["end"])
    line = " -> ".join(
        f"{p['gold']['mean']:.3f} / {p['proxy']['mean']:+.2f} at KL {p['kl']:.1f}" for p in points
    )
    text = f"gold / proxy, start -> gold's peak -> end: {line}"
    return Gate(not failed, "; ".join([text, *failed]))


def main(cfg: Config) -> None:
    """Judge the runs' answers: overoptimise.json, .png, .html and stage.json."""
    started = time.perf_counter()
    folder = claim(cfg, "overoptimise", ("overoptimise.*", "overoptimise-dark.png"))
    reference = cfg.reference or same_origin(cfg.runs, "reference", "parent")
    reward = cfg.reward or same_origin(cfg.runs, "reward_model", "reward_model")
    episodes = read_episodes(cfg.runs, load_gold(cfg.gold))
    points = series(episodes, cfg.window)
    result: dict[str, Any] = {
        "runs": {run: read_stage(run).get("step") for run in cfg.runs},
        "reference": reference,
        "reward": reward,
        "gold": cfg.gold,
        "ppo": points,
        **assess(points),
        **(best_of(cfg, cfg.prompts, reference, reward) if cfg.prompts else {}),
    }
    gate = gate_of(result)
    print(gate.line("overoptimise"))
    write_atomically(folder / "overoptimise.json", dump(result))
    shown = render(result, episodes, folder / "overoptimise.png", gate.passed)
    write_atomically(folder / "overoptimise.html", shown.encode())
    facts = {
        "kind": "report",
        "parents": {run: lineage(run) for run in cfg.runs},
        "metrics": {
            name: {kind: result[name][kind]["mean"] for kind in ("gold", "proxy")}
            for name in ("peak", "end")
        },
    }
    seconds = time.perf_counter() - started
    write_stage_report(folder, stage_report("overoptimise", cfg, gate, seconds, **facts))


if __name__ == "__main__":
    cli(Config, main)
