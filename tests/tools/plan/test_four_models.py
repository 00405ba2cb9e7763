"""What the planner says of PPO's four models, against the models that the stage loads."""

import json

import pytest
import torch

from common.model.gpt import GPT, RewardModel
from common.train.run import Run
from stages.rl import train
from tests.conftest import shape
from tools.plan.workload import Work, memory

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def test_bytes_of_the_four_models_are_those_that_the_stage_holds(tmp_path, stage_dir):
    made = shape("llama", 300)
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Hi"}))
    cfg = train.Config(
        parent=stage_dir(GPT(made)),
        reward_model=stage_dir(RewardModel(made)),
        train_data=str(tmp_path / "x.jsonl"),
        output_dir=str(tmp_path / "rl"),
        mixed_precision="no",
        max_prompt_length=32,
        max_new_tokens=32,
    )
    learning, *judges = train.load_models(cfg, Run(cfg, "rl", "lm"))
    optimizer = train.make_optimizer(cfg, learning)
    for parameter in learning.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    work = Work(
        "rl", "rl", made, gpus=1, micro=1, length=64, prompt=32, response=32, precision="no"
    )
    found = memory(work)
    assert found.weights == size(*learning.parameters())
    assert found.gradients == size(*(p.grad for p in learning.parameters()))
    assert found.optimizer == size(*moments)
    assert found.frozen == size(*(p for model in judges for p in model.parameters()))
