"""TRL's trainers take a step from directories that we published: the hand-off needs no code of
ours."""

import json
import math

import pytest

from tests.smoke.conftest import message, one_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

QUESTIONS = ["Name an animal.", "What is two plus three?", "Hi", "Is it?"]


def test_sft_trainer(tiny_gpt, stage_dir, arguments, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = stage_dir(tiny_gpt("llama"))
    rows = Dataset.from_list(
        [{"messages": message("user", q) + message("assistant", "The fox is.")} for q in QUESTIONS]
    )
    trainer = SFTTrainer(
        folder, args=SFTConfig(assistant_only_loss=True, **arguments), train_dataset=rows
    )
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [[int(t) for t in row if t != -100] for row in batch["labels"]]
    assert (
        learned == [[*tokenizer.encode("The fox is."), tokenizer.eot_id]] * 2
    )  # by our template's generation marks
    assert trainer.processing_class.pad_token_id == tokenizer.pad_id
    one_step(trainer)


def test_reward_trainer(tiny_reward, stage_dir, arguments):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
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
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**arguments),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    one_step(trainer)


def test_dpo_trainer(tiny_gpt, stage_dir, arguments):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list(
        [
            {
                "prompt": message("user", q),
                "chosen": message("assistant", "The fox."),
                "rejected": message("assistant", "no"),
            }
            for q in QUESTIONS
        ]
    )
    trainer = DPOTrainer(
        stage_dir(tiny_gpt("llama")), args=DPOConfig(**arguments), train_dataset=rows
    )
    one_step(trainer)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["loss"] == pytest.approx(
        math.log(2), abs=1e-4
    )  # policy = reference before the first step
