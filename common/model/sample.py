"""Batched sampling with a KV cache. Finished rows leave the batch; ids and their log-probs come
back.

Every row draws from a stream of its own (one row of a seeded matrix of uniforms), so what it says
does not depend on which rows share its batch or on when they finish. Nothing is read from
generation_config: what is not an argument here does not happen (RLHF: a sampler that differs from
the trained policy shows as negative KL).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.model.cache import KVCache
from common.model.cpu.kernels import pick_ids
from common.model.cpu.packed import packed
from common.model.gpt import GPT
from common.model.ops import token_logprobs
from common.program.errors import InputError
from common.rows.batches import pad


class Sample(NamedTuple):
    ids: list[int]  # the response, with its stop token when it stopped
    logprobs: list[
        float
    ]  # of each id under the distribution it was drawn from (greedy: at temperature 1), nats
    stopped: bool  # False: cut off by max_new_tokens or the context


def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    batch_size: int = 128,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int], object] | None = None,
) -> list[Sample]:
    """One response for each prompt (lists of ids), in the prompts' order.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. `progress` is called with the number of
    rows just finished. part (r, n): these are every n-th of more prompts, from the r-th on; they
    get the answers that they would get among all. Raises InputError for an empty prompt or one that
    fills the model's context.
    """
    check(model, prompts, temperature, top_k, top_p)
    first, stride = part
    uniforms = torch.rand(
        len(prompts) * stride, max_new_tokens, generator=torch.Generator().manual_seed(seed)
    )[first::stride]
    # Neighbours of like length share a batch: little padding in the prefill.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    results: list[Sample | None] = [None] * len(prompts)
    with packed(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = sample_batch(
                model,
                [prompts[row] for row in rows],
                uniforms[rows],
                temperature,
                top_k,
                top_p,
                stop_ids,
            )
            for row, answer in zip(rows, batch, strict=True):
                results[row] = answer
            if progress:
                progress(len(rows))
    return results


@torch.inference_mode()
def sample_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_ids: Sequence[int],
) -> list[Sample]:
    """`sample` for one batch; uniforms (B, max_new_tokens) in [0, 1)."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    limits = (model.config.max_length - lengths).clamp(
        max=uniforms.shape[1]
    )  # of each row, whoever shares its batch
    budget = int(limits.max())
    uniforms = uniforms.to(device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    cache = KVCache(
        model.config, len(prompts), int((lengths + limits).max()), next(model.parameters())
    )

    hidden = model.trunk(pad(prompts, 0).to(device), cache)
    cache.lengths = lengths  # forget the padding
    hidden = hidden[torch.arange(len(prompts)), lengths - 1]
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch still is
    left, draws = limits, uniforms.t().contiguous()  # theirs: (B), (steps, B)
    ids = torch.zeros(budget, len(prompts), dtype=torch.long, device=device)
    logprobs = torch.zeros(budget, len(prompts), device=device)
    ends = limits.clone()
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    waiting = torch.zeros_like(stopped)  # rows of the batch that have ended but not left it yet
    for step in range(budget):
        tokens, chosen = pick(model.head(hidden), draws[step], temperature, top_k, top_p)
        ids[step].index_copy_(0, rows, tokens)  # what waiting rows say is cut off at the end
        logprobs[step].index_copy_(0, rows, chosen)
        said_stop = torch.isin(tokens, stops)
        ended = (said_stop | (left == step + 1)) & ~waiting
        leaving = cache.longest == model.config.max_length  # for want of room in the context
        if ended.any():
            stopped[rows[ended]], ends[rows[ended]] = said_stop[ended], step + 1
            waiting = waiting | ended
            if waiting.all():
                break
            leaving |= bool(
                waiting.float().mean() > 0.2
            )  # it copies the cache of all who stay: worth it for many at once
        if leaving:
            staying = (~waiting).nonzero().squeeze(1)
            rows, tokens, waiting = rows[staying], tokens[staying], waiting[staying]
            left, draws = left[staying], draws[:, staying]
            cache.keep(staying)
        hidden = model.trunk(tokens[:, None], cache)[:, 0]
    model.train(training)
    ids, logprobs, ends, stopped = (
        ids.t().tolist(),
        logprobs.t().tolist(),
        ends.tolist(),
        stopped.tolist(),
    )
    return [
        Sample(i[:end], p[:end], s)
        for i, p, end, s in zip(ids, logprobs, ends, stopped, strict=True)
    ]


def stream(
    model: GPT,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """One response, id by id (the stop token is not yielded); the same ids as `sample` gives for
    this prompt alone."""
    check(model, [prompt], temperature, top_k, top_p)
    device = next(model.parameters()).device
    uniforms = torch.rand(1, max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    budget = min(max_new_tokens, model.config.max_length - len(prompt))
    cache = KVCache(model.config, 1, len(prompt) + budget, next(model.parameters()))
    tokens = torch.tensor([list(prompt)], device=device)
    for step in range(budget):
        with torch.inference_mode():
            logits = model.head(model.trunk(tokens, cache)[:, -1])
            token, _ = pick(logits, uniforms[:, step], temperature, top_k, top_p)
        if int(token) in stop_ids:
            return
        yield int(token)
        tokens = token[:, None]


def check(
    model: GPT, prompts: Sequence[Sequence[int]], temperature: float, top_k: int, top_p: float
) -> None:
    check_prompts(model, prompts)
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise InputError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: need >= 0, >= 0, 0 < top_p <= 1"
        )


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]]) -> None:
    """InputError for a prompt that is empty or fills the model's context."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(
                f"prompt {row} is empty: a model needs at least one token to go on from"
            )
        if len(prompt) >= model.config.max_length:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, the model's context is {model.config.max_length}"
            )


def pick(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Sampled ids (B) and their log-probs (B) from logits (B, V), by inverting the cumulative
    distribution at uniforms."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, token_logprobs(logits, tokens)
    if top_k or top_p < 1:
        logits, temperature = truncate(logits.float() / temperature, top_k, top_p), 1.0
    return pick_ids(logits, uniforms, temperature)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k ids and outside the smallest set of ids with mass >= top_p (Holtzman
    2020): (B, V)."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits
