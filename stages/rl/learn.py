"""Experience -> updated policy and critic: a few epochs of minibatches over one rollout, whatever
the algorithm.

Shape legend: B episodes, T response tokens, N response tokens of a micro-batch, row by row; R rows
of pretraining text, L tokens in each.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from common.config.schema import stage_config
from common.config.training import NonNegative, Positive
from common.model.ops import whiten
from common.rows.batches import share
from common.train.run import Run
from common.train.update import Update
from stages.rl.algorithms import ALGORITHMS, AlgorithmConfig
from stages.rl.experience import Experience

Sums = dict[str, Tensor]  # statistics by name, each summed over the response tokens ("tokens")


@stage_config
class LearnConfig(AlgorithmConfig):
    """Keys of the updates."""

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
    early_stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End a rollout's epochs when approx_kl passes 1.5 times this; null = off."""
    ptx_coef: NonNegative = 0.0
    """Weight of the loss on ptx_data, in nats a token."""
    ptx_batch_size: Positive = 16
    """Rows of ptx_data, of max_length tokens, in each update on one process."""


class Texts(NamedTuple):
    """Rows of pretraining text, whose loss PTX adds."""

    ids_RL: Tensor
    documents_RL: (
        Tensor  # the document each token is of: attention stays inside it, as in pretraining
    )
    targets_RL: Tensor  # the token behind each

    def split(self, parts: int) -> list["Texts | None"]:
        """The rows in so many parts; None for one that gets no row."""
        pieces = zip(*(field.tensor_split(parts) for field in self), strict=True)
        return [Texts(*piece) if len(piece[0]) else None for piece in pieces]


class MicroBatch(NamedTuple):
    """What goes through the models at once."""

    experience: Experience  # its advantages are those to train on, whitened if the algorithm asks
    texts: Texts | None


class Tokens(NamedTuple):
    """The response tokens of a micro-batch: what an algorithm's loss reads."""

    logprobs_N: Tensor  # of the policy as it is now, with gradient
    values_N: Tensor  # of the critic as it is now, with gradient; 0 without a critic
    old_logprobs_N: Tensor  # of the policy that sampled them
    ref_logprobs_N: Tensor  # of the reference
    old_values_N: Tensor  # of the critic at the time of the rollout
    advantages_N: Tensor
    returns_N: Tensor


def learn(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    texts: Callable[[int], Texts] | None,
    cfg: LearnConfig,
    step: int,
) -> dict[str, float]:
    """Epochs over the experience of all processes; returns means over the response tokens of all
    updates.

    model is the ActorCritic as it was prepared; texts(n) is the pretraining text of this process
    for the rollout's update number n, None without PTX.
    """
    if ALGORITHMS[cfg.algorithm].WHITENS_ADVANTAGES:
        whitened_BT = whiten(experience.advantages_BT, experience.rollout.mask_BT)
        experience = experience._replace(advantages_BT=whitened_BT)
    lengths = experience.rollout.lengths_B().tolist()
    updates: list[Update] = []
    statistics: list[Sums] = []  # of each update, over all processes
    for epoch in range(cfg.num_ppo_epochs):
        for number, rows in enumerate(minibatches(lengths, cfg, step, epoch)):
            text = texts and texts(epoch * cfg.num_minibatches + number)
            micro_batches = share_of(run, experience, rows, text)
            tokens = sum(part.experience.rollout.mask_BT.sum() for part in micro_batches)
            counts = torch.tensor([float(tokens), float(text.targets_RL.numel() if text else 0)])
            sums: list[Sums] = []  # of each micro-batch
            loss = partial(losses, model, cfg=cfg, sums=sums)
            update = run.update(step, model, optimizer, micro_batches, loss, counts)
            if update is None:  # left out, as not finite
                continue
            updates.append(update)
            statistics.append(over_processes(run, sums))
            if cfg.early_stop_kl and mean(statistics[-1], "approx_kl") > 1.5 * cfg.early_stop_kl:
                return summarise(cfg, statistics, updates, epoch + 1)
    return summarise(cfg, statistics, updates, cfg.num_ppo_epochs)


