"""Base and assistants side by side: the same prompts, the same seeds.

    python -m tools.compare runs/demo/pretrain runs/demo/sft runs/demo/rl --prompt "Where do the otter and the owl live?"
    python -m tools.compare runs/demo/sft runs/demo/rl --prompts FILE --temperature 0 --reward runs/demo/reward --html page.html
    python -m tools.compare runs/demo/rl --prompt TEXT      one model: plain sampling
    python -m tools.compare runs/demo/rl --chat             talk with it

Words that are no options are model directories. --json prints everything as JSON. With --output_dir
it writes a report, greedy answers beside sampled ones, and, where a ground truth is named, whether
each stage has kept its promise (gate).
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from rich.console import Console
from tqdm import tqdm

from common.config.schema import OutputDir, cli, stage_config, to_dict
from common.handoff.locate import lineage, load_tokenizer, read_stage
from common.handoff.publish import load_config, load_model
from common.handoff.report import provenance
from common.program.errors import InputError
from common.program.files import dump, write_atomically
from common.rows.sources import read_rows
from common.text.chat import Message, prompt_ids
from tools import page
from tools.compare import pictures as plots
from tools.compare import report
from tools.compare.checks import checks, verdict
from tools.compare.measure import (
    Answer,
    answer_prompts,
    best_of_table,
    families,
    load_judges,
    read_prompts,
    summarise,
)
from tools.compare.modes import modes
from tools.compare.reward_accuracy import beside, reward_accuracy
from tools.compare.terminal import chat, show_figures, show_samples


@stage_config
class Config:
    """Compare models, sample from one, or talk with it."""

    models: list[str] = []
    """Model directories or Hub ids (also without --models), in the order base, sft, rl."""
    prompt: str | None = None
    """A prompt."""
    prompts: str | None = None
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
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling; every prompt has a stream of its own, the same for all models."""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Answers sampled at once."""
    reward: str | None = None
    """Directory of a reward model that scores the answers."""
    reference: str | None = None
    """Directory of the model that KL is measured from."""
    gold: str | None = None
    """Module with judge(prompt, answer, stopped), the ground truth, e.g. data.demo.gold."""
    comparisons: str | None = None
    """Rows of answers to held-out prompts, on which the reward model's accuracy against gold is
    measured. With best_of: rows of its prompts, and the reference's own answers to each beside
    them."""
    best_of: Annotated[int, Field(ge=0)] = 0
    """Also report the best of 1, 2, 4 .. best_of answers of the reference, by reward; 0 = off."""
    best_of_prompts: Annotated[int, Field(gt=0)] = 200
    """Prompts used for that."""
    shown: Annotated[int, Field(gt=0)] | None = None
    """Prompts whose answers are kept in page and JSON, families in turn; null = all."""
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
            if (
                "=" not in word
                and word not in ("--help", "-h")
                and words
                and not words[0].startswith("--")
            ):
                rest.append(words.pop(0))
    return [*rest, *(["--models", *models] if models else [])]


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name for each directory: its last part, or as many parts as tell it from the
    others."""
    parts = [Path(path).parts if Path(path).name else Path(path).resolve().parts for path in paths]
    if len({tuple(part) for part in parts}) < len(parts):
        raise InputError(f"models: {', '.join(paths)}: one is named twice")
    size = 1
    while len({part[-size:] for part in parts}) < len(parts):
        size += 1
    return ["/".join(part[-size:]) for part in parts]


def prompts_of(cfg: Config) -> list[list[Message]]:
    """The prompts as messages. Raises InputError unless exactly one of --prompt and --prompts is
    there."""
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise InputError(
            "give either --prompt TEXT or --prompts FILE (or --chat to talk with one model)"
        )
    if cfg.prompts is not None:
        return read_prompts(cfg.prompts, cfg.limit)
    return [[{"role": "user", "content": cfg.prompt}]]


