"""The maths that reinforcement-learning algorithms share. Imports torch alone; every function is
pure.

Shape legend: B episodes, T response tokens, N response tokens of all episodes, row by row; mask_BT
is 1 on response tokens up to and with the stop token, 0 behind it. Sources: Z Ziegler 2019, IG
InstructGPT 2022.
"""

import torch
from torch import Tensor


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
    """Scores (B) clipped to +-clip, less the penalty where the answer was cut off.

    The reward model has subtracted its shift already: the clip comes after it. None = no clip.
    """
    if clip is not None:
        scores_B = scores_B.clamp(-clip, clip)
    return scores_B - missing_stop_penalty * (~stopped_B.bool()).float()


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL at every response token, plus the score at the last one (Z, eq. 2; IG, eq. 2):
    (B, T)."""
    rewards_BT = torch.where(mask_BT.bool(), -kl_coef * kl_BT, 0)
    last_B = mask_BT.sum(1).long() - 1
    return rewards_BT.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The adaptive KL coefficient after a rollout of `episodes` episodes (Z, section 2.2).

    kl and target are in nats an episode, horizon in episodes.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over response tokens (N): 1 is a perfect critic, 0 a
    constant one."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
