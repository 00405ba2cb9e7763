"""Makes the demo world's files: documents, demonstrations, prompts. No download; the same seed
gives the same bytes.

python -m data.demo.prepare --config configs/demo/data.yaml --output_dir runs/demo/data
"""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from common.config.schema import OutputDir, cli, stage_config
from common.program.errors import InputError
from data.demo import flaws, gold, labeller, world
from data.demo.documents import documents
from data.demo.world import FAMILIES

WINDOW = 4  # words by which leaks are searched
SAMPLE = 1200  # demonstrations judged for the report


@stage_config
class Config:
    output_dir: OutputDir = "runs/demo/data"
    """Where the files go."""
    seed: int = 0
    """Draws everything but the facts about the animals, which are the same at every seed."""
    documents: int = 80_000
    """Pretraining documents."""
    demonstrations: int = 16_000
    """Prompts with an answer of uneven quality, for sft."""
    eval_demonstrations: int = 400
    """The same, to evaluate sft on."""
    collect_prompts: int = 3_000
    """Prompts to collect comparisons on, for the reward model."""
    rl_prompts: int = 6_000
    """Prompts to practise on, for rl."""
    heldout_prompts: int = 1_000
    """Prompts that occur in no training text, for compare."""
    carelessness: float = 1.0
    """Scales the rates of errors in the demonstrations; 0 = all are clean."""


def prompts(
    rng: random.Random,
    number: int,
    used: set[str],
    held_out: set[tuple[str, ...]],
    hold: bool = False,
) -> list[tuple[str, str]]:
    """`number` new (prompt, family), families in turn; adds them to `used`, and their keys to
    `held_out` if `hold`.

    InputError where the world has no more prompts to give.
    """
    found = []
    for i in range(number):
        family = FAMILIES[i % len(FAMILIES)]
        for _ in range(1000):
            task = world.draw(rng, family)
            prompt = world.ask(task, rng)
            if task.key not in held_out and prompt not in used:
                break
        else:
            raise InputError(
                f"the demo world has too few {family} prompts for {number} more: ask for fewer"
            )
        used.add(prompt)
        if hold:
            held_out.add(task.key)
        found.append((prompt, family))
    rng.shuffle(found)
    return found


