"""Comparisons for the reward model: sample K answers a prompt from the SFT model and have them ranked.

    python -m stages.reward.collect --config configs/demo/collect.yaml

A labeller is a function `rank(prompt, answers, rng) -> ranks` (0 = best, ties allowed), named as "module:function": the
demo's is a noisy program that stands in for people. Without one, a prompt's reference answer is ranked above the samples.
Comparisons made by people (`chosen`, `rejected`) are taken as they are. Writes comparisons.jsonl and eval.jsonl.
"""

import random
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from common.chat import comparison_prompt, prompt_ids, rows_to_messages, rows_to_prompt
from common.checkpoint import dump, lineage, load_model, load_tokenizer, provenance, write_atomically
from common.config import InputError, cli, stage_config, to_dict
from common.data import Row, read_rows, write_jsonl
from common.generate import sample

Labeller = Callable[[str, list[str], random.Random], list[int]]
Contrast = Callable[[str, random.Random], list[tuple[str, str]]]


@stage_config
class Config:
    """Sample answers and collect rankings of them."""

    parent: str
    """The SFT model that answers."""
    train_data: str
    """Prompts: rows with `prompt`, or SFT rows, whose answer then serves as reference."""
    output_dir: str
    """Where comparisons.jsonl and eval.jsonl go."""
    labeller: str | None = None
    """module:function that ranks answers; null = the reference answer wins over the samples."""
    contrast: str | None = None
    """module:function (prompt, rng) -> [(kind, answer)]: further answers ranked beside the samples."""
    pairs: list[str] = []
    """Files of comparisons by people: rows with `chosen` and `rejected`."""
    answers_per_prompt: Annotated[int, Field(gt=0)] = 4
    """K: samples drawn for each prompt."""
    max_prompts: Annotated[int, Field(gt=0)] | None = None
    """Use only so many prompts."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 96
    """Longest answer."""
    max_prompt_length: Annotated[int, Field(gt=0)] = 96
    """Longer prompts are left out, and counted."""
    batch_size: Annotated[int, Field(gt=0)] = 192
    """Answers sampled at once."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts whose comparisons are held out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling, labelling noise and split."""


def hook(name: str | None) -> Callable[..., Any] | None:
    """The function that "module:function" names: how a recipe brings its own code without any stage importing it."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{name}: cannot be loaded as module:function ({error})") from None


def sampled(cfg: Config, rows: Sequence[Row], rng: random.Random) -> tuple[list[dict[str, Any]], int]:
    """Ranked answers for each prompt row, and the number of prompts left out as too long."""
    labeller: Labeller | None = hook(cfg.labeller)
    contrast: Contrast | None = hook(cfg.contrast)
    tokenizer, model = load_tokenizer(cfg.parent), load_model(cfg.parent, "lm")
    messages, ids = [], []
    for row in rows:
        try:
            messages.append(rows_to_prompt(row.data))
            ids.append(prompt_ids(tokenizer, messages[-1]))
        except InputError as error:
            raise InputError(f"{row.origin}: {error}") from None
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= cfg.max_prompt_length]
    prompts = [ids[i] for i in kept for _ in range(cfg.answers_per_prompt)]
    with tqdm(total=len(prompts), unit="answer", desc="collect", mininterval=1) as bar:
        answers = sample(
            model, prompts, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=cfg.seed,
            stop_ids=[tokenizer.eot_id], batch_size=cfg.batch_size, progress=bar.update,
        )  # fmt: skip
    comparisons = []
    for n, i in enumerate(kept):
        mine = answers[n * cfg.answers_per_prompt : (n + 1) * cfg.answers_per_prompt]
        entries = [(tokenizer.decode(a.ids), "policy", a.stopped) for a in mine]
        text = messages[i][-1]["content"]
        if contrast:
            entries += [(answer, kind, True) for kind, answer in contrast(text, rng)]
        if labeller:
            ranks = labeller(text, [answer for answer, _, _ in entries], rng)
            if len(ranks) != len(entries):
                raise InputError(f"labeller {cfg.labeller}: {len(ranks)} ranks for {len(entries)} answers")
        else:
            try:
                reference = rows_to_messages(rows[i].data)[-1]["content"]
            except InputError as error:
                raise InputError(f"{rows[i].origin}: without a labeller each prompt needs its answer: {error}") from None
            entries.insert(0, (reference, "reference", True))
            ranks = [0] + [1] * (len(entries) - 1)
        texts, sources, stopped = map(list, zip(*entries, strict=True))
        row = {"prompt": messages[i], "answers": texts, "ranks": ranks, "sources": sources, "stopped": stopped}
        comparisons.append(row)
    return comparisons, len(ids) - len(kept)


def question(row: dict[str, Any]) -> str:
    """What identifies the prompt of a comparison."""
    return str(comparison_prompt(row)[-1]["content"])


def read_pairs(sources: Sequence[str]) -> list[dict[str, Any]]:
    """People's comparisons, each checked to have a prompt. Raises InputError naming file and line."""
    rows = [row for source in sources for row in read_rows(source)]
    for row in rows:
        try:
            question(row.data)
        except InputError as error:
            raise InputError(f"{row.origin}: {error}") from None
    return [row.data for row in rows]


def main(cfg: Config) -> None:
    started = time.perf_counter()
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").unlink(missing_ok=True)  # the folder counts again once it is back
    rng = random.Random(cfg.seed)
    rows = read_rows(cfg.train_data)[: cfg.max_prompts]
    people = read_pairs(cfg.pairs)  # before the sampling, so that a bad row costs no minutes
    comparisons, left_out = sampled(cfg, rows, rng)
    # Held out by prompt, from both kinds alike: no prompt lies on both sides, and people's few pairs are not lost.
    held: set[str] = set()
    for part in (comparisons, people):
        rng.shuffle(part)
        prompts = list(dict.fromkeys(map(question, part)))
        held |= set(prompts[: max(1, round(len(prompts) * cfg.eval_fraction))])
    both = comparisons + people
    write_jsonl(folder / "eval.jsonl", [row for row in both if question(row) in held])
    write_jsonl(folder / "comparisons.jsonl", [row for row in both if question(row) not in held])

    answers = sum(len(row["answers"]) for row in comparisons)
    ends = [end for row in comparisons for end, who in zip(row["stopped"], row["sources"], strict=True) if who == "policy"]
    complete = sum(ends) / max(1, len(ends))
    text = (
        f"{answers:,} answers to {len(comparisons):,} prompts ranked, {len(ends):,} of them sampled ({complete:.0%} complete); "
        f"{len(people)} pairs from people; {len(held)} prompts held out; {left_out} prompts too long"
    )
    passed = bool(comparisons or people)
    print(f"gate collect: {'PASS' if passed else 'FAIL'}  {text}")
    stage = {
        "stage": "collect",
        "kind": "comparisons",
        **lineage(cfg.parent),
        "config": to_dict(cfg),
        "seed": cfg.seed,
        "gate": {"passed": passed, "text": text},
        "metrics": {"answers": answers, "prompts": len(comparisons), "pairs": len(people), "too_long": left_out},
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(stage))


if __name__ == "__main__":
    cli(Config, main)
