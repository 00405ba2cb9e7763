"""Makes the demo world's files: documents, demonstrations, prompts. No download; the same seed
gives the same bytes.

python -m data.demo.prepare --config configs/demo/data.yaml --output_dir runs/demo/data
"""

import random
import time
from collections.abc import Iterable

from common.config.schema import OutputDir, cli, stage_config
from common.handoff.ownership import claim
from common.handoff.report import Gate, publish_rows, stage_report
from common.program.errors import InputError
from data.demo import flaws, gold, labeller, world
from data.demo.documents import documents
from data.demo.world import FAMILIES

Rows = dict[str, list[dict]]  # the rows of each file, by its name without .jsonl

# What a stage may tell a reader of the data, and of a model that was trained on it.
ABOUT = (
    "A small made-up world with four families of prompts (a short story, a thank-you letter, a "
    "sum, a question on two animals); a model trained on it knows nothing else. Its "
    "demonstrations are careless on purpose, and a hidden scorer, which no stage sees, judges "
    "the answers."
)
FILES = (
    *("heldout_prompts.jsonl", "heldout_comparisons.jsonl", "sft.jsonl", "sft_eval.jsonl"),
    *("collect_prompts.jsonl", "rl_prompts.jsonl", "documents.jsonl"),
)
WINDOW = 4  # words by which leaks are searched
SAMPLE = 1200  # demonstrations judged for the report


@stage_config
class Config:
    """The files of the demo world."""

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


class Prompts:
    """Draws prompts, no two of them alike, and none that asks what a held-out prompt asks."""

    def __init__(self, rng: random.Random) -> None:
        """Begin with no prompt drawn and nothing held out."""
        self.rng = rng
        self.used: set[str] = set()
        self.held_out: set[tuple[str, ...]] = set()  # keys of tasks

    def draw(self, number: int, hold: bool = False) -> list[tuple[str, str]]:
        """`number` new (prompt, family), as many of each family; with `hold` they are held out.

        Raises InputError where the world has no more prompts to give.
        """
        found = []
        for i in range(number):
            family = FAMILIES[i % len(FAMILIES)]
            for _ in range(1000):
                task = world.draw(self.rng, family)
                prompt = world.ask(task, self.rng)
                if task.key not in self.held_out and prompt not in self.used:
                    break
            else:
                few = f"the demo world has too few {family} prompts for {number} more"
                raise InputError(f"{few}: ask for fewer")
            self.used.add(prompt)
            if hold:
                self.held_out.add(task.key)
            found.append((prompt, family))
        self.rng.shuffle(found)
        return found