def find_leaks(held_out: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The held-out prompts that occur in a text, word for word. Prompts have more than WINDOW + 1
    words."""
    anchors: dict[tuple[str, ...], list[str]] = {}
    for prompt in held_out:
        words = prompt.split()[
            1:-1
        ]  # inside, so that quotes or a number before the prompt do not hide it
        middle = (len(words) - WINDOW) // 2
        anchors.setdefault(tuple(words[middle : middle + WINDOW]), []).append(prompt)
    leaks = set()
    for text in texts:
        words = text.split()
        for anchor in anchors.keys() & set(zip(*(words[i:] for i in range(WINDOW)), strict=False)):
            leaks.update(prompt for prompt in anchors[anchor] if prompt in text)
    return sorted(leaks)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(
        "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8"
    )
    part.replace(path)


def agreement(rng: random.Random, asked: list[str], margin: float = 0.1) -> float:
    """How often the labeller orders two answers as the gold score does, where that differs by more
    than `margin`."""
    agree = total = 0
    for prompt in asked:
        task = world.parse(prompt)
        answers = [flaws.demonstration(task, rng) for _ in range(3)] + [
            text for _, text in flaws.negatives(prompt, rng)
        ]
        truth, ranks = (
            [gold.judge(prompt, answer).score for answer in answers],
            labeller.rank(prompt, answers, rng),
        )
        for i in range(len(answers)):
            for j in range(i):
                if abs(truth[i] - truth[j]) > margin and ranks[i] != ranks[j]:
                    total += 1
                    agree += (truth[i] > truth[j]) == (ranks[i] < ranks[j])
    return agree / max(total, 1)


def answers_to(prompt: str) -> dict:
    """A good answer, a near miss of it, a right one badly put, for the exam of the reward model: a
    function of the prompt alone, whatever the comparisons that the reward model is trained on."""
    task, rng = world.parse(prompt), random.Random(f"exam {prompt}")
    state = rng.getrandbits(32)
    clean, miss = (
        world.good(task, random.Random(state)),
        flaws.content_error(task, rng, random.Random(state)),
    )
    answers = {"good": clean, "near_miss": miss, "badly_put": flaws.style_error(task, rng)}
    return {"prompt": prompt, "answers": list(answers.values()), "sources": list(answers)}


def build(cfg: Config) -> dict[str, list[dict]]:
    """The rows of each file, by name. RuntimeError where a held-out prompt is found in training
    text."""
    rng = random.Random(
        f"demo world {cfg.seed}"
    )  # a string is hashed with sha512, the same everywhere
    used: set[str] = set()
    keys: set[tuple[str, ...]] = set()
    heldout = prompts(rng, cfg.heldout_prompts, used, keys, hold=True)
    rows = {"heldout_prompts": [{"prompt": prompt, "family": family} for prompt, family in heldout]}
    rows["heldout_comparisons"] = [answers_to(prompt) for prompt, _ in heldout]
    for name, number in (("sft", cfg.demonstrations), ("sft_eval", cfg.eval_demonstrations)):
        rows[name] = []
        for prompt, _ in prompts(rng, number, used, keys):
            completion = flaws.demonstration(world.parse(prompt), rng, cfg.carelessness)
            rows[name].append({"prompt": prompt, "completion": completion})
    for name, number in (("collect_prompts", cfg.collect_prompts), ("rl_prompts", cfg.rl_prompts)):
        rows[name] = [
            {"prompt": p, "family": family} for p, family in prompts(rng, number, used, keys)
        ]
    rows["documents"] = [{"text": text} for text in documents(rng, cfg.documents, keys)]
    trained = (
        text
        for name, group in rows.items()
        if not name.startswith("heldout")
        for r in group
        for text in r.values()
    )
    if leaks := find_leaks([prompt for prompt, _ in heldout], trained):
        raise RuntimeError(
            f"{len(leaks)} held-out prompts occur in training text, first {leaks[0]!r}"
        )
    return rows


def main(cfg: Config) -> None:
    """Builds, checks and writes every file, then stage.json."""
    begin, out = time.time(), Path(cfg.output_dir)
    rows = build(cfg)
    out.mkdir(parents=True, exist_ok=True)
    for name, group in rows.items():
        write_jsonl(out / f"{name}.jsonl", group)
    scores = [gold.judge(row["prompt"], row["completion"]) for row in rows["sft"][:SAMPLE]]
    characters = sum(len(row["text"]) for row in rows["documents"])
    metrics = {name: len(group) for name, group in rows.items()} | {
        "document_characters": characters,
        "demonstration_gold": sum(s.score for s in scores) / max(len(scores), 1),
        "demonstration_correct": sum(s.correct for s in scores) / max(len(scores), 1),
        "labeller_agreement": agreement(
            random.Random(cfg.seed), [r["prompt"] for r in rows["collect_prompts"][:300]]
        ),
    }
    text = (
        f"{len(rows['documents'])} documents ({characters / 1e6:.1f} MB), {len(rows['sft'])} demonstrations of mean gold "
        f"{metrics['demonstration_gold']:.2f}, {len(rows['heldout_prompts'])} held-out prompts in no training text, "
        f"labeller agrees with gold {metrics['labeller_agreement']:.0%}"
    )
    stage = {
        "stage": "data",
        "kind": "data",
        "gate": {"passed": True, "text": text},
        "metrics": metrics,
    }
    stage |= {"config": asdict(cfg), "wall_time": time.time() - begin}
    part = out / "stage.json.tmp"
    part.write_text(json.dumps(stage, indent=2) + "\n", encoding="utf-8")
    part.replace(out / "stage.json")
    print(f"data: {text}")


if __name__ == "__main__":
    cli(Config, main)
