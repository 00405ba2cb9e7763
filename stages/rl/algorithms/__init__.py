"""The reinforcement-learning algorithms, one small file each, and the keys that choose one.

An algorithm is a module with four names. Its maths is pure and imports torch alone.

    NEEDS_CRITIC        whether a critic is loaded, trained and published; without one values are 0
    WHITENS_ADVANTAGES  whether advantages get mean 0 and std 1 over the rollout before training
    advantages(rewards_BT, values_BT, mask_BT, cfg) -> (advantages_BT, returns_BT)
                        of a whole rollout, whatever processes sampled it; 0 on padding
    loss(tokens, cfg) -> (loss, statistics)
                        of the response tokens of a micro-batch, all summed over them. The
                        statistics are detached sums by the names that the log gives their means;
                        "approx_kl" is one of them, as early_stop_kl reads it

A new one is its file, a row of ALGORITHMS with its name and keys in AlgorithmConfig, and a recipe.
"""

from types import ModuleType
from typing import Annotated, Literal

from pydantic import Field

from common.config.schema import stage_config
from common.config.training import NonNegative, TrainConfig
from stages.rl.algorithms import ppo

ALGORITHMS: dict[str, ModuleType] = {"ppo": ppo}


@stage_config
class AlgorithmConfig(TrainConfig):
    """Keys of the algorithm."""

    algorithm: Literal["ppo"] = "ppo"
    """How rewards become advantages and a loss: ppo (GAE with a critic, clipped losses)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of GAE."""
    clip_range: Annotated[float, Field(gt=0, le=1e9)] = 0.2
    """Clip of the policy's ratio."""
    clip_range_value: Annotated[float, Field(gt=0, le=1e9)] = 0.2
    """Clip of the critic's change."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
