"""Comparisons for the reward model: sample K answers a prompt from the SFT model and have them
ranked.

    python -m stages.reward.collect --config configs/demo/collect.yaml

A labeller is a function `rank(prompt, answers, rng) -> ranks` (0 = best, ties allowed), named as
"module:function": the demo's is a noisy program that stands in for people. Without one, a prompt's
reference answer is ranked above the samples. Comparisons made by people (`chosen`, `rejected`) are
taken as they are. Writes comparisons.jsonl and eval.jsonl.
"""

import contextlib
import json
import random
import reprlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from tqdm import tqdm

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import InputPath, OutputDir, RowsPath, cli, fingerprint, stage_config
from common.config.training import ReadsRows, Seed
from common.handoff.locate import content_of_model, lineage, load_tokenizer
from common.handoff.ownership import claim
from common.handoff.publish import check_context, load_model
from common.handoff.report import Gate, publish_rows, stage_report
from common.model.sample import sample
from common.program.errors import Failure, InputError
from common.program.files import dump, write_atomically
from common.program.signals import interrupt_with
from common.rows.sources import BadRows, read_rows
from common.text.chat import (
    Message,
    comparison_prompt,
    prompt_ids,
    rows_to_messages,
    rows_to_prompt,
)
from common.text.comparisons import check_ranks, ranked
from common.text.tokenizer import Tokenizer

Labeller = Callable[[str, list[str], random.Random], list[int]]
Contrast = Callable[[str, random.Random], list[tuple[str, str]]]
SAMPLED = "sampled.json"  # the answers, until they are ranked


@stage_config
class Config(ReadsRows):
    """Sample answers and collect rankings of them."""

    parent: InputPath
    """The SFT model that answers."""
    train_data: RowsPath
    """Prompts: rows with `prompt`, or SFT rows, whose answer then serves as reference."""
    output_dir: OutputDir
    """Where comparisons.jsonl and eval.jsonl go."""
    labeller: str | None = None
    """module:function that ranks answers; null = the reference answer wins over the samples."""
    contrast: str | None = None
    """module:function (prompt, rng) -> [(kind, answer)]: further answers ranked beside the
    samples."""
    pairs: list[RowsPath] = []
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


def hook(name: str | None) -> Callable[..., Any] | None:
    """The function that "module:function" names: how a recipe brings its own code without any stage
    importing it."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (Exception, SystemExit) as error:  # whatever the code of others does
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: cannot be loaded as module:function ({told})") from None
    if not callable(found):
        raise InputError(f"{name}: is not a function but {str(found)[:60]!r}")
    return found


class Hooks(NamedTuple):
    """The recipe's own functions, where it names any."""

    labeller: Labeller | None
    contrast: Contrast | None


class Prompt(NamedTuple):
    """A prompt that is to be answered."""

    messages: list[Message]
    ids: list[int]  # up to where the answer begins
    reference: str | None  # the row's own answer, where one is needed


class Entry(NamedTuple):
    """One answer to a prompt, before it is ranked."""

    text: str
    source: str  # policy (a sample), reference, or what `contrast` calls it
    stopped: bool  # whether its end token came


def parse(tokenizer: Tokenizer, needs_answer: bool, row: dict[str, Any]) -> Prompt:
    """The prompt of a row. Raises InputError where there is none, or no answer that is needed."""
    messages = rows_to_prompt(row)
    ids = prompt_ids(tokenizer, messages)
    if not needs_answer:
        return Prompt(messages, ids, None)
    try:
        return Prompt(messages, ids, rows_to_messages(row)[-1]["content"])
    except InputError as error:
        raise InputError(
            f"without a labeller each prompt needs its answer: {error}", error.reason
        ) from None


