"""Scores and log-probs of rows that are already there: batched by length, without gradients."""

import math
from collections.abc import Iterator, Sequence

import torch

from common.model.gpt import GPT, RewardModel
from common.model.ops import response_mask
from common.program.errors import Failure
from common.rows.batches import pad


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that a batch pads little; every index once."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def reward_scores(
    model: RewardModel, rows: Sequence[Sequence[int]], batch_size: int = 64
) -> list[float]:
    """The score at the last token of each row (prompt, answer and its stop token as ids), in the
    rows' order. Raises Failure for one that is not finite."""
    device = next(model.parameters()).device
    scores = [0.0] * len(rows)
    for batch in by_length([len(row) for row in rows], batch_size):
        lengths = torch.tensor([len(rows[i]) for i in batch], device=device)
        found = model(pad([rows[i] for i in batch], 0).to(device), lengths).tolist()
        for i, score in zip(batch, found, strict=True):
            if not math.isfinite(score):
                raise Failure(f"the reward model's score of answer {i + 1} is {score}, no number")
            scores[i] = score
    return scores


@torch.no_grad()
def logprobs_of(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[float]]:
    """log softmax(logits / temperature), in nats, of each token of each response behind its prompt.

    Prompts need at least one token: a response's first token is predicted from the prompt's last.
    """
    device = next(model.parameters()).device
    result: list[list[float]] = [[] for _ in prompts]
    sizes = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    for batch in by_length(sizes, batch_size):
        # The last token of a row predicts nothing that is asked for.
        ids = pad([[*prompts[i], *responses[i]][:-1] for i in batch], 0).to(device)
        starts = torch.tensor([len(prompts[i]) for i in batch], device=device)
        lengths = torch.tensor([len(responses[i]) for i in batch], device=device)
        keep = response_mask(starts, lengths, ids.shape[1])
        targets = [token for i in batch for token in responses[i]]
        targets = torch.tensor(targets, dtype=torch.long, device=device)
        found = model(ids, keep, targets=targets, temperature=temperature)
        parts = found.split([len(responses[i]) for i in batch])
        for i, values in zip(batch, parts, strict=True):
            result[i] = values.tolist()
    return result
