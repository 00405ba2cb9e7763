"""The whole road in miniature, as real jobs; and what a step of TRL's trainers needs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
PLAIN = [sys.executable, "-m"]
TRAINERS = ["stages.pretrain.train", "stages.sft.train", "stages.reward.train", "stages.rl.train"]

# Step: its module and its keys; {here} is the run's folder.
ROAD = {
    "prepare": (
        "stages.pretrain.prepare",
        {"train_data": ["{here}/documents.jsonl"], "vocab_size": 290, "eval_fraction": 0.1},
    ),
    "pretrain": (
        "stages.pretrain.train",
        {
            "train_data": "{here}/prepare",
            "max_steps": 30,
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 32,
            "max_length": 24,
            "context_length": 48,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 10,
            "sample_prompts": ["Who met the fox?"],
            "sample_tokens": 5,
        },
    ),
    "sft": (
        "stages.sft.train",
        {
            "parent": "{here}/pretrain",
            "train_data": "{here}/sft.jsonl",
            "num_train_epochs": 2,
            "max_length": 48,
            "learning_rate": 1e-2,
            "samples": 2,
            "sample_tokens": 8,
            "logging_steps": 2,
        },
    ),
    "collect": (
        "stages.reward.collect",
        {
            "parent": "{here}/sft",
            "train_data": "{here}/sft.jsonl",
            "pairs": ["{here}/people.json"],
            "answers_per_prompt": 2,
            "max_prompts": 24,
            "max_new_tokens": 12,
            "max_prompt_length": 30,
        },
    ),
    "reward": (
        "stages.reward.train",
        {
            "parent": "{here}/sft",
            "train_data": "{here}/collect/comparisons.jsonl",
            "eval_data": "{here}/collect/eval.jsonl",
            "num_train_epochs": 3,
            "max_length": 48,
            "learning_rate": 1e-2,
            "logging_steps": 2,
        },
    ),
    "rl": (
        "stages.rl.train",
        {
            "parent": "{here}/sft",
            "reward_model": "{here}/reward",
            "train_data": "{here}/sft.jsonl",
            "max_steps": 3,
            "max_prompt_length": 30,
            "max_new_tokens": 12,
            "per_device_train_batch_size": 8,
            "num_ppo_epochs": 2,
            "learning_rate": 1e-3,
            "samples": 3,
        },
    ),
}


def call(command: list[str], **environment: str) -> subprocess.Popen:
    """Started in the checkout, offline, one thread; its output is kept."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def road(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(folder of the whole run, what each step printed)."""
    here = tmp_path_factory.mktemp("road")
    facts = [(f"Who met fox {n % 10}?", f"Bird {n % 7} met fox {n % 10}.") for n in range(60)]
    documents = [
        {"text": f"{question} {answer} They went to the river."} for question, answer in facts * 4
    ]
    (here / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    sft = [{"prompt": question, "completion": answer} for question, answer in facts]
    (here / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft))
    people = [
        {
            "conversations": [{"from": "human", "value": f"Is it {n}?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": f"Fox {n}"},
        }
        for n in range(10)
    ]
    (here / "people.json").write_text(json.dumps(people))
    printed = {}
    for step, (module, keys) in ROAD.items():
        config = here / f"{step}.yaml"
        config.write_text(yaml.safe_dump(keys).replace("{here}", str(here)))
        start = LAUNCH if module in TRAINERS else PLAIN
        job = call([*start, module, "--config", str(config), "--output_dir", str(here / step)])
        out, err = job.communicate(timeout=200)
        assert job.returncode == 0, f"{step} failed:\n{out}\n{err}"
        printed[step] = out
    return here, printed


@pytest.fixture
def arguments(tmp_path) -> dict:
    """One step of two rows on the CPU, nothing saved or reported."""
    return {
        "output_dir": str(tmp_path / "trl"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 48,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def one_step(trainer) -> None:
    """Trains, and sees that the loss is a number and that the weights moved."""
    before = {
        name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()
    }
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.state.global_step == 1
    assert losses
    assert all(map(math.isfinite, losses))
    assert any(
        not torch.equal(parameter, before[name])
        for name, parameter in trainer.model.named_parameters()
    )
