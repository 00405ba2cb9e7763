"""The maths of PPO from human feedback. Imports torch alone; every function is pure.

Shape legend: B episodes, T response tokens; mask_BT is 1 on response tokens up to and with the stop
token, 0 behind it. Sources: Z Ziegler 2019, S Stiennon 2020, IG InstructGPT 2022, N+ "N
implementation details of RLHF with PPO".
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Tensor  # () summed over tokens
    clipped: Tensor  # () tokens whose ratio the clip holds back
    approx_kl: Tensor  # () sum of k3 of (old, new)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2, k3 of KL(pi || ref) at tokens sampled from pi (Schulman 2020), any shape.

    k1 is unbiased and may be negative: never clamp it. k3 is unbiased and >= 0. None is meant as a
    loss.
    """
    d = logprobs - ref_logprobs
    return d, d**2 / 2, torch.expm1(-d) + d


def shape_scores(
    scores_B: Tensor, stopped_B: Tensor, clip: float | None, missing_stop_penalty: float
) -> Tensor:
    """Reward-model scores (shift already inside) clipped to +-clip, less the penalty where the
    answer was cut off."""
    if clip is not None:
        scores_B = scores_B.clamp(-clip, clip)
    return scores_B - missing_stop_penalty * (~stopped_B.bool()).float()


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * k1 at every response token, plus the score at the last one (Z, eq. 2; IG, eq. 2):
    (B, T)."""
    rewards_BT = torch.where(mask_BT.bool(), -kl_coef * kl_BT, 0)
    last_B = mask_BT.sum(1).long() - 1
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


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
    rewards_BT, values_BT = (
        torch.where(mask_BT.bool(), x_BT, 0) for x_BT in (rewards_BT, values_BT)
    )
    mask_BT = mask_BT.to(rewards_BT.dtype)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = next_value_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * gae_lambda * next_advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


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


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """Adaptive penalty (Z, section 2.2), once a rollout: kl in nats an episode, horizon in
    episodes."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over response tokens (N): 1 is a perfect critic, 0 a
    constant one."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
