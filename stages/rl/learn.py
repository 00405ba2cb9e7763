"""Trajectory -> updated policy and critic: PPO epochs over one rollout, and what the log says of
it.

Shape legend: B episodes, T response tokens.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.config.schema import stage_config
from common.config.training import NonNegative, Positive, TrainConfig
from common.model.ops import masked_mean, whiten
from common.rows.batches import share
from common.text.tokenizer import Tokenizer
from common.train.run import Run
from common.train.update import NonFiniteError, Update
from stages.rl.algorithms.ppo import explained_variance, kl_estimates, policy_loss, value_loss
from stages.rl.rollout import ActorCritic, Trajectory


@stage_config
class PPOConfig(TrainConfig):
    """Keys of the PPO update."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; policy and reference log-probs are taken at the same one."""
    per_device_train_batch_size: Positive = 64
    """Episodes in a micro-batch; a minibatch is this times gradient_accumulation_steps times
    processes."""
    num_minibatches: Positive = 2
    """Minibatches (optimizer updates) an epoch; a rollout is num_minibatches minibatches of
    episodes."""
    num_ppo_epochs: Positive = 4
    """Epochs over each rollout."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Clip of the policy's ratio."""
    clip_range_value: Annotated[float, Field(gt=0)] = 0.2
    """Clip of the critic's change."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    early_stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End a rollout's epochs when approx_kl passes 1.5 times this; null = off."""
    ptx_coef: NonNegative = 0.0
    """Weight of the loss on ptx_data, in nats a token."""
    ptx_batch_size: Positive = 16
    """Rows of ptx_data, of max_length tokens, in each update on one process."""


class MicroBatch(NamedTuple):
    episodes: Trajectory
    advantages_BT: Tensor  # whitened over the rollout
    texts: Tensor | None  # (rows, length + 1) pretraining tokens


def terms(
    model: ActorCritic, batch: MicroBatch, cfg: PPOConfig, stats: list[Tensor], eot_id: int
) -> Tensor:
    """(summed PPO loss over response tokens, summed PTX loss) of a micro-batch; its sums for the
    log go to `stats`."""
    episodes = batch.episodes
    mask_BT = episodes.mask_BT
    texts = None if batch.texts is None else batch.texts[:, :-1]
    documents = (
        None if texts is None else (texts == eot_id).cumsum(1)
    )  # attention stays inside each, as in pretraining
    text_targets = None if texts is None else batch.texts[:, 1:]
    logprobs, entropies, values, text_logprobs = model(
        episodes.ids_BS,
        episodes.predicts_BS(),
        episodes.targets_N(),
        cfg.temperature,
        texts,
        documents,
        text_targets,
    )
    policy = policy_loss(
        logprobs, episodes.logprobs_BT[mask_BT], batch.advantages_BT[mask_BT], cfg.clip_range
    )
    value = value_loss(
        values.float(),
        episodes.values_BT[mask_BT],
        episodes.returns_BT[mask_BT],
        cfg.clip_range_value,
    )
    with torch.no_grad():
        stats.append(
            torch.stack(
                [
                    mask_BT.sum(),
                    policy.loss,
                    value,
                    policy.clipped,
                    policy.approx_kl,
                    entropies.sum(),
                ]
            )
        )
    ptx = torch.zeros((), device=logprobs.device) if text_logprobs is None else -text_logprobs.sum()
    return torch.stack([policy.loss + cfg.vf_coef * value, cfg.ptx_coef * ptx])


