"""Prompts -> Trajectory: answers sampled from the policy, with all that PPO needs to know about
them.

Shape legend: B episodes, S tokens of prompt and response, T response tokens, N response tokens of
all episodes, row by row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.model.gpt import GPT, RewardModel
from common.model.ops import length_mask, response_mask
from common.model.sample import sample
from common.rows.batches import pad
from stages.rl.algorithms.ppo import gae, kl_estimates, shape_scores, token_rewards


class ActorCritic(nn.Module):
    """Policy and critic as children of one module: one optimizer, one engine."""

    def __init__(self, policy: GPT, critic: RewardModel) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self,
        ids_BS: Tensor,
        predicts_BS: Tensor,
        targets_N: Tensor,
        temperature: float,
        texts: Tensor | None = None,
        documents: Tensor | None = None,
        text_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probs, entropies and values (N) where predicts_BS is set: at the position one left of
        each response token.

        And the policy's log-probs on `texts` (B, T), pretraining rows of several documents, in the
        same pass (which DDP needs).
        """
        text_logprobs = (
            None if texts is None else self.policy(texts, documents=documents, targets=text_targets)
        )
        logprobs_N, entropies_N = self.policy(
            ids_BS, predicts_BS, targets=targets_N, temperature=temperature, entropies=True
        )
        return logprobs_N, entropies_N, self.critic.values(ids_BS, predicts_BS), text_logprobs


class Trajectory(NamedTuple):
    """One rollout; float fields are 0 on padding."""

    ids_BS: Tensor  # prompt and response, right-padded; the sampled ids themselves
    prompt_lengths_B: Tensor
    mask_BT: Tensor  # bool: response tokens, the stop token with them
    logprobs_BT: Tensor  # of the policy that sampled, in the numerics of training
    ref_logprobs_BT: Tensor
    entropy_BT: Tensor
    values_BT: Tensor
    scores_B: Tensor  # reward model's, before clip and penalty
    stopped_B: Tensor  # bool: ended by a stop token
    rewards_BT: Tensor
    advantages_BT: Tensor  # not whitened
    returns_BT: Tensor

    def rows(self, index: Sequence[int]) -> "Trajectory":
        """The chosen episodes, trimmed to their longest."""
        part = Trajectory(*(field[list(index)] for field in self))
        response = int(part.mask_BT.sum(1).max())
        total = int((part.prompt_lengths_B + part.mask_BT.sum(1)).max())
        sizes = {"ids_BS": total}
        return Trajectory(
            *(
                field if field.dim() == 1 else field[:, : sizes.get(name, response)]
                for name, field in zip(self._fields, part, strict=True)
            )
        )

    def predicts_BS(self) -> Tensor:
        """bool (B, S): positions whose logits predict a response token (one to its left)."""
        return response_mask(self.prompt_lengths_B, self.mask_BT.sum(1), self.ids_BS.shape[1])

    def targets_N(self) -> Tensor:
        """The response ids that those positions predict."""
        return self.ids_BS[:, 1:][self.predicts_BS()[:, :-1]]


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """One rollout from those of all processes, each of which had every so-many-th prompt; in the
    order of the prompts."""
    fields = []
    for name, pieces in zip(Trajectory._fields, zip(*parts, strict=True), strict=True):
        if name.endswith(("S", "T")):
            width = max(piece.shape[1] for piece in pieces)
            pieces = [
                torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces
            ]
        fields.append(torch.stack(list(pieces), dim=1).flatten(0, 1))
    return Trajectory(*fields)


@torch.no_grad()
def rollout(
    model: ActorCritic,
    reference: GPT,
    reward_model: RewardModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    score_clip: float | None,
    missing_stop_penalty: float,
    batch_size: int,
    score_batch_size: int,
    sampler: GPT | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[..., object] | None = None,
    lap: Callable[[str], None] | None = None,
) -> Trajectory:
    """Sample an answer to each prompt and evaluate it with policy, reference, critic and reward
    model.

    Call it under the autocast of training: the log-probs that the ratio starts from are recomputed
    in its numerics. sampler: to sample from, where not from model.policy itself; part: (process,
    processes) where `prompts` are one process's; progress: called now and then; lap: when a part is
    done, with its name.
    """
    sampler = sampler or model.policy
    device = next(sampler.parameters()).device
    # Weights stay as they are: under autocast every one-token step would cast them again.
    with torch.autocast(device.type, enabled=False):
        answers = sample(
            sampler,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            part=part,
            stop_ids=stop_ids,
            batch_size=batch_size,
            progress=progress,
        )
    if lap:
        lap("sampling")
    lengths = torch.tensor([len(answer.ids) for answer in answers], device=device)
    mask_BT = length_mask(lengths, int(lengths.max()))
    zeros_BT = torch.zeros(mask_BT.shape, device=device)
    empty = Trajectory(
        ids_BS=pad(
            [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)],
            pad_id,
        ).to(device),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
        mask_BT=mask_BT,
        logprobs_BT=zeros_BT,
        ref_logprobs_BT=zeros_BT.clone(),
        entropy_BT=zeros_BT.clone(),
        values_BT=zeros_BT.clone(),
        scores_B=torch.zeros(len(prompts), device=device),
        stopped_B=torch.tensor([answer.stopped for answer in answers], device=device),
        rewards_BT=zeros_BT,
        advantages_BT=zeros_BT,
        returns_BT=zeros_BT,
    )
    full = evaluate(empty, model, reference, reward_model, temperature, score_batch_size, progress)
    shaped_B = shape_scores(full.scores_B, full.stopped_B, score_clip, missing_stop_penalty)
    k1_BT, _, _ = kl_estimates(full.logprobs_BT, full.ref_logprobs_BT)
    rewards_BT = token_rewards(shaped_B, k1_BT, mask_BT, kl_coef)
    advantages_BT, returns_BT = gae(rewards_BT, full.values_BT, mask_BT, gamma, gae_lambda)
    return full._replace(rewards_BT=rewards_BT, advantages_BT=advantages_BT, returns_BT=returns_BT)


def evaluate(
    trajectory: Trajectory,
    model: ActorCritic,
    reference: GPT,
    reward_model: RewardModel,
    temperature: float,
    batch_size: int,
    progress: Callable[..., object] | None = None,
) -> Trajectory:
    """`trajectory` with log-probs, entropy, values and scores filled in; rows of like length share
    a batch."""
    totals = trajectory.prompt_lengths_B + trajectory.mask_BT.sum(1)
    order = totals.argsort().tolist()
    new = trajectory._replace(
        **{
            name: getattr(trajectory, name).clone()
            for name in ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT")
        },
        scores_B=trajectory.scores_B.clone(),
    )
    for start in range(0, len(order), batch_size):
        if progress:
            progress()
        rows = order[start : start + batch_size]
        part = trajectory.rows(rows)
        predicts, targets = part.predicts_BS(), part.targets_N()
        logprobs_N, entropies_N, values_N, _ = model(part.ids_BS, predicts, targets, temperature)
        ref_logprobs_N = reference(part.ids_BS, predicts, targets=targets, temperature=temperature)
        # A boolean mask would fill rows in their own order, not in the sorted one: name each place
        # by row and column.
        columns = torch.nonzero(part.mask_BT)
        at = (torch.tensor(rows, device=columns.device)[columns[:, 0]], columns[:, 1])
        new.logprobs_BT[at], new.ref_logprobs_BT[at] = logprobs_N, ref_logprobs_N
        new.entropy_BT[at], new.values_BT[at] = entropies_N, values_N
        new.scores_B[rows] = reward_model(part.ids_BS, totals[rows]).float()
    return new