def kept_or_sampled(
    cfg: Config, folder: Path, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[list[Entry]]:
    """For each prompt answers_per_prompt answers of the SFT model. They are kept in `folder`, for
    the same command after a labeller that failed."""
    keys = (cfg.answers_per_prompt, cfg.temperature, cfg.max_new_tokens, cfg.batch_size, cfg.seed)
    key = fingerprint([content_of_model(cfg.parent), *keys, [prompt.ids for prompt in prompts]])
    file = folder / SAMPLED
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            print(f"collect: the answers are those of {file}")
            return [[Entry(*entry) for entry in entries] for entries in kept["answers"]]
    answers = list(sampled(cfg, tokenizer, prompts))
    write_atomically(file, dump({"key": key, "answers": answers}))
    return answers


def sampled(cfg: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Iterator[list[Entry]]:
    """For each prompt answers_per_prompt answers of the SFT model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, each = load_model(cfg.parent, "lm").to(device), cfg.answers_per_prompt
    repeated = [prompt.ids for prompt in prompts for _ in range(each)]
    words = {"unit": "answer", "desc": "collect", "mininterval": 1, "disable": None}
    with tqdm(total=len(repeated), **words) as bar:
        answers = sample(
            model,
            repeated,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seed=cfg.seed,
            stop_ids=[tokenizer.eot_id],
            batch_size=cfg.batch_size,
            progress=bar.update,
        )
    for start in range(0, len(answers), each):
        mine = answers[start : start + each]
        yield [Entry(tokenizer.decode(one.ids), "policy", one.stopped) for one in mine]


def rank_answers(
    cfg: Config, hooks: Hooks, prompt: Prompt, samples: list[Entry], rng: random.Random
) -> dict[str, Any]:
    """A row of comparisons.jsonl: the samples, with what `contrast` adds, ranked by the labeller;
    without a labeller the reference comes first, and wins over all others.

    Raises InputError when a labeller fails, or does not rank every answer.
    """
    entries, text = samples, prompt.messages[-1]["content"]
    if hooks.contrast:
        more = asked(f"contrast {cfg.contrast}", hooks.contrast, text, rng)
        if not isinstance(more, list) or not all(map(is_contrast, more)):
            told = f"a list of (kind, answer) is needed, not {reprlib.repr(more)}"
            raise InputError(f"contrast {cfg.contrast}, prompt {text[:60]!r}: {told}")
        entries = [*entries, *(Entry(answer, kind, True) for kind, answer in more)]
    if hooks.labeller:
        who = f"labeller {cfg.labeller}"
        given = asked(who, hooks.labeller, text, [entry.text for entry in entries], rng)
        try:
            ranks = check_ranks(given)
        except InputError as error:
            raise InputError(f"{who}, prompt {text[:60]!r}: {error}") from None
        if len(ranks) != len(entries):
            number = f"{len(ranks)} ranks for {len(entries)} answers"
            raise InputError(f"{who}, prompt {text[:60]!r}: {number}")
    else:
        entries = [Entry(prompt.reference or "", "reference", True), *entries]
        ranks = [0, *[1] * (len(entries) - 1)]
    return {
        "prompt": prompt.messages,
        "answers": [entry.text for entry in entries],
        "ranks": ranks,
        "sources": [entry.source for entry in entries],
        "stopped": [entry.stopped for entry in entries],
    }


def asked(who: str, hook: Callable[..., Any], text: str, *more: Any) -> Any:
    """What a recipe's own function says to a prompt. Raises InputError, with the place, for its
    errors."""
    try:
        return hook(text, *more)
    except (InputError, Failure):
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {frame.filename}:{frame.lineno}"
        raise InputError(f"{who}, prompt {text[:60]!r}: {error} ({place})") from error


def is_contrast(one: Any) -> bool:
    """Whether it is a pair of texts."""
    return isinstance(one, list | tuple) and len(one) == 2 and all(isinstance(t, str) for t in one)


def question(row: dict[str, Any]) -> str:
    """What identifies the prompt of a comparison."""
    return str(comparison_prompt(row)[-1]["content"])


def held_out(cfg: Config, sampled: list[dict], people: list[dict], rng: random.Random) -> set[str]:
    """Shuffles both lists in place; returns the questions that are held out.

    Held out by prompt, from both lists alike: no prompt lies on both sides, and people's few pairs
    are not lost. Raises InputError when nothing is left to train on.
    """
    held: set[str] = set()
    for part in (sampled, people):
        rng.shuffle(part)
        questions = list(dict.fromkeys(map(question, part)))
        held |= set(questions[: max(1, round(len(questions) * cfg.eval_fraction))])
    if all(question(row) in held for row in sampled + people):
        raise InputError(
            f"{cfg.train_data}: all {len(sampled) + len(people)} comparisons share the held-out "
            "prompts; give more prompts"
        )
    return held


def gate_of(metrics: dict[str, int], comparisons: Sequence[dict], held: int) -> Gate:
    """What was collected, in one line; `held`: how many prompts are held out."""
    flags = [zip(row["stopped"], row["sources"], strict=True) for row in comparisons]
    ends = [stopped for row in flags for stopped, source in row if source == "policy"]
    complete = sum(ends) / max(1, len(ends))
    text = (
        f"{metrics['answers']:,} answers to {metrics['prompts']:,} prompts ranked, "
        f"{len(ends):,} of them sampled ({complete:.0%} complete); "
        f"{metrics['pairs']} pairs from people; {held} prompts held out; "
        f"{metrics['too_long']} prompts too long"
    )
    return Gate(True, text)


def main(cfg: Config) -> None:
    """Read prompts and people's pairs, sample answers, have them ranked, hold some out, write."""
    started = time.perf_counter()
    folder = claim(cfg, "collect", ("comparisons.jsonl", "eval.jsonl", SAMPLED))
    length, key = cfg.max_prompt_length + cfg.max_new_tokens, "max_prompt_length + max_new_tokens"
    check_context(cfg.parent, "lm", length, key)
    tokenizer, bad = load_tokenizer(cfg.parent), BadRows(cfg.on_bad_row)
    rows = read_rows(cfg.train_data, partial(parse, tokenizer, cfg.labeller is None), bad)
    rows = rows[: cfg.max_prompts]
    # Before the sampling, so that a bad row costs no minutes.
    pairs = [read_rows(source, partial(ranked, tokenizer), bad) for source in cfg.pairs]
    people = [row.data for part in pairs for row in part]
    hooks = Hooks(hook(cfg.labeller), hook(cfg.contrast))
    prompts = [row.parsed for row in rows if len(row.parsed.ids) <= cfg.max_prompt_length]
    if not prompts and not people:
        raise InputError(
            f"{cfg.train_data}: all {len(rows)} prompts are longer than "
            f"max_prompt_length {cfg.max_prompt_length}"
        )
    rng = random.Random(cfg.seed)
    answers = kept_or_sampled(cfg, folder, tokenizer, prompts)
    comparisons = [
        rank_answers(cfg, hooks, prompt, samples, rng)
        for prompt, samples in zip(prompts, answers, strict=True)
    ]
    held = held_out(cfg, comparisons, people, rng)
    both = comparisons + people
    files = {
        "eval.jsonl": [row for row in both if question(row) in held],
        "comparisons.jsonl": [row for row in both if question(row) not in held],
    }
    metrics = {
        "answers": sum(len(row["answers"]) for row in comparisons),
        "prompts": len(comparisons),
        "pairs": len(people),
        "too_long": len(rows) - len(prompts),
    }
    gate = gate_of(metrics, comparisons, len(held))
    print(gate.line("collect"))
    facts = {"kind": "comparisons", **lineage(cfg.parent), "metrics": metrics}
    seconds = time.perf_counter() - started
    report = stage_report("collect", cfg, gate, seconds, **facts, data={"skipped": bad.counts})
    publish_rows(folder, files, report)
    (folder / SAMPLED).unlink()


if __name__ == "__main__":
    interrupt_with("collect; the same command begins again, with the answers if all were sampled")
    cli(Config, main)
