"""TRL's trainers take a step from directories that we published: the hand-off needs no code of ours."""

import json
import math

import pytest
import torch
from datasets import Dataset

QUESTIONS = ["Name an animal.", "What is two plus three?", "Hi", "Is it?"]


def message(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


@pytest.fixture
def arguments(tmp_path) -> dict:
    """One step of two rows on the CPU, nothing saved or reported."""
    return {
        "output_dir": str(tmp_path / "trl"), "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "max_length": 48, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def one_step(trainer) -> None:
    """Trains, and sees that the loss is a number and that the weights moved."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert trainer.state.global_step == 1
    assert losses
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_sft_trainer(tiny_gpt, stage_dir, arguments, tokenizer):
    from trl import SFTConfig, SFTTrainer

    folder = stage_dir(tiny_gpt("llama"))
    rows = Dataset.from_list([{"messages": message("user", q) + message("assistant", "The fox is.")} for q in QUESTIONS])
    trainer = SFTTrainer(folder, args=SFTConfig(assistant_only_loss=True, **arguments), train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [[int(t) for t in row if t != -100] for row in batch["labels"]]
    assert learned == [[*tokenizer.encode("The fox is."), tokenizer.eot_id]] * 2  # by our template's generation marks
    assert trainer.processing_class.pad_token_id == tokenizer.pad_id
    one_step(trainer)


def test_reward_trainer(tiny_reward, stage_dir, arguments):
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    folder = stage_dir(tiny_reward("llama", shift=0.5))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert json.loads(model.config.to_json_string())["score_shift"] == 0.5
    rows = Dataset.from_list(
        [
            {
                "prompt": message("user", q),
                "chosen": message("assistant", "The fox."),
                "rejected": message("assistant", f"no {q}"),
            }
            for q in QUESTIONS
        ]
    )
    from transformers import AutoTokenizer

    trainer = RewardTrainer(
        model, args=RewardConfig(**arguments), train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    one_step(trainer)


def test_dpo_trainer(tiny_gpt, stage_dir, arguments):
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list(
        [
            {"prompt": message("user", q), "chosen": message("assistant", "The fox."), "rejected": message("assistant", "no")}
            for q in QUESTIONS
        ]
    )
    trainer = DPOTrainer(stage_dir(tiny_gpt("llama")), args=DPOConfig(**arguments), train_dataset=rows)
    one_step(trainer)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy = reference before the first step
