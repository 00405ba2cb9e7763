"""Batched sampling with a KV cache. Finished rows leave the batch; ids and their log-probs come
back.

Every row draws from a stream of its own (one row of a seeded matrix of uniforms), so what it says
does not depend on which rows share its batch or on when they finish. Nothing is read from
generation_config: what is not an argument here does not happen (RLHF: a sampler that differs from
the trained policy shows as negative KL). Shape legend: B rows, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.model.cache import KVCache
from common.model.cpu.packed import packed
from common.model.dispatch import operations
from common.model.gpt import GPT
from common.model.layers import sharpened
from common.model.ops import token_logprobs
from common.program.errors import Failure, InputError
from common.rows.batches import pad

Prompts = Sequence[Sequence[int]]  # each a list of ids


class Sampling(NamedTuple):
    """How to sample."""

    max_new_tokens: int
    """At most so many ids a response; the model's context may allow fewer."""
    temperature: float = 1.0
    """What logits are divided by; 0 is greedy."""
    top_k: int = 0
    """Draw from the k likeliest ids; 0 = from all."""
    top_p: float = 1.0
    """Draw from the likeliest ids that together have this probability; 1 = from all."""
    seed: int = 0
    """Of the random draws."""
    stop_ids: Sequence[int] = ()
    """Ids that end a response."""

    def check(self) -> None:
        """Raise InputError for settings that make no distribution."""
        warm = 0 <= self.temperature < math.inf
        if not warm or self.top_k < 0 or not 0 < self.top_p <= 1:
            given = f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}"
            raise InputError(f"{given}: need >= 0, >= 0, 0 < top_p <= 1")

    def uniforms(self, rows: int) -> Tensor:
        """The draws in [0, 1) of all rows: (rows, max_new_tokens)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(rows, self.max_new_tokens, generator=generator)


class Sample(NamedTuple):
    """A response."""

    ids: list[int]
    """With its stop token when it stopped."""
    logprobs: list[float]
    """Of each id under the distribution it was drawn from (greedy: at temperature 1), in nats."""
    stopped: bool
    """False: cut off by max_new_tokens or the context."""


def sample(
    model: GPT,
    prompts: Prompts,
    *,
    batch_size: int = 128,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> list[Sample]:
    """One response for each prompt (lists of ids), in the prompts' order.

    `settings` are the fields of Sampling: max_new_tokens, temperature, top_k, top_p, seed,
    stop_ids. `progress` is called with the number of rows just finished. part (r, n): these are
    every n-th of more prompts, from the r-th on; they get the answers that they would get among
    all. Raises InputError for an empty prompt or one that fills the model's context, Failure for
    logits that are not finite.
    """
    how = Sampling(**settings)
    check_prompts(model, prompts)
    how.check()
    first, stride = part
    uniforms = how.uniforms(len(prompts) * stride)[first::stride]
    # Neighbours of like length share a batch: little padding in the prefill.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    results: dict[int, Sample] = {}  # by row
    with packed(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = sample_batch(model, [prompts[row] for row in rows], uniforms[rows], how)
            for row, answer in zip(rows, batch, strict=True):
                results[row] = answer
            if progress:
                progress(len(rows))
    return [results[row] for row in range(len(prompts))]


@torch.inference_mode()
def sample_batch(model: GPT, prompts: Prompts, uniforms: Tensor, how: Sampling) -> list[Sample]:
    """`sample` for one batch; uniforms (B, max_new_tokens) in [0, 1)."""
    weights, training = next(model.parameters()), model.training
    model.eval()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weights.device)
    # A limit of each row, whoever shares its batch.
    limits = (model.config.max_length - lengths).clamp(max=how.max_new_tokens)
    cache = KVCache(model.config, len(prompts), int((lengths + limits).max()), weights)
    hidden = model.trunk(pad(prompts, 0).to(weights.device), cache)
    cache.lengths = lengths  # forget the padding
    hidden = hidden[torch.arange(len(prompts)), lengths - 1]
    batch = _Batch(limits, uniforms.to(weights.device), how.stop_ids)
    for step in range(batch.steps):
        ids, logprobs = pick(model.head(hidden), batch.draws[step], how)
        ended = batch.note(step, ids, logprobs)
        if ended and batch.waiting.all():
            break
        # A full cache has no room for the next tokens of rows that wait.
        if cache.longest == model.config.max_length or (ended and batch.many_wait()):
            staying = batch.leave()
            ids = ids[staying]
            cache.keep(staying)
        hidden = model.trunk(ids[:, None], cache)[:, 0]
    model.train(training)
    return batch.samples()


class _Batch:
    """The rows of a batch while they are sampled: who still speaks, and what each has said.

    Rows that have ended wait in the batch, saying what is cut off at the end, until enough of them
    leave together.
    """

    def __init__(self, limits: Tensor, uniforms: Tensor, stop_ids: Sequence[int]) -> None:
        """limits (B): ids that each row may say; uniforms (B, max_new_tokens)."""
        rows, device = len(limits), limits.device
        self.steps = int(limits.max())
        self.stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        # Of the rows still in the batch: which they were, their limits and draws (steps, B), and
        # whether they wait.
        self.rows = torch.arange(rows, device=device)
        self.limits, self.draws = limits, uniforms.t().contiguous()
        self.waiting = torch.zeros(rows, dtype=torch.bool, device=device)
        # Of all rows.
        self.ids = torch.zeros(self.steps, rows, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(self.steps, rows, device=device)
        self.ends = limits.clone()
        self.stopped = torch.zeros_like(self.waiting)

    def note(self, step: int, ids: Tensor, logprobs: Tensor) -> bool:
        """Write down what each row says; return whether a row has ended with it."""
        self.ids[step].index_copy_(0, self.rows, ids)
        self.logprobs[step].index_copy_(0, self.rows, logprobs)
        said_stop = torch.isin(ids, self.stops)
        ended = (said_stop | (self.limits == step + 1)) & ~self.waiting
        if not ended.any():
            return False
        self.stopped[self.rows[ended]], self.ends[self.rows[ended]] = said_stop[ended], step + 1
        self.waiting = self.waiting | ended
        return True

    def many_wait(self) -> bool:
        """Whether leaving is worth it: it copies the cache of all who stay."""
        return bool(self.waiting.float().mean() > 0.2)

    def leave(self) -> Tensor:
        """Rows that wait leave the batch; return the places of those that stay."""
        staying = (~self.waiting).nonzero().squeeze(1)
        self.rows, self.waiting = self.rows[staying], self.waiting[staying]
        self.limits, self.draws = self.limits[staying], self.draws[:, staying]
        return staying

    def samples(self) -> list[Sample]:
        """What all rows have said. Raises Failure for logits that were not finite."""
        columns = (self.ids.t(), self.logprobs.t(), self.ends, self.stopped)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found = [Sample(ids[:end], logprobs[:end], stopped) for ids, logprobs, end, stopped in rows]
        for answer in found:
            refuse_nan(answer.logprobs)
        return found


def stream(model: GPT, prompt: Sequence[int], **settings: Any) -> Iterator[int]:
    """One response, id by id (the stop token is not yielded); the same ids as `sample` gives for
    this prompt alone. `settings` are the fields of Sampling."""
    how = Sampling(**settings)
    check_prompts(model, [prompt])
    how.check()
    weights = next(model.parameters())
    uniforms = how.uniforms(1).to(weights.device)
    steps = min(how.max_new_tokens, model.config.max_length - len(prompt))
    cache = KVCache(model.config, 1, len(prompt) + steps, weights)
    ids = torch.tensor([list(prompt)], device=weights.device)
    for step in range(steps):
        with torch.inference_mode():
            logits = model.head(model.trunk(ids, cache)[:, -1])
            token, logprob = pick(logits, uniforms[:, step], how)
        refuse_nan(logprob.tolist(), step)
        if int(token) in how.stop_ids:
            return
        yield int(token)
        ids = token[:, None]


def check_prompts(model: GPT, prompts: Prompts) -> None:
    """Raise InputError for a prompt that is empty, fills the model's context, or has an id that is
    beyond its vocabulary."""
    context = model.config.max_length
    for row, prompt in enumerate(prompts):
        if not prompt:
            need = "a model needs at least one token to go on from"
            raise InputError(f"prompt {row} is empty: {need}")
        if len(prompt) >= context:
            size = len(prompt)
            raise InputError(f"prompt {row} has {size} tokens, the model's context is {context}")
        if (largest := max(prompt)) >= (known := model.config.vocab_size):
            why = f"the model knows {known} tokens; its tokenizer has more"
            raise InputError(f"prompt {row} has the token {largest}: {why}")


def refuse_nan(logprobs: Sequence[float], start: int = 0) -> None:
    """Raise Failure for a NaN among the log-probs of a response's ids from `start` on: that is what
    `pick` gives for logits that are not finite."""
    for step, logprob in enumerate(logprobs, start):
        if math.isnan(logprob):
            where = f"at token {step + 1} of an answer"
            raise Failure(f"the model's logits are not finite {where}: its weights are of no use")


def pick(logits: Tensor, uniforms: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Ids (B) drawn from logits (B, V), and their log-probs (B), by inverting the cumulative
    distribution at uniforms (B). With NaN or +inf among the logits the log-prob is NaN."""
    if how.temperature == 0:
        ids = logits.argmax(-1)
        return ids, token_logprobs(logits, ids)
    temperature = how.temperature
    if how.top_k or how.top_p < 1:
        logits = truncate(sharpened(logits, temperature), how.top_k, how.top_p)
        temperature = 1.0
    return operations(logits).pick_ids(logits, uniforms, temperature)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k ids and outside the smallest set of ids with mass >= top_p (Holtzman
    2020): (B, V)."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = before >= top_p
        beyond[:, 0] = False  # one is left, however small top_p is
        outside = torch.zeros_like(beyond).scatter(1, index, beyond)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits
