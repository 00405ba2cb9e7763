"""Base and assistants side by side: the same prompts, the same seeds.

    python -m tools.compare runs/demo/pretrain runs/demo/sft runs/demo/rl --prompt "Who is Ada?"
    python -m tools.compare runs/demo/sft runs/demo/rl --prompts FILE --html page.html
    python -m tools.compare runs/demo/rl --prompt TEXT      one model: plain sampling
    python -m tools.compare runs/demo/rl --chat             talk with it

Words that are no options are model directories. --json prints everything as JSON. With --output_dir
it writes a report, greedy answers beside sampled ones, and, where a ground truth is named, whether
each stage has kept its promise (gate).
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console

from common.config.schema import InputPath, OutputDir, RowsPath, cli, stage_config
from common.config.training import Seed
from common.handoff.locate import lineage, load_tokenizer
from common.handoff.ownership import claim
from common.handoff.publish import load_config, load_model
from common.handoff.report import stage_report, write_stage_report
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.program.terminal import print_json, printable
from common.text.chat import Message, prompt_ids
from tools.compare import report
from tools.compare.afterwards import COMMAND, about, lines
from tools.compare.changes import changes_of
from tools.compare.checks import Bars, check_comparison, verdict
from tools.compare.findings import measure, questions, samples_of
from tools.compare.measure import read_prompts
from tools.compare.modes import modes
from tools.compare.pictures import draw_all
from tools.compare.terminal import chat, show
from tools.names import names_of
from tools.page import is_page

# The files of a report.
WRITTEN = ("compare.json", "compare.html", "compare-families*.png", "compare-best-of-n*.png")


@stage_config
class Config:
    """Compare models, sample from one, or talk with it."""

    models: list[InputPath] = []
    """Model directories or Hub ids (also without --models), in the order base, sft, rl."""
    prompt: str | None = None
    """A prompt."""
    prompts: RowsPath | None = None
    """A file of prompts: rows with `prompt` or `messages` (.jsonl, .json, .parquet), or a .txt
    file, one a line."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Use only so many of the prompts."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 = greedy."""
    answers_per_prompt: Annotated[int, Field(gt=0)] = 1
    """Answers sampled to each prompt; all count, the first is shown."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among so many likeliest tokens; 0 = off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that make up this mass; 1 = off."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 96
    """Longest answer."""
    seed: Seed = 0
    """Seed of sampling; every prompt has a stream of its own, the same for all models."""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Answers sampled at once."""
    reward: InputPath | None = None
    """Directory of a reward model that scores the answers."""
    reference: InputPath | None = None
    """Directory of the model that KL is measured from."""
    gold: str | None = None
    """Module with judge(prompt, answer, stopped), the ground truth, e.g. data.demo.gold."""
    comparisons: RowsPath | None = None
    """Rows of answers to held-out prompts, on which the reward model's accuracy against gold is
    measured. With best_of: rows of its prompts, and the reference's own answers to each beside
    them."""
    best_of: Annotated[int, Field(ge=0)] = 0
    """Also report the best of 1, 2, 4 .. best_of answers of the reference, by reward; 0 = off."""
    best_of_prompts: Annotated[int, Field(gt=0)] = 200
    """Prompts used for that."""
    shown: Annotated[int, Field(gt=0)] | None = None
    """Prompts whose answers are kept in page and JSON, families in turn; null = all."""
    checks: Bars | None = None
    """What gold must say of base, sft and rl, a mapping; null = no such checks."""
    json: bool = False
    """Print JSON and nothing else."""
    html: str | None = None
    """Write a self-contained page there."""
    chat: bool = False
    """Talk with the one model named."""
    output_dir: OutputDir | None = None
    """Write a report there: compare.json, compare.html, stage.json, plots."""


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line with model directories gathered under --models, and `--json`, `--chat`
    completed to `=true`."""
    models: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            models.append(word)
        elif word in ("--json", "--chat"):
            value = words.pop(0) if words and words[0] in ("true", "false") else "true"
            rest.append(f"{word}={value}")
        elif word == "--models":
            while words and not words[0].startswith("--"):
                models.append(words.pop(0))
        else:
            rest.append(word)
            alone = "=" in word or word in ("--help", "-h")  # such a word takes no value
            if not alone and words and not words[0].startswith("--"):
                rest.append(words.pop(0))
    return [*rest, *(["--models", *models] if models else [])]


def prompts_of(cfg: Config) -> list[list[Message]]:
    """The prompts as messages. Raises InputError unless exactly one of --prompt and --prompts is
    there."""
    if cfg.prompts is not None and cfg.prompt is None:
        return read_prompts(cfg.prompts, cfg.limit)
    if cfg.prompt is not None and cfg.prompts is None:
        return [[{"role": "user", "content": cfg.prompt}]]
    raise InputError(
        "give either --prompt TEXT or --prompts FILE (or --chat to talk with one model)"
    )