def check(cfg: Config) -> None:
    """Raise InputError for keys that do not go together."""
    if not cfg.models:
        raise InputError(
            "name one or more model directories: python -m tools.compare runs/demo/sft runs/demo/rl --prompt TEXT"
        )
    if cfg.chat and len(cfg.models) > 1:
        raise InputError(
            f"--chat takes one model, these are {len(cfg.models)}: {', '.join(cfg.models)}"
        )
    if cfg.best_of and not (cfg.reward and cfg.reference):
        raise InputError("best_of needs reward (which chooses) and reference (which answers)")
    if cfg.comparisons and not (cfg.reward and cfg.gold):
        raise InputError("comparisons need reward and gold, whose orders are compared")


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
        print(
            f"max_new_tokens {cfg.max_new_tokens} -> {min(rooms)}: the models' contexts end there",
            file=sys.stderr,
        )
    return min(cfg.max_new_tokens, *rooms)


class Findings(NamedTuple):
    answers: dict[str, dict[str, list[Answer]]]  # mode: model: answers, one prompt behind the other
    kinds: list[str] | None  # family of each prompt
    result: dict[str, Any]  # what compare.json holds, less samples and checks


def measure(
    cfg: Config, prompts: Sequence[list[Message]], names: Sequence[str], device: torch.device
) -> Findings:
    """Let every model answer every prompt, and judge the answers."""
    judges = load_judges(cfg.reward, cfg.reference, cfg.gold, device)
    kinds = families(judges.gold, prompts) if judges.gold else None
    rows = read_rows(cfg.comparisons) if cfg.comparisons else []
    modes = {"greedy": 0.0} if cfg.temperature == 0 else {"sampled": cfg.temperature}
    modes |= {"greedy": 0.0} if cfg.output_dir else {}
    options = {
        "max_new_tokens": shared_budget(cfg, prompts),
        "seed": cfg.seed,
        "batch_size": cfg.batch_size,
    }
    few = prompts[: cfg.best_of_prompts] if cfg.best_of else []
    asked = {
        mode: [m for m in prompts for _ in range(cfg.answers_per_prompt if t else 1)]
        for mode, t in modes.items()
    }
    total = sum(map(len, asked.values())) * len(names) + len(few) * cfg.best_of
    answers: dict[str, dict[str, list[Answer]]] = {mode: {} for mode in modes}
    result: dict[str, Any] = {
        "models": {},
        "reference": cfg.reference,
        "reward": cfg.reward,
        "gold": cfg.gold,
    }
    result |= {"prompts": len(prompts)} | {
        key: getattr(cfg, key) for key in ("answers_per_prompt", "temperature", "seed")
    }
    with tqdm(
        total=total,
        unit="answer",
        disable=total < 32 or not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:
        for name, path in zip(names, cfg.models, strict=True):
            bar.set_description(name, refresh=False)
            model, tokenizer = load_model(path, "lm").to(device), load_tokenizer(path)
            same = (
                cfg.reference is not None and Path(path).resolve() == Path(cfg.reference).resolve()
            )
            for mode, temperature in modes.items():
                cut = {"top_k": cfg.top_k, "top_p": cfg.top_p} if temperature else {}
                answers[mode][name] = answer_prompts(
                    model,
                    tokenizer,
                    asked[mode],
                    judges,
                    is_reference=same,
                    temperature=temperature,
                    progress=bar.update,
                    **cut,
                    **options,
                )
            stage = read_stage(path)
            facts = {
                key: stage.get(key)
                for key in ("stage", "step", "parent", "commit", "dirty", "wall_time")
            }
            result["models"][name] = {"path": path, **facts}
        for mode, found in answers.items():
            each = len(asked[mode]) // len(prompts)
            result[mode] = {name: summarise(rows, kinds, each) for name, rows in found.items()}
        if cfg.best_of:
            bar.set_description(f"best of {cfg.best_of}", refresh=False)
            # At temperature 1: what the formula of its KL holds for.
            many = [messages for messages in few for _ in range(cfg.best_of)]
            drawn = answer_prompts(
                *judges.reference, many, judges, is_reference=True, progress=bar.update, **options
            )
            result |= {"best_of_n": best_of_table(drawn, cfg.best_of), "best_of_prompts": len(few)}
    if cfg.comparisons:
        rows = beside(rows, few, drawn) if cfg.best_of else rows
        result["reward_model"] = reward_accuracy(judges.reward, judges.gold, rows)
    return Findings(answers, kinds, result)


def samples_of(
    findings: Findings, prompts: Sequence[list[Message]], count: int | None
) -> list[dict[str, Any]]:
    """Rows for JSON, page and terminal: families in turn, so that the first rows show one prompt of
    each."""
    order = list(range(len(prompts)))
    if findings.kinds:
        order.sort(key=lambda i: (findings.kinds[:i].count(findings.kinds[i]), findings.kinds[i]))
    rows = []
    for i in order[:count]:
        turns = prompts[i]
        text = (
            turns[0]["content"]
            if len(turns) == 1
            else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        )
        row: dict[str, Any] = {"prompt": text, "answers": {}}
        row |= {"family": findings.kinds[i]} if findings.kinds else {}
        for mode, models in findings.answers.items():
            for name, answers in models.items():
                a = answers[i * (len(answers) // len(prompts))]
                known = {"gold": a.gold, "correct": a.correct, "reward": a.reward, "kl": a.kl}
                kept = {
                    key: round(v, 4) if isinstance(v, float) else v
                    for key, v in known.items()
                    if v is not None
                }
                row["answers"].setdefault(name, {})[mode] = {
                    "text": a.text,
                    "stopped": a.stopped,
                    **kept,
                }
        rows.append(row)
    return rows


def write_report(cfg: Config, result: dict[str, Any], names: Sequence[str], started: float) -> None:
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if cfg.gold:
        file = folder / "compare-families.png"
        plots.plot_families(result, file)
        pictures.append(page.Picture(file, "Correct answers by family"))
    if cfg.best_of:
        file = folder / "compare-best-of-n.png"
        plots.plot_best_of(result, file)
        text = "Gold and reward against the distance from the reference"
        pictures.append(page.Picture(file, text))
    passed, text = verdict(result, names)
    print(
        f"gate compare: {'PASS' if passed else 'FAIL'}  {text}",
        file=sys.stderr if cfg.json else sys.stdout,
    )
    write_atomically(folder / "compare.json", dump(result))
    write_atomically(folder / "compare.html", report.comparison(result, pictures).encode())
    stage = {
        "stage": "compare",
        "kind": "report",
        "parents": {name: lineage(path) for name, path in zip(names, cfg.models, strict=True)},
        "config": to_dict(cfg),
        "seed": cfg.seed,
        "gate": {"passed": passed, "text": text},
        "metrics": {
            mode: {
                n: (row.get("gold") or row.get("reward") or {}).get("mean")
                for n, row in result[mode].items()
            }
            for mode in modes(result)
        },
        "wall_time": round(time.perf_counter() - started, 2),
        **provenance(),
    }
    write_atomically(folder / "stage.json", dump(stage))


def main(cfg: Config) -> None:
    started = time.perf_counter()
    check(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.chat:
        tokenizer, model = load_tokenizer(cfg.models[0]), load_model(cfg.models[0], "lm").to(device)
        if not tokenizer.chat:
            raise InputError(
                f"{cfg.models[0]}: has no chat template, it was never taught to talk; give an sft or rl model"
            )
        chat(
            model,
            tokenizer,
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
        )
        return
    names, prompts = names_of(cfg.models), prompts_of(cfg)
    findings = measure(cfg, prompts, names, device)
    result = findings.result
    result["samples"] = samples_of(findings, prompts, cfg.shown)
    result["checks"] = checks(result, names)
    if cfg.html:
        Path(cfg.html).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.html).write_text(report.comparison(result, []), encoding="utf-8")
    if cfg.json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        mode = modes(result)[0]
        count = max(3, len(set(findings.kinds or []))) if cfg.output_dir else 20
        show_samples(console, result["samples"][:count], mode)
        if len(prompts) > count:
            console.print(
                f"{count} of {len(prompts)} prompts shown; more in --html FILE and --json",
                style="dim",
            )
        if len(prompts) > 1 or len(names) > 1:
            for mode in modes(result):
                show_figures(console, result[mode], mode)
    if cfg.output_dir:
        write_report(cfg, result, names, started)


if __name__ == "__main__":
    cli(Config, main, arguments(sys.argv[1:]))