def learn(
    run: Run,
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Trajectory,
    texts: Callable[[int], Tensor] | None,
    eot_id: int,
    cfg: PPOConfig,
    step: int,
) -> dict[str, float]:
    """PPO epochs over one rollout (of all processes); returns means over all response tokens of all
    updates.

    texts(n): pretraining rows (rows, length + 1) for the rollout's update number n, whose loss PTX
    adds.
    """
    advantages_BT = whiten(batch.advantages_BT, batch.mask_BT)
    lengths = (batch.prompt_lengths_B + batch.mask_BT.sum(1)).tolist()
    per_minibatch = math.ceil(len(lengths) / cfg.num_minibatches)
    stats: list[Tensor] = []  # of each update, over all processes
    updates: list[Update] = []
    for epoch in range(cfg.num_ppo_epochs):
        # The order is that of a shuffled deck: which episodes share a minibatch is new in every
        # epoch.
        order = np.random.default_rng((cfg.seed, step, epoch)).permutation(len(lengths)).tolist()
        for number, start in enumerate(range(0, len(order), per_minibatch)):
            rows = sorted(order[start : start + per_minibatch], key=lambda row: lengths[row])
            parts = list(share(rows, run.rank, run.processes, cfg.per_device_train_batch_size))
            ptx = None if texts is None else texts(epoch * cfg.num_minibatches + number)
            ptx_parts = (
                [None] * len(parts)
                if ptx is None
                else [p if len(p) else None for p in ptx.tensor_split(len(parts))]
            )
            micro_batches = []
            for part, ptx_part in zip(parts, ptx_parts, strict=True):
                episodes = batch.rows(part)
                micro_batches.append(
                    MicroBatch(
                        episodes, advantages_BT[part][:, : episodes.mask_BT.shape[1]], ptx_part
                    )
                )
            tokens = sum(micro.episodes.mask_BT.sum() for micro in micro_batches)
            counts = torch.tensor([float(tokens), float(0 if ptx is None else ptx[:, 1:].numel())])
            sums: list[Tensor] = []
            done = run.update(
                step,
                model,
                optimizer,
                micro_batches,
                partial(terms, model, cfg=cfg, stats=sums, eot_id=eot_id),
                counts,
            )
            if done is None:
                continue
            updates.append(done)
            stats.append(run.accelerator.reduce(torch.stack(sums).sum(0), "sum"))
            if cfg.early_stop_kl and float(stats[-1][4] / stats[-1][0]) > 1.5 * cfg.early_stop_kl:
                return summarise(cfg, stats, updates, epoch + 1)
    return summarise(cfg, stats, updates, cfg.num_ppo_epochs)


def summarise(
    cfg: PPOConfig, stats: list[Tensor], updates: list[Update], epochs: int
) -> dict[str, float]:
    if not updates:  # all were left out, as not finite
        return {"ppo_epochs": epochs}
    tokens, *sums = torch.stack(stats).sum(0).tolist()
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy")
    means = {name: total / tokens for name, total in zip(names, sums, strict=True)}
    means |= {
        "grad_norm": sum(done.grad_norm for done in updates) / len(updates),
        "ppo_epochs": epochs,
    }
    if cfg.ptx_coef:
        means["ptx_loss"] = sum(done.losses[1] for done in updates) / len(updates) / cfg.ptx_coef
    return means


def describe(batch: Trajectory) -> dict[str, float]:
    """Means over the episodes of a rollout; KL in nats an episode. Raises NonFiniteError."""
    mask_BT = batch.mask_BT
    k1_BT, _, _ = kl_estimates(batch.logprobs_BT, batch.ref_logprobs_BT)
    metrics = {
        "score": batch.scores_B.mean(),
        "reward": (batch.rewards_BT * mask_BT).sum(1).mean(),
        "kl": (k1_BT * mask_BT).sum(1).mean(),
        "length": mask_BT.sum(1).float().mean(),
        "stop_rate": batch.stopped_B.float().mean(),
        "explained_variance": explained_variance(
            batch.values_BT[mask_BT], batch.returns_BT[mask_BT]
        ),
        "rollout_entropy": masked_mean(batch.entropy_BT, mask_BT),
    }
    metrics = {name: float(value) for name, value in metrics.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise NonFiniteError(f"rollout statistics {metrics}; no update was applied")
    return metrics


def episode_samples(batch: Trajectory, tokenizer: Tokenizer, count: int) -> list[dict]:
    """The first episodes of a rollout as text, with score and KL."""
    k1_B = ((batch.logprobs_BT - batch.ref_logprobs_BT) * batch.mask_BT).sum(1)
    rows = []
    for b in range(min(count, len(batch.scores_B))):
        prompt, end = (
            int(batch.prompt_lengths_B[b]),
            int(batch.prompt_lengths_B[b] + batch.mask_BT[b].sum()),
        )
        ids = batch.ids_BS[b].tolist()
        rows.append(
            {
                "prompt": tokenizer.decode(ids[:prompt]),
                "answer": tokenizer.decode(ids[prompt:end]),
                "score": round(float(batch.scores_B[b]), 4),
                "kl": round(float(k1_B[b]), 4),
                "stopped": bool(batch.stopped_B[b]),
            }
        )
    return rows