def minibatches(lengths: list[int], cfg: LearnConfig, step: int, epoch: int) -> Iterator[list[int]]:
    """Rows of each minibatch of an epoch, by length: a pure function of seed, step and epoch.

    The order is that of a shuffled deck: which episodes share a minibatch is new in every epoch.
    """
    size = math.ceil(len(lengths) / cfg.num_minibatches)
    order = np.random.default_rng((cfg.seed, step, epoch)).permutation(len(lengths)).tolist()
    for start in range(0, len(order), size):
        yield sorted(order[start : start + size], key=lambda row: lengths[row])


def share_of(
    run: Run, experience: Experience, rows: list[int], texts: Texts | None
) -> list[MicroBatch]:
    """This process's micro-batches of a minibatch, its text spread over them."""
    parts = list(share(rows, run.rank, run.processes, run.cfg.per_device_train_batch_size))
    texts_of = texts.split(len(parts)) if texts else [None] * len(parts)
    return [
        MicroBatch(experience.rows(part), text) for part, text in zip(parts, texts_of, strict=True)
    ]


def losses(model: nn.Module, micro_batch: MicroBatch, cfg: LearnConfig, sums: list[Sums]) -> Tensor:
    """(2): the algorithm's loss summed over the response tokens of a micro-batch, and the PTX loss
    summed over its text. Appends the statistics to `sums`."""
    experience, rollout = micro_batch.experience, micro_batch.experience.rollout
    mask_BT = rollout.mask_BT
    logprobs_N, entropies_N, values_N, text_logprobs_RL = model(
        rollout.ids_BS,
        rollout.predicts_BS(),
        rollout.targets_N(),
        cfg.temperature,
        *(micro_batch.texts or ()),
    )
    tokens = Tokens(
        logprobs_N=logprobs_N,
        values_N=values_N.float(),
        old_logprobs_N=rollout.logprobs_BT[mask_BT],
        ref_logprobs_N=rollout.ref_logprobs_BT[mask_BT],
        old_values_N=rollout.values_BT[mask_BT],
        advantages_N=experience.advantages_BT[mask_BT],
        returns_N=experience.returns_BT[mask_BT],
    )
    loss, statistics = ALGORITHMS[cfg.algorithm].loss(tokens, cfg)
    sums.append({"tokens": mask_BT.sum(), **statistics, "entropy": entropies_N.detach().sum()})
    ptx = torch.zeros_like(loss) if text_logprobs_RL is None else -text_logprobs_RL.sum()
    return torch.stack([loss, cfg.ptx_coef * ptx])


def over_processes(run: Run, sums: list[Sums]) -> Sums:
    """The statistics of an update: summed over its micro-batches and over all processes."""
    return dict(zip(sums[0], run.accelerator.reduce(table(sums).sum(0), "sum"), strict=True))


def table(rows: list[Sums]) -> Tensor:
    """(rows, statistics), in the order of their names."""
    return torch.stack([torch.stack(list(row.values())) for row in rows])


def mean(sums: Sums, name: str) -> float:
    """Mean of a statistic over the response tokens."""
    return float(sums[name] / sums["tokens"])


def summarise(
    cfg: LearnConfig, statistics: list[Sums], updates: list[Update], epochs: int
) -> dict[str, float]:
    """What the log says of the updates of a rollout."""
    if not updates:  # all were left out, as not finite
        return {"ppo_epochs": epochs}
    totals = dict(zip(statistics[0], table(statistics).sum(0).tolist(), strict=True))
    tokens = totals.pop("tokens")
    metrics = {name: total / tokens for name, total in totals.items()}
    metrics["grad_norm"] = sum(update.grad_norm for update in updates) / len(updates)
    metrics["ppo_epochs"] = epochs
    if cfg.ptx_coef:
        ptx = sum(update.losses[1] for update in updates)
        metrics["ptx_loss"] = ptx / len(updates) / cfg.ptx_coef
    return metrics
