"""Every hand-off, opened without code of ours: of the road in miniature, or of a whole run that
HANDOFFS=runs/demo names."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.sample import sample
from common.rewards.scoring import reward_scores
from common.text.chat import prompt_ids, rows_to_prompt
from tests.smoke.conftest import lines, message, one_step

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FEW = 40


@pytest.fixture(scope="session")
def finished(request) -> Path:
    return (
        Path(os.environ["HANDOFFS"])
        if "HANDOFFS" in os.environ
        else request.getfixturevalue("road")[0]
    )


@pytest.fixture(scope="session")
def prompts(finished) -> list[list[dict]]:
    """Of the last stage's training rows, spread over the file."""
    rows = lines(
        Path(json.loads((finished / "rl" / "stage.json").read_text())["config"]["train_data"])
    )
    return [rows_to_prompt(row) for row in rows[:: max(1, len(rows) // FEW)][:FEW]]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("step", ["pretrain", "sft", "rl"])
@torch.no_grad()
def test_language_model(finished, prompts, step):
    folder = str(finished / step)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in prompts:
        ids = prompt_ids(tokenizer, messages)
        if tokenizer.chat:
            given = auto.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            given = [tokenizer.eot_id, *auto(tokenizer.decode(ids[1:]))["input_ids"]]
        assert given == ids
        batch = torch.tensor([ids])
        assert largest_difference(theirs(batch).logits, model(batch)) < 1e-4
        room = min(60, model.config.max_length - len(ids))
        said = theirs.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=room
        )[0, len(ids) :]
        (ours,) = sample(
            model, [ids], max_new_tokens=room, temperature=0, stop_ids=[tokenizer.eot_id]
        )
        assert ours.ids == said.tolist()
        assert tokenizer.decode(ours.ids) == auto.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("step", ["reward", "rl/critic"])
@torch.no_grad()
def test_scalar_model(finished, prompts, step):
    folder = str(finished / step)
    tokenizer, auto = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    rows = [prompt_ids(tokenizer, messages) for messages in prompts]
    batch = auto.pad({"input_ids": rows}, return_tensors="pt")
    wanted = theirs(**batch).logits[:, 0] - theirs.config.score_shift
    assert (
        largest_difference(torch.tensor(reward_scores(load_model(folder, "reward"), rows)), wanted)
        < 1e-4
    )


@pytest.mark.parametrize("step", ["sft", "rl"])
def test_trl_goes_on_from_an_assistant(finished, prompts, arguments, step):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    rows = [{"messages": [*messages, *message("assistant", "Yes.")]} for messages in prompts]
    make = SFTConfig(assistant_only_loss=True, **arguments)
    one_step(SFTTrainer(str(finished / step), args=make, train_dataset=Dataset.from_list(rows)))
    pairs = [
        {
            "prompt": p,
            "chosen": message("assistant", "Yes."),
            "rejected": message("assistant", "No!"),
        }
        for p in prompts
    ]
    one_step(
        DPOTrainer(
            str(finished / step),
            args=DPOConfig(**arguments),
            train_dataset=Dataset.from_list(pairs),
        )
    )


def test_trl_goes_on_from_a_reward_model(finished, prompts, arguments):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    folder = str(finished / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = [
        {
            "prompt": p,
            "chosen": message("assistant", "Yes."),
            "rejected": message("assistant", "No, no!"),
        }
        for p in prompts[:4]
    ]
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    one_step(
        RewardTrainer(
            model,
            args=RewardConfig(**arguments),
            train_dataset=Dataset.from_list(pairs),
            processing_class=auto,
        )
    )
