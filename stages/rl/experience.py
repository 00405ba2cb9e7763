"""Rollout -> Experience: rewards and advantages of each token, and what the log says of them.

Shape legend: B episodes, T response tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from common.model.ops import masked_mean
from common.text.tokenizer import Tokenizer
from common.train.update import NonFiniteError
from stages.rl.maths import explained_variance, kl_estimates, shape_scores, token_rewards
from stages.rl.rollout import Rollout


class Experience(NamedTuple):
    """A rollout and what is learned from it; 0 on padding."""

    rollout: Rollout
    rewards_BT: Tensor
    advantages_BT: Tensor  # as the algorithm gives them, not whitened
    returns_BT: Tensor

    def rows(self, index: Sequence[int]) -> "Experience":
        """The chosen episodes, trimmed to their longest."""
        rollout = self.rollout.rows(index)
        size = rollout.mask_BT.shape[1]
        return Experience(rollout, *(field[list(index), :size] for field in self[1:]))


def rewards(
    rollout: Rollout, kl_coef: float, score_clip: float | None, missing_stop_penalty: float
) -> Tensor:
    """Reward of each response token (B, T): the KL penalty, and at the last one the score, clipped,
    less the penalty for an answer that was cut off."""
    scores_B = shape_scores(rollout.scores_B, rollout.stopped_B, score_clip, missing_stop_penalty)
    kl_BT, _, _ = kl_estimates(rollout.logprobs_BT, rollout.ref_logprobs_BT)
    return token_rewards(scores_B, kl_BT, rollout.mask_BT, kl_coef)


def describe(experience: Experience) -> dict[str, float]:
    """Means over the episodes of a rollout; KL in nats an episode.

    Raises NonFiniteError when one of them is not a number: nothing is to be learned from it.
    """
    rollout = experience.rollout
    mask_BT = rollout.mask_BT
    kl_BT, _, _ = kl_estimates(rollout.logprobs_BT, rollout.ref_logprobs_BT)
    figures = {
        "score": rollout.scores_B.mean(),
        "reward": (experience.rewards_BT * mask_BT).sum(1).mean(),
        "kl": (kl_BT * mask_BT).sum(1).mean(),
        "length": mask_BT.sum(1).float().mean(),
        "stop_rate": rollout.stopped_B.float().mean(),
        "explained_variance": explained_variance(
            rollout.values_BT[mask_BT], experience.returns_BT[mask_BT]
        ),
        "rollout_entropy": masked_mean(rollout.entropy_BT, mask_BT),
    }
    metrics = {name: float(value) for name, value in figures.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise NonFiniteError(f"rollout statistics {metrics}; no update was applied")
    return metrics


def episode_samples(rollout: Rollout, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first `count` episodes as text, each with its score and KL: rows of samples.jsonl."""
    kl_B = ((rollout.logprobs_BT - rollout.ref_logprobs_BT) * rollout.mask_BT).sum(1)
    samples = []
    for b in range(min(count, len(rollout.scores_B))):
        prompt, end = int(rollout.prompt_lengths_B[b]), int(rollout.lengths_B()[b])
        ids = rollout.ids_BS[b].tolist()
        samples.append(
            {
                "prompt": tokenizer.decode(ids[:prompt]),
                "answer": tokenizer.decode(ids[prompt:end]),
                "score": round(float(rollout.scores_B[b]), 4),
                "kl": round(float(kl_B[b]), 4),
                "stopped": bool(rollout.stopped_B[b]),
            }
        )
    return samples
