"""Comparisons for the reward model: sample K answers a prompt from the SFT model and have them
ranked.

    python -m stages.reward.collect --config configs/demo/collect.yaml

A labeller is a function `rank(prompt, answers, rng) -> ranks` (0 = best, ties allowed), named as
"module:function": the demo's is a noisy program that stands in for people. Without one, a prompt's
reference answer is ranked above the samples. Comparisons made by people (`chosen`, `rejected`) are
taken as they are. Writes comparisons.jsonl and eval.jsonl.
"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.config.training import ReadsRows, Seed, refuse_overwriting
from common.handoff.locate import lineage, load_tokenizer
from common.handoff.publish import check_context, load_model
from common.handoff.report import provenance
from common.model.sample import sample
from common.program.errors import InputError
from common.program.files import dump, write_atomically, write_jsonl
from common.program.signals import interrupt_with
from common.rows.sources import BadRows, Row, read_rows
from common.text.chat import (
    Message,
    comparison_prompt,
    prompt_ids,
    rows_to_messages,
    rows_to_prompt,
)
from common.text.comparisons import ranked
from common.text.tokenizer import Tokenizer

Labeller = Callable[[str, list[str], random.Random], list[int]]
Contrast = Callable[[str, random.Random], list[tuple[str, str]]]


@stage_config
class Config(ReadsRows):
    """Sample answers and collect rankings of them."""

    parent: str
    """The SFT model that answers."""
    train_data: str
    """Prompts: rows with `prompt`, or SFT rows, whose answer then serves as reference."""
    output_dir: OutputDir
    """Where comparisons.jsonl and eval.jsonl go."""
    labeller: str | None = None
    """module:function that ranks answers; null = the reference answer wins over the samples."""
    contrast: str | None = None
    """module:function (prompt, rng) -> [(kind, answer)]: further answers ranked beside the
    samples."""
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
    seed: Seed = 0
    """Seed of sampling, labelling noise and split."""

    def __post_init__(self) -> None:
        refuse_overwriting(self)


def hook(name: str | None) -> Callable[..., Any] | None:
    """The function that "module:function" names: how a recipe brings its own code without any stage
    importing it."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{name}: cannot be loaded as module:function ({error})") from None
    if not callable(found):
        raise InputError(f"{name}: is not a function but {str(found)[:60]!r}")
    return found


def parse(
    tokenizer: Tokenizer, needs_answer: bool, row: dict[str, Any]
) -> tuple[list[Message], list[int], str | None]:
    """(messages of the prompt, its ids, the reference answer where one is needed)."""
    messages = rows_to_prompt(row)
    ids = prompt_ids(tokenizer, messages)
    try:
        return messages, ids, rows_to_messages(row)[-1]["content"] if needs_answer else None
    except InputError as error:
        raise InputError(
            f"without a labeller each prompt needs its answer: {error}", error.reason
        ) from None


def sampled(
    cfg: Config, tokenizer: Tokenizer, rows: Sequence[Row], rng: random.Random
) -> tuple[list[dict[str, Any]], int]:
    """Ranked answers for each parsed prompt row, and the number of prompts left out as too long."""
    labeller: Labeller | None = hook(cfg.labeller)
    contrast: Contrast | None = hook(cfg.contrast)
    model = load_model(cfg.parent, "lm")
    kept = [row.parsed for row in rows if len(row.parsed[1]) <= cfg.max_prompt_length]
    prompts = [ids for _, ids, _ in kept for _ in range(cfg.answers_per_prompt)]
    with tqdm(
        total=len(prompts), unit="answer", desc="collect", mininterval=1, disable=None
    ) as bar:
        answers = sample(
            model,
            prompts,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seed=cfg.seed,
            stop_ids=[tokenizer.eot_id],
            batch_size=cfg.batch_size,
            progress=bar.update,
        )
    comparisons = []
    for n, (messages, _, reference) in enumerate(kept):
        mine = answers[n * cfg.answers_per_prompt : (n + 1) * cfg.answers_per_prompt]
        entries = [(tokenizer.decode(a.ids), "policy", a.stopped) for a in mine]
        text = messages[-1]["content"]
        if contrast:
            entries += [(answer, kind, True) for kind, answer in contrast(text, rng)]
        if labeller:
            ranks = labeller(text, [answer for answer, _, _ in entries], rng)
            if len(ranks) != len(entries):
                raise InputError(
                    f"labeller {cfg.labeller}: {len(ranks)} ranks for {len(entries)} answers"
                )
        else:
            entries.insert(0, (reference, "reference", True))
            ranks = [0] + [1] * (len(entries) - 1)
        texts, sources, stopped = map(list, zip(*entries, strict=True))
        row = {
            "prompt": messages,
            "answers": texts,
            "ranks": ranks,
            "sources": sources,
            "stopped": stopped,
        }
        comparisons.append(row)
    return comparisons, len(rows) - len(kept)


