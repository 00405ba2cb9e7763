"""Every model answers every prompt, and the judges say what they think of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.handoff.locate import load_tokenizer, read_stage
from common.handoff.publish import load_model
from common.rows.sources import read_rows
from common.text.chat import Message
from tools.compare.measure import (
    Answer,
    Judges,
    answer_prompts,
    best_of_table,
    families,
    load_judges,
    noted,
)
from tools.compare.numbers import known, summarise
from tools.compare.progress import Progress
from tools.compare.reward_accuracy import beside, reward_accuracy

Prompts = Sequence[list[Message]]


class Questions(NamedTuple):
    """What the models are asked, and how they answer."""

    prompts: Prompts
    modes: dict[str, float]  # mode: temperature
    each: int  # answers to a prompt, where they are sampled
    cut: dict[str, Any]  # top_k and top_p, where they are sampled
    best_of: int  # answers of the reference to each of `few` prompts
    few: Prompts
    options: dict[str, Any]  # of sampling, in every mode

    def repeats(self, mode: str) -> int:
        """Answers to each prompt: greedy ones would all be the same."""
        return self.each if self.modes[mode] else 1

    def total(self, models: int) -> int:
        """Answers that all models together give."""
        repeats = sum(self.repeats(mode) for mode in self.modes)
        return repeats * len(self.prompts) * models + len(self.few) * self.best_of


class Findings(NamedTuple):
    """All answers, and the figures made of them."""

    answers: dict[str, dict[str, list[Answer]]]  # mode: model: answers, one prompt behind the other
    kinds: list[str] | None  # family of each prompt
    result: dict[str, Any]  # what compare.json holds, less samples and checks


def questions(cfg: Any, prompts: Prompts, budget: int) -> Questions:
    """What a config of compare asks: sampled answers, and greedy ones too in a report. `budget`:
    most tokens of an answer."""
    modes = {"greedy": 0.0} if cfg.temperature == 0 else {"sampled": cfg.temperature}
    modes |= {"greedy": 0.0} if cfg.output_dir else {}
    return Questions(
        prompts,
        modes,
        each=cfg.answers_per_prompt,
        cut={"top_k": cfg.top_k, "top_p": cfg.top_p},
        best_of=cfg.best_of,
        few=prompts[: cfg.best_of_prompts] if cfg.best_of else [],
        options={"max_new_tokens": budget, "seed": cfg.seed, "batch_size": cfg.batch_size},
    )


def measure(cfg: Any, asked: Questions, names: Sequence[str], device: torch.device) -> Findings:
    """Let every model answer every prompt, and judge the answers. `cfg`: a config of compare."""
    judges = load_judges(cfg.reward, cfg.reference, cfg.gold, device)
    kinds = families(judges.gold, asked.prompts) if judges.gold else None
    exam = read_rows(cfg.comparisons) if cfg.comparisons else []  # refused before the work
    result: dict[str, Any] = {"models": {}}
    result |= {key: getattr(cfg, key) for key in ("reference", "reward", "gold")}
    result["prompts"] = len(asked.prompts)
    result |= {key: getattr(cfg, key) for key in ("answers_per_prompt", "temperature", "seed")}
    answers: dict[str, dict[str, list[Answer]]] = {mode: {} for mode in asked.modes}
    with Progress(asked.total(len(names))) as progress:
        for name, path in zip(names, cfg.models, strict=True):
            progress.begin(name)
            same = cfg.reference is not None and same_place(path, cfg.reference)
            for mode, found in answers_of(path, asked, judges, same, progress, device).items():
                answers[mode][name] = found
            result["models"][name] = facts(path)
        for mode, models in answers.items():
            each = asked.repeats(mode)
            result[mode] = {name: summarise(own, kinds, each) for name, own in models.items()}
        drawn = best_answers(asked, judges, progress) if asked.best_of else []
    if drawn:
        table = best_of_table(drawn, asked.best_of)
        result |= {"best_of_n": table, "best_of_prompts": len(asked.few)}
    if cfg.comparisons:
        assert judges.reward and judges.gold  # comparisons need both
        exam = beside(exam, asked.few, drawn) if drawn else exam
        result["reward_model"] = reward_accuracy(judges.reward, judges.gold, exam)
    return Findings(answers, kinds, result)


def same_place(path: str, other: str) -> bool:
    """Whether two paths name one directory."""
    return Path(path).resolve() == Path(other).resolve()


def answers_of(
    path: str,
    asked: Questions,
    judges: Judges,
    is_reference: bool,
    progress: Progress,
    device: torch.device,
) -> dict[str, list[Answer]]:
    """{mode: answers} of the model in a directory."""
    model, tokenizer = load_model(path, "lm").to(device), load_tokenizer(path)
    found = {}
    for mode, temperature in asked.modes.items():
        found[mode] = answer_prompts(
            model,
            tokenizer,
            repeated(asked.prompts, asked.repeats(mode)),
            judges,
            is_reference=is_reference,
            temperature=temperature,
            progress=progress.update,
            **(asked.cut if temperature else {}),
            **asked.options,
        )
    return found


def best_answers(asked: Questions, judges: Judges, progress: Progress) -> list[Answer]:
    """The answers among which best-of-n chooses: the reference's, at temperature 1, which is what
    the formula of its KL holds for."""
    assert judges.reference  # best_of needs it
    model, tokenizer = judges.reference
    progress.begin(f"best of {asked.best_of}")
    return answer_prompts(
        model,
        tokenizer,
        repeated(asked.few, asked.best_of),
        judges,
        is_reference=True,
        progress=progress.update,
        **asked.options,
    )


def repeated(prompts: Prompts, each: int) -> list[list[Message]]:
    """Every prompt `each` times, one behind the other."""
    return [messages for messages in prompts for _ in range(each)]


def facts(path: str) -> dict[str, Any]:
    """What a model's stage.json says of it."""
    stage = read_stage(path)
    keys = ("stage", "step", "parent", "commit", "dirty", "wall_time")
    return {"path": path, **{key: noted(stage.get(key)) for key in keys}}


def samples_of(findings: Findings, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows for JSON, page and terminal: families in turn, so that the first rows show one prompt of
    each."""
    order, kinds = list(range(len(prompts))), findings.kinds
    if kinds:
        order.sort(key=lambda i: (kinds[:i].count(kinds[i]), kinds[i]))
    rows = []
    for i in order:
        row: dict[str, Any] = {"prompt": as_text(prompts[i]), "answers": {}}
        row |= {"family": kinds[i]} if kinds else {}
        for mode, models in findings.answers.items():
            for name, answers in models.items():
                answer = answers[i * (len(answers) // len(prompts))]  # the first of this prompt
                said = {"text": answer.text, **known(answer)}
                row["answers"].setdefault(name, {})[mode] = said
        rows.append(row)
    return rows


def as_text(messages: Sequence[Message]) -> str:
    """A prompt as one text: the question, or the conversation before it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
