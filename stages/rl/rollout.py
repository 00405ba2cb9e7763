"""Prompts -> Rollout: answers sampled from the policy, and what the four models say of each token.

Shape legend: B episodes, S tokens of prompt and response, T response tokens, N response tokens of
all episodes, row by row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from common.model.ops import length_mask, response_mask
from common.model.sample import Sample, sample
from common.rows.batches import pad
from common.train.log import Laps
from common.train.run import Run
from stages.rl.models import Models

ROLLOUT_ROWS = 256  # answers sampled at once on one process, where the config does not say


class Sampling(NamedTuple):
    """How answers are sampled and evaluated; the same in every rollout of a run."""

    max_new_tokens: int  # longest answer
    temperature: float  # of sampling, and of all log-probs
    stop_ids: Sequence[int]  # an answer ends with any of these
    pad_id: int  # fills ids behind an answer
    evaluated_rows: int  # answers that the models evaluate at once on one process
    sampled_rows: int = ROLLOUT_ROWS  # answers that are sampled at once on one process


class Rollout(NamedTuple):
    """Answers to prompts, evaluated. Ids are padded with a pad id, all else with 0."""

    ids_BS: Tensor  # prompt and response, right-padded; the sampled ids themselves
    prompt_lengths_B: Tensor
    mask_BT: Tensor  # bool: response tokens, the stop token with them
    logprobs_BT: Tensor  # of the policy that sampled, in the numerics of training
    ref_logprobs_BT: Tensor  # of the reference
    entropy_BT: Tensor  # of the policy, in nats
    values_BT: Tensor  # of the critic, before each token is written; 0 without a critic
    scores_B: Tensor  # of the reward model, before clip and penalty
    stopped_B: Tensor  # bool: ended by a stop token, not cut off

    def rows(self, index: Sequence[int]) -> "Rollout":
        """The chosen episodes, trimmed to their longest."""
        part = Rollout(*(field[list(index)] for field in self))
        response = int(part.mask_BT.sum(1).max())
        widths = {"S": int(part.lengths_B().max()), "T": response}
        return Rollout(
            *(
                field[:, : widths[name[-1]]] if name[-1] in widths else field
                for name, field in zip(self._fields, part, strict=True)
            )
        )

    def lengths_B(self) -> Tensor:
        """Tokens of prompt and response: (B)."""
        return self.prompt_lengths_B + self.mask_BT.sum(1)

    def predicts_BS(self) -> Tensor:
        """bool (B, S): positions whose logits predict a response token (one to its left)."""
        return response_mask(self.prompt_lengths_B, self.mask_BT.sum(1), self.ids_BS.shape[1])

    def targets_N(self) -> Tensor:
        """The response ids that those positions predict."""
        return self.ids_BS[:, 1:][self.predicts_BS()[:, :-1]]


def roll_out_together(
    run: Run,
    models: Models,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    lap: Laps,
) -> Rollout:
    """One answer to each prompt, of which every process samples its share.

    Every process gets all episodes, in the order of the prompts: what is whitened, drawn and logged
    is then the same, however many processes there are.
    """
    with run.autocast():
        part = roll_out(
            models,
            prompts[run.rank :: run.processes],
            sampling,
            seed,
            part=(run.rank, run.processes),
            poll=run.poll,
            lap=lap,
        )
    gathered = gather_object([[field.cpu() for field in part]])
    parts = [Rollout(*(field.to(run.device) for field in fields)) for fields in gathered]
    return interleaved(parts, sampling.pad_id)


@torch.no_grad()
def roll_out(
    models: Models,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    part: tuple[int, int] = (0, 1),
    poll: Callable[..., object] | None = None,
    lap: Callable[[str], object] | None = None,
) -> Rollout:
    """Sample one answer to each prompt and evaluate it.

    Call it under the autocast of training: the log-probs that the ratio starts from are recomputed
    in its numerics. part: (process, processes) where `prompts` are one process's share; poll is
    called after each batch; lap("sampling") when all answers are there.
    """
    # Weights stay as they are: under autocast every one-token step would cast them again.
    with torch.autocast(next(models.sampler.parameters()).device.type, enabled=False):
        answers = sample(
            models.sampler,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=seed,
            part=part,
            stop_ids=sampling.stop_ids,
            batch_size=sampling.sampled_rows,
            progress=poll,
        )
    if lap:
        lap("sampling")
    return evaluate(models, prompts, answers, sampling, poll)


def evaluate(
    models: Models,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sample],
    sampling: Sampling,
    poll: Callable[..., object] | None = None,
) -> Rollout:
    """What the models say of the answers; rows of like length share a batch. poll is called before
    each batch."""
    lengths_B = torch.tensor([len(p) + len(a.ids) for p, a in zip(prompts, answers, strict=True)])
    order = lengths_B.argsort()
    parts = []
    for chunk in order.split(sampling.evaluated_rows):
        if poll:
            poll()
        rows = chunk.tolist()
        batch = [prompts[row] for row in rows], [answers[row] for row in rows]
        parts.append(evaluate_batch(models, *batch, sampling))
    return concatenated(parts, sampling.pad_id).rows(order.argsort().tolist())


def evaluate_batch(
    models: Models,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sample],
    sampling: Sampling,
) -> Rollout:
    """`evaluate` for rows that fit into memory at once."""
    device = next(models.sampler.parameters()).device
    rows = [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers, strict=True)]
    ids_BS = pad(rows, sampling.pad_id).to(device)
    prompt_lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    response_lengths_B = torch.tensor([len(answer.ids) for answer in answers], device=device)
    mask_BT = length_mask(response_lengths_B, int(response_lengths_B.max()))
    predicts_BS = response_mask(prompt_lengths_B, response_lengths_B, ids_BS.shape[1])
    targets_N = torch.tensor([token for answer in answers for token in answer.ids], device=device)
    temperature = sampling.temperature

    logprobs_N, entropies_N, values_N, _ = models.actor_critic(
        ids_BS, predicts_BS, targets_N, temperature
    )
    ref_logprobs_N = models.reference(
        ids_BS, predicts_BS, targets=targets_N, temperature=temperature
    )
    scores_B = models.reward_model(ids_BS, prompt_lengths_B + response_lengths_B)
    return Rollout(
        ids_BS=ids_BS,
        prompt_lengths_B=prompt_lengths_B,
        mask_BT=mask_BT,
        logprobs_BT=by_row(logprobs_N, mask_BT),
        ref_logprobs_BT=by_row(ref_logprobs_N, mask_BT),
        entropy_BT=by_row(entropies_N, mask_BT),
        values_BT=by_row(values_N, mask_BT),
        scores_B=scores_B.float(),
        stopped_B=torch.tensor([answer.stopped for answer in answers], device=device),
    )


def by_row(x_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of all response tokens, row by row, to where the mask is set; 0 elsewhere: (B, T)."""
    x_BT = torch.zeros(mask_BT.shape, device=x_N.device)
    x_BT[mask_BT] = x_N
    return x_BT


def concatenated(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """One rollout from several, one behind the other."""
    return Rollout(*(torch.cat(fields) for fields in zip(*same_width(parts, pad_id), strict=True)))


def interleaved(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """One rollout from those of all n processes, which had every n-th prompt each; in the order of
    the prompts."""
    fields = zip(*same_width(parts, pad_id), strict=True)
    return Rollout(*(torch.stack(pieces, dim=1).flatten(0, 1) for pieces in fields))


def same_width(parts: Sequence[Rollout], pad_id: int) -> list[Rollout]:
    """The rollouts with their fields padded to those of the widest."""
    widths = {"S": max(p.ids_BS.shape[1] for p in parts)}
    widths["T"] = max(p.mask_BT.shape[1] for p in parts)

    def widened(name: str, field: Tensor) -> Tensor:
        """The field padded on the right, if it has columns."""
        if name[-1] not in widths:
            return field
        missing = widths[name[-1]] - field.shape[1]
        return pad_tensor(field, (0, missing), value=pad_id if name == "ids_BS" else 0)

    return [
        Rollout(*(widened(name, field) for name, field in zip(part._fields, part, strict=True)))
        for part in parts
    ]