def question(row: dict[str, Any]) -> str:
    """What identifies the prompt of a comparison."""
    return str(comparison_prompt(row)[-1]["content"])


def main(cfg: Config) -> None:
    started = time.perf_counter()
    check_context(
        cfg.parent,
        "lm",
        cfg.max_prompt_length + cfg.max_new_tokens,
        "max_prompt_length + max_new_tokens",
    )
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").unlink(missing_ok=True)  # the folder counts again once it is back
    rng = random.Random(cfg.seed)
    tokenizer, bad = load_tokenizer(cfg.parent), BadRows(cfg.on_bad_row)
    rows = read_rows(cfg.train_data, partial(parse, tokenizer, cfg.labeller is None), bad)[
        : cfg.max_prompts
    ]
    # Before the sampling, so that a bad row costs no minutes.
    people = [
        row.data
        for source in cfg.pairs
        for row in read_rows(source, partial(ranked, tokenizer), bad)
    ]
    comparisons, left_out = sampled(cfg, tokenizer, rows, rng)
    if not comparisons and not people:
        raise InputError(
            f"{cfg.train_data}: all {left_out} prompts are longer than max_prompt_length {cfg.max_prompt_length}"
        )
    # Held out by prompt, from both kinds alike: no prompt lies on both sides, and people's few
    # pairs are not lost.
    held: set[str] = set()
    for part in (comparisons, people):
        rng.shuffle(part)
        prompts = list(dict.fromkeys(map(question, part)))
        held |= set(prompts[: max(1, round(len(prompts) * cfg.eval_fraction))])
    both = comparisons + people
    if all(question(row) in held for row in both):
        raise InputError(
            f"{cfg.train_data}: all {len(both)} comparisons share the held-out prompts; give more prompts"
        )
    write_jsonl(folder / "eval.jsonl", [row for row in both if question(row) in held])
    write_jsonl(folder / "comparisons.jsonl", [row for row in both if question(row) not in held])

    answers = sum(len(row["answers"]) for row in comparisons)
    ends = [
        end
        for row in comparisons
        for end, who in zip(row["stopped"], row["sources"], strict=True)
        if who == "policy"
    ]
    complete = sum(ends) / max(1, len(ends))
    text = (
        f"{answers:,} answers to {len(comparisons):,} prompts ranked, {len(ends):,} of them sampled ({complete:.0%} complete); "
        f"{len(people)} pairs from people; {len(held)} prompts held out; {left_out} prompts too long"
    )
    print(f"gate collect: PASS  {text}")
    stage = {
        "stage": "collect",
        "kind": "comparisons",
        **lineage(cfg.parent),
        "config": to_dict(cfg),
        "seed": cfg.seed,
        "gate": {"passed": True, "text": text},
        "data": {"skipped": bad.counts},
        "metrics": {
            "answers": answers,
            "prompts": len(comparisons),
            "pairs": len(people),
            "too_long": left_out,
        },
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(stage))


if __name__ == "__main__":
    interrupt_with("collect, nothing is kept; the same command starts it again")
    cli(Config, main)