def find_leaks(held_out: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The held-out prompts that occur in a text, word for word. Prompts have more than WINDOW + 1
    words."""
    anchors: dict[tuple[str, ...], list[str]] = {}
    for prompt in held_out:
        words = prompt.split()[1:-1]  # quotes or a number beside the prompt do not hide these
        middle = (len(words) - WINDOW) // 2
        anchors.setdefault(tuple(words[middle : middle + WINDOW]), []).append(prompt)
    leaks: set[str] = set()
    for text in texts:
        words = text.split()
        for anchor in anchors.keys() & set(zip(*(words[i:] for i in range(WINDOW)), strict=False)):
            leaks.update(prompt for prompt in anchors[anchor] if prompt in text)
    return sorted(leaks)


def agreement(rng: random.Random, asked: list[str], margin: float = 0.1) -> float:
    """How often the labeller orders two answers as the gold score does, where that differs by more
    than `margin`."""
    agree = total = 0
    for prompt in asked:
        task = world.task_of(prompt)
        answers = [flaws.demonstration(task, rng) for _ in range(3)]
        answers += [text for _, text in flaws.negatives(prompt, rng)]
        truth = [gold.judge(prompt, answer).score for answer in answers]
        ranks = labeller.rank(prompt, answers, rng)
        for i in range(len(answers)):
            for j in range(i):
                if abs(truth[i] - truth[j]) > margin and ranks[i] != ranks[j]:
                    total += 1
                    agree += (truth[i] > truth[j]) == (ranks[i] < ranks[j])
    return agree / max(total, 1)


def answers_to(prompt: str) -> dict:
    """A good answer, a near miss of it, a right one badly put, for the exam of the reward model: a
    function of the prompt alone, whatever the comparisons that the reward model is trained on."""
    task, rng = world.task_of(prompt), random.Random(f"exam {prompt}")
    state = rng.getrandbits(32)
    answers = {
        "good": world.good(task, random.Random(state)),
        "near_miss": flaws.content_error(task, rng, random.Random(state)),
        "badly_put": flaws.style_error(task, rng),
    }
    return {"prompt": prompt, "answers": list(answers.values()), "sources": list(answers)}


def build(cfg: Config) -> Rows:
    """The rows of each file. Raises RuntimeError where a held-out prompt is found in training
    text."""
    rng = random.Random(f"demo world {cfg.seed}")  # a string is hashed with sha512, everywhere
    prompts = Prompts(rng)

    def demonstrations(number: int) -> list[dict]:
        """Prompts with the answers of careless writers."""
        rows = []
        for prompt, _ in prompts.draw(number):
            completion = flaws.demonstration(world.task_of(prompt), rng, cfg.carelessness)
            rows.append({"prompt": prompt, "completion": completion})
        return rows

    def bare(number: int, hold: bool = False) -> list[dict]:
        """Prompts without answers."""
        return [{"prompt": p, "family": family} for p, family in prompts.draw(number, hold)]

    heldout = bare(cfg.heldout_prompts, hold=True)
    rows = {
        "heldout_prompts": heldout,
        "heldout_comparisons": [answers_to(row["prompt"]) for row in heldout],
        "sft": demonstrations(cfg.demonstrations),
        "sft_eval": demonstrations(cfg.eval_demonstrations),
        "collect_prompts": bare(cfg.collect_prompts),
        "rl_prompts": bare(cfg.rl_prompts),
    }
    texts = documents(rng, cfg.documents, prompts.held_out)
    rows["documents"] = [{"text": text} for text in texts]
    refuse_leaks(rows)
    return rows


def refuse_leaks(rows: Rows) -> None:
    """Raise RuntimeError where a held-out prompt occurs in a text that is trained on."""
    trained = [group for name, group in rows.items() if not name.startswith("heldout")]
    texts = (text for group in trained for row in group for text in row.values())
    if leaks := find_leaks([row["prompt"] for row in rows["heldout_prompts"]], texts):
        number = f"{len(leaks)} held-out prompts occur in training text"
        raise RuntimeError(f"{number}, first {leaks[0]!r}")


def measure(rows: Rows, seed: int) -> dict[str, float]:
    """The size of each file, how good the demonstrations are, and how well the labeller judges."""
    scores = [gold.judge(row["prompt"], row["completion"]) for row in rows["sft"][:SAMPLE]]
    asked = [row["prompt"] for row in rows["collect_prompts"][:300]]
    return {
        **{name: len(group) for name, group in rows.items()},
        "document_characters": sum(len(row["text"]) for row in rows["documents"]),
        "demonstration_gold": sum(s.score for s in scores) / max(len(scores), 1),
        "demonstration_correct": sum(s.correct for s in scores) / max(len(scores), 1),
        "labeller_agreement": agreement(random.Random(seed), asked),
    }


def describe(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    size = f"{metrics['document_characters'] / 1e6:.1f} MB"
    return (
        f"{metrics['documents']} documents ({size}), "
        f"{metrics['sft']} demonstrations of mean gold {metrics['demonstration_gold']:.2f}, "
        f"{metrics['heldout_prompts']} held-out prompts in no training text, "
        f"labeller agrees with gold {metrics['labeller_agreement']:.0%}"
    )


def main(cfg: Config) -> None:
    """Build, check and write every file, then stage.json and the manifest."""
    started, folder = time.perf_counter(), claim(cfg, "data", FILES)
    rows = build(cfg)
    metrics = measure(rows, cfg.seed)
    gate = Gate(True, describe(metrics))
    print(gate.line("data"))
    facts = {"kind": "data", "about": ABOUT, "metrics": metrics}
    seconds = time.perf_counter() - started
    files = {f"{name}.jsonl": group for name, group in rows.items()}
    publish_rows(folder, files, stage_report("data", cfg, gate, seconds, **facts))


if __name__ == "__main__":
    cli(Config, main)
