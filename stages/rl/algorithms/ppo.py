"""PPO: advantages from a critic, a policy loss whose ratio is clipped, a clipped value loss.

Imports torch alone; every function is pure. `NEEDS_CRITIC`, `WHITENS_ADVANTAGES`, `advantages` and
`loss` are what stages/rl/algorithms/__init__.py asks of an algorithm; below them is the maths.

Shape legend: B episodes, T response tokens, N response tokens of all episodes, row by row; mask_BT
is 1 on response tokens up to and with the stop token, 0 behind it. Sources: Schulman 2015 (GAE),
Schulman 2017 (PPO), N+ "The N implementation details of RLHF with PPO".
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

NEEDS_CRITIC = True
WHITENS_ADVANTAGES = True


class Keys(Protocol):
    """The keys of the config that PPO reads."""

    gamma: float
    gae_lambda: float
    clip_range: float
    clip_range_value: float
    vf_coef: float


class Tokens(Protocol):
    """What PPO reads of the response tokens of a micro-batch (stages.rl.learn.Tokens)."""

    logprobs_N: Tensor  # of the policy as it is now
    values_N: Tensor  # of the critic as it is now
    old_logprobs_N: Tensor  # of the policy that sampled them
    old_values_N: Tensor  # of the critic at that time
    advantages_N: Tensor
    returns_N: Tensor


def advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, keys: Keys
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) of a rollout."""
    return gae(rewards_BT, values_BT, mask_BT, keys.gamma, keys.gae_lambda)


def loss(tokens: Tokens, keys: Keys) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch and the statistics for the log, each summed over its tokens."""
    policy = policy_loss(
        tokens.logprobs_N, tokens.old_logprobs_N, tokens.advantages_N, keys.clip_range
    )
    value = value_loss(
        tokens.values_N, tokens.old_values_N, tokens.returns_N, keys.clip_range_value
    )
    statistics = {
        "policy_loss": policy.loss.detach(),
        "value_loss": value.detach(),
        "clip_fraction": policy.clipped,
        "approx_kl": policy.approx_kl,
    }
    return policy.loss + keys.vf_coef * value, statistics


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) of generalised advantage estimation (Schulman 2015, eq. 16); 0
    on padding.

    The value behind the last token is 0: an answer is an episode that ends there. Returns are
    advantages + values, built before any whitening.
    """
    mask_BT = mask_BT.bool()
    rewards_BT = torch.where(mask_BT, rewards_BT, 0)
    values_BT = torch.where(mask_BT, values_BT, 0)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * gae_lambda * next_advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


class PolicyLoss(NamedTuple):
    """The clipped surrogate over some tokens, and two figures that say how far the policy moved."""

    loss: Tensor  # () summed over tokens
    clipped: Tensor  # () tokens whose ratio the clip holds back
    approx_kl: Tensor  # () sum of k3 of (old, new)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float = 0.2
) -> PolicyLoss:
    """Clipped surrogate max(-A r, -A clip(r, 1 +- clip_range)), summed (Schulman 2017, eq. 7);
    response tokens only, any shape.

    The log-ratio is held to +-20, so that one absurd token cannot overflow exp.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    approx_kl = (ratio - 1 - log_ratio).detach().sum()
    return PolicyLoss(torch.max(plain, held).sum(), (held > plain).detach().sum(), approx_kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float = 0.2
) -> Tensor:
    """Sum of 1/2 max((v - R)^2, (clip(v, v_old +- clip_range) - R)^2) (N+ detail 13); response
    tokens only, any shape."""
    held = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.max((values - returns) ** 2, (held - returns) ** 2).sum()