def check(cfg: Config) -> None:
    """Raise InputError for keys that do not go together."""
    if not cfg.models:
        example = f"{COMMAND} runs/demo/sft runs/demo/rl --prompt TEXT"
        raise InputError(f"name one or more model directories: {example}")
    if cfg.html is not None:
        check_html(cfg.html)
    if cfg.chat and len(cfg.models) > 1:
        named = ", ".join(cfg.models)
        raise InputError(f"--chat takes one model, these are {len(cfg.models)}: {named}")
    if cfg.best_of and not (cfg.reward and cfg.reference):
        raise InputError("best_of needs reward (which chooses) and reference (which answers)")
    if cfg.comparisons and not (cfg.reward and cfg.gold):
        raise InputError("comparisons need reward and gold, whose orders are compared")


def check_html(html: str) -> None:
    """Raise InputError where a page cannot be written, or would replace a file that is no page."""
    file = Path(html)
    if not html or file.is_dir() or html.startswith("~"):
        raise InputError(f"html = {html!r} is refused: name a file in full, such as page.html")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise InputError(f"html = {html!r} is refused: {above} cannot be written to")
    if not above.is_dir():
        raise InputError(f"html = {html!r} is refused: {above} is a file; name a directory")
    if file.exists() and not (file.is_file() and is_page(file)):
        raise InputError(f"html = {html!r} is refused: it is there and no page; name another file")


def shared_budget(cfg: Config, prompts: Sequence[Sequence[Message]]) -> int:
    """max_new_tokens, or less where some model's context leaves less room: answers of all models
    may be equally long."""
    rooms = []
    for path in dict.fromkeys(filter(None, [*cfg.models, cfg.reward, cfg.reference])):
        tokenizer = load_tokenizer(path)
        longest = max(len(prompt_ids(tokenizer, messages)) for messages in prompts)
        context = load_config(path).max_length
        if longest >= context:
            raise InputError(
                f"a prompt has {longest} tokens, the context of {path} is {context}: leave it out"
            )
        rooms.append(context - longest)
    if min(rooms) < cfg.max_new_tokens:
        change = f"max_new_tokens {cfg.max_new_tokens} -> {min(rooms)}"
        print(f"{change}: the models' contexts end there", file=sys.stderr)
    return min(cfg.max_new_tokens, *rooms)


def talk(cfg: Config, device: torch.device) -> None:
    """Chat with the one model named. InputError where it was never taught to talk."""
    path = cfg.models[0]
    tokenizer, model = load_tokenizer(path), load_model(path, "lm").to(device)
    if not tokenizer.chat:
        raise InputError(
            f"{path}: has no chat template, it was never taught to talk; give an sft or rl model"
        )
    chat(
        model,
        tokenizer,
        about=about(path),
        max_new_tokens=cfg.max_new_tokens,
        seed=cfg.seed,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
    )


def write_report(
    cfg: Config, folder: Path, result: dict[str, Any], names: Sequence[str], started: float
) -> None:
    """Write the page with its plots, compare.json and stage.json, and print the gate line."""
    gate = verdict(result, names)
    write_atomically(folder / "compare.json", dump(result))  # refuses what is not finite
    print(gate.line("compare"), file=sys.stderr if cfg.json else sys.stdout)
    pictures = draw_all(result, folder)
    write_atomically(folder / "compare.html", report.comparison(result, pictures, folder).encode())
    facts = {
        "kind": "report",
        "parents": {name: lineage(path) for name, path in zip(names, cfg.models, strict=True)},
        "metrics": {mode: headline(result[mode]) for mode in modes(result)},
    }
    seconds = time.perf_counter() - started
    write_stage_report(folder, stage_report("compare", cfg, gate, seconds, **facts))


def headline(figures: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Mean gold of each model, or mean reward where there is no gold."""
    return {
        name: (row.get("gold") or row.get("reward") or {}).get("mean")
        for name, row in figures.items()
    }


def main(cfg: Config) -> None:
    """Compare: ask every model, judge the answers, show them, write the report."""
    started = time.perf_counter()
    check(cfg)
    if cfg.output_dir:
        claim(cfg, "compare", WRITTEN)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.chat:
        talk(cfg, device)
        return
    names, prompts = names_of(cfg.models, "models"), prompts_of(cfg)
    asked = questions(cfg, prompts, shared_budget(cfg, prompts))
    findings = measure(cfg, asked, names, device)
    samples = samples_of(findings, prompts)
    result = findings.result | {"samples": samples[: cfg.shown], "about": about(cfg.models[-1])}
    result["changes"] = changes_of(result, names)
    result["checks"] = check_comparison(result, names, cfg.checks)
    if cfg.html:
        file = Path(cfg.html)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report.comparison(result, {}, file.parent), encoding="utf-8")
    if cfg.json:
        print_json(result)
    else:
        families = len(set(findings.kinds or []))
        show(Console(highlight=False), result, max(3, families) if cfg.output_dir else 20)
    if cfg.output_dir:
        write_report(cfg, Path(cfg.output_dir), result, names, started)
    if cfg.output_dir and not cfg.json:
        file, talks = Path(cfg.output_dir, "compare.html"), load_tokenizer(cfg.models[-1]).chat
        print(*map(printable, lines(result, samples, file, bool(talks))), sep="\n")


if __name__ == "__main__":
    cli(Config, main, arguments(sys.argv[1:]))
