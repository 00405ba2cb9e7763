"""The four networks: policy and critic learn, reference and reward model do not.

Shape legend: B episodes, S tokens of prompt and response, N response tokens of all episodes, row by
row; R rows of pretraining text, L tokens in each.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.model.gpt import GPT, RewardModel


class ActorCritic(nn.Module):
    """Policy and critic as children of one module: one optimizer, one engine.

    Without a critic (None) every value is 0.
    """

    def __init__(self, policy: GPT, critic: RewardModel | None) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self,
        ids_BS: Tensor,
        predicts_BS: Tensor,
        targets_N: Tensor,
        temperature: float,
        texts_RL: Tensor | None = None,
        documents_RL: Tensor | None = None,
        text_targets_RL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probs of targets_N, entropies and values (N) where predicts_BS is set: at the
        position one to the left of each response token.

        And the policy's log-probs (R, L) of pretraining text, when given, in the same pass, which
        DDP needs: texts_RL and the document each of its tokens is of, text_targets_RL.
        """
        text_logprobs_RL = None
        if texts_RL is not None:
            text_logprobs_RL = self.policy(
                texts_RL, documents=documents_RL, targets=text_targets_RL
            )
        logprobs_N, entropies_N = self.policy(
            ids_BS, predicts_BS, targets=targets_N, temperature=temperature, entropies=True
        )
        if self.critic is None:
            values_N = torch.zeros_like(logprobs_N)
        else:
            values_N = self.critic.values(ids_BS, predicts_BS)
        return logprobs_N, entropies_N, values_N, text_logprobs_RL


class Models(NamedTuple):
    """All that a rollout asks."""

    actor_critic: nn.Module  # an ActorCritic as it trains: prepared, perhaps split over processes
    sampler: (
        GPT  # the policy to sample from, with the same weights; perhaps a copy, in half precision
    )
    reference: nn.Module  # a frozen GPT, from which KL is measured
    reward_model: nn.Module  # a frozen RewardModel, which scores whole answers
