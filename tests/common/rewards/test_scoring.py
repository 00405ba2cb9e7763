"""Scores are numbers, or an error."""

import math

import pytest
import torch

from common.model.gpt import RewardModel
from common.model.shape import GPTConfig
from common.program.errors import Failure
from common.rewards.scoring import reward_scores


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(number):
    model = RewardModel(GPTConfig(vocab_size=9, max_length=8, n_layer=1, n_head=2, n_embd=16))
    model.shift.fill_(number)
    with torch.no_grad(), pytest.raises(Failure, match=r"score of answer \d is -?(nan|inf), no"):
        reward_scores(model, [[1, 2, 3], [4]])
