"""A bad config or a bad file meets the real program: a stage's main behind its command line, in
this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import pipeline
from common.config.schema import cli
from common.program.entry import guard
from stages.pretrain import prepare
from stages.pretrain import train as pretrain
from stages.reward import collect
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft

STAGES = {
    "prepare": prepare,
    "pretrain": pretrain,
    "sft": sft,
    "collect": collect,
    "reward": reward,
    "rl": rl,
}
QUESTIONS = ["Name an animal.", "Where is the bird?", "What is two plus three?", "Say it."]
ROWS = {
    "prepare": [
        f'{{"text": "The red fox and the blue bird went to the old town. {n}"}}' for n in range(4)
    ],
    "sft": [f'{{"prompt": "{question}", "completion": "Five."}}' for question in QUESTIONS],
    "reward": [
        f'{{"prompt": "{question}", "chosen": "Five.", "rejected": "No."}}'
        for question in QUESTIONS
    ],
    "rl": [f'{{"prompt": "{question}"}}' for question in QUESTIONS],
}
ROWS["collect"] = ROWS["sft"]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def always_fresh(fresh_accelerate):
    """Every test of this folder may run a stage in this process."""


@pytest.fixture
def program(capsys) -> Callable[..., Ended]:
    """program(stage, *words) -> how `python -m stages...` (or pipeline.py) ends with these
    words."""

    def run(stage: str, *words: str) -> Ended:
        code = 0
        try:
            if stage == "pipeline":
                guard(lambda: pipeline.main(words))
            else:
                cli(STAGES[stage].Config, STAGES[stage].main, words)
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def made(tmp_path_factory, tokenizer, tiny_gpt, tiny_reward) -> dict[str, str]:
    """What the stages' good configs point to: a language model, a reward model, shards."""
    from common.handoff.publish import publish

    root, stage = tmp_path_factory.mktemp("made"), {"stage": "test", "parent": None}
    publish(root / "lm", tiny_gpt(), tokenizer, stage | {"kind": "lm"})
    publish(root / "reward", tiny_reward(), tokenizer, stage | {"kind": "reward"})
    (root / "text.jsonl").write_text("\n".join(ROWS["prepare"] * 20))
    cfg = {
        "train_data": [str(root / "text.jsonl")],
        "tokenizer": str(root / "lm"),
        "eval_fraction": 0.2,
    }
    prepare.main(prepare.Config(output_dir=str(root / "shards"), **cfg))
    (root / "file").write_text("not a directory")
    return {name: str(root / name) for name in ("lm", "reward", "shards", "file")} | {
        "root": str(root)
    }


@pytest.fixture
def good(made, tmp_path) -> Callable[..., dict]:
    """good(stage) -> a config that the stage runs with in no time."""
    training = {
        "max_steps": 1,
        "mixed_precision": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
    }

    def config(stage: str) -> dict:
        data = tmp_path / "rows.jsonl"
        if stage in ROWS and not data.exists():
            data.write_text("\n".join(ROWS[stage]) + "\n")
        own = {
            "prepare": {"tokenizer": made["lm"], "train_data": [str(data)], "eval_fraction": 0.3},
            "pretrain": {
                "train_data": made["shards"],
                "n_layer": 1,
                "n_embd": 32,
                "max_length": 16,
                **training,
            },
            "sft": {
                "parent": made["lm"],
                "samples": 1,
                "sample_tokens": 4,
                "max_length": 60,
                **training,
            },
            "collect": {
                "parent": made["lm"],
                "answers_per_prompt": 2,
                "max_new_tokens": 4,
                "max_prompt_length": 50,
            },
            "reward": {"parent": made["lm"], "max_length": 60, **training},
            "rl": {
                "parent": made["lm"],
                "reward_model": made["reward"],
                "max_prompt_length": 50,
                "max_new_tokens": 4,
                **training,
                "per_device_train_batch_size": 1,
                "num_ppo_epochs": 1,
            },
        }[stage]
        paths = {"output_dir": str(tmp_path / "out"), "train_data": str(data)}
        return {**paths, **own}

    return config


@pytest.fixture
def write(good, tmp_path) -> Callable[..., Path]:
    """write(stage, text) -> a YAML file of the stage's good config in which the keys of `text`
    stand instead."""

    def file(stage: str, text: str) -> Path:
        replaced = {line.split(":")[0].strip("'\" ") for line in text.split("\n")}
        kept = {key: value for key, value in good(stage).items() if key not in replaced}
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(kept) + text + "\n")
        return path

    return file
