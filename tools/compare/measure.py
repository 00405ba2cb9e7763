"""How good answers are: reward, ground truth, KL, means with 95 % intervals, best-of-n.

The ground truth ("gold") is a module that the caller names, with `judge(prompt, answer, stopped)`
-> an object with `score` (0..1), `correct` and `family`. No stage may look at it: a proxy always
improves, whether answers do is shown here.
"""

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.gpt import GPT, RewardModel
from common.model.sample import Sample, sample
from common.program.errors import Failure, InputError
from common.rewards.scoring import logprobs_of, reward_scores
from common.rows.sources import read_rows
from common.text.chat import Message, prompt_ids, rows_to_prompt, stop_ids
from common.text.tokenizer import Tokenizer, same_ids, translate

Gold = Callable[[str, str, bool], Any]
RESAMPLES = 2000


class Answer(NamedTuple):
    """An answer, and what the judges say about it; None where there is no such judge."""

    text: str
    tokens: int  # with the stop token
    stopped: bool  # by itself, not cut off
    # nats: sum of log-probs of the model that answered less those of the reference
    kl: float | None
    reward: float | None
    gold: float | None
    correct: bool | None


class Judges(NamedTuple):
    """Whoever has something to say about an answer; each may be absent."""

    reward: tuple[RewardModel, Tokenizer] | None = None
    reference: tuple[GPT, Tokenizer] | None = None
    gold: Gold | None = None


def load_judges(
    reward: str | None, reference: str | None, gold: str | None, device: torch.device
) -> Judges:
    """Judges from directories and a module name. Raises InputError where one cannot be loaded."""
    return Judges(
        (load_model(reward, "reward").to(device), load_tokenizer(reward)) if reward else None,
        (load_model(reference, "lm").to(device), load_tokenizer(reference)) if reference else None,
        load_gold(gold) if gold else None,
    )


def load_gold(name: str) -> Gold:
    """`judge` of the named module; InputError where it has none."""
    try:
        return import_module(name).judge
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"gold {name}: not a module with a function judge(prompt, answer, stopped) ({error})"
        ) from None


def read_prompts(source: str, limit: int | None = None) -> list[list[Message]]:
    """Prompts of a file of rows, or of a .txt file, one a line. Raises InputError naming file and
    line."""
    if source.endswith(".txt") and Path(source).is_file():
        lines = [line for line in read_rows(source)[0].data["text"].split("\n") if line.strip()]
        if not lines:
            raise InputError(f"{source}: no prompts")
        return [[{"role": "user", "content": line}] for line in lines[:limit]]
    prompts = []
    for row in read_rows(source)[:limit]:
        try:
            prompts.append(rows_to_prompt(row.data))
        except InputError as error:
            raise InputError(f"{row.origin}: {error}") from None
    return prompts


def question(messages: Sequence[Message]) -> str:
    """What the ground truth is asked about: the user's last message."""
    return messages[-1]["content"]


def families(gold: Gold, prompts: Sequence[Sequence[Message]]) -> list[str]:
    """The family of each prompt. InputError for a prompt that the ground truth does not know."""
    found = []
    for number, messages in enumerate(prompts, 1):
        try:
            found.append(gold(question(messages), "", True).family)
        except ValueError as error:
            raise InputError(
                f"prompt {number}: the ground truth cannot judge it ({error}); leave out --gold"
            ) from None
    return found


def answer_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    judges: Judges,
    *,
    is_reference: bool = False,
    temperature: float = 1.0,
    **options: Any,
) -> list[Answer]:
    """One answer of the model to each prompt, judged. `options` go to `sample`.

    Each model sees the prompt in its own form (chat tokens, or plain text for a base).
    """
    own = [prompt_ids(tokenizer, messages) for messages in prompts]
    drawn = sample(model, own, temperature=temperature, stop_ids=stop_ids(tokenizer), **options)
    texts = [tokenizer.decode(answer.ids) for answer in drawn]
    spoken = Spoken(prompts, drawn, tokenizer)
    kls: Sequence[float | None] = [0.0 if is_reference else None] * len(drawn)
    if judges.reference and not is_reference:
        truncated = options.get("top_k", 0) > 0 or options.get("top_p", 1.0) < 1
        mine = whole_logprobs(model, own, drawn, temperature or 1.0, truncated)
        kls = kl_to(judges.reference, spoken, mine, temperature or 1.0)
    rewards = rewards_of(judges.reward, spoken) if judges.reward else [None] * len(drawn)
    truths = [None] * len(drawn)
    if judges.gold:
        asked = zip(prompts, texts, drawn, strict=True)
        truths = [judges.gold(question(m), text, a.stopped) for m, text, a in asked]
    found = [
        Answer(
            *(text, len(a.ids), a.stopped, kl, reward),
            gold=truth and float(truth.score),
            correct=truth and bool(truth.correct),
        )
        for text, a, kl, reward, truth in zip(texts, drawn, kls, rewards, truths, strict=True)
    ]
    refuse_nonsense(prompts, found)
    return found


def refuse_nonsense(prompts: Sequence[Sequence[Message]], answers: Sequence[Answer]) -> None:
    """Raise Failure naming a number of an answer that is not finite: no mean could be taken."""
    for messages, answer in zip(prompts, answers, strict=True):
        for name in ("kl", "reward", "gold"):
            value = getattr(answer, name)
            if value is not None and not is_finite(value):
                what = f"{name} of an answer to {question(messages)!r} is {value}"
                raise Failure(f"{what}, so the models cannot be compared by it")


def is_finite(value: Any) -> bool:
    """Whether a value, from a file say, is a number that means and plots can be made of."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


class Spoken(NamedTuple):
    """What was asked and answered, for judges whose tokens may be others."""

    prompts: Sequence[Sequence[Message]]
    drawn: Sequence[Sample]
    tokenizer: Tokenizer  # of the model that answered

    def ids_for(self, other: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, answers) as ids of `other`."""
        prompts = [prompt_ids(other, messages) for messages in self.prompts]
        answers = [list(answer.ids) for answer in self.drawn]
        if not same_ids(self.tokenizer, other):
            answers = [translate(ids, self.tokenizer, other) for ids in answers]
        return prompts, answers


def noted(value: Any) -> Any:
    """A fact of a stage.json as reports may hold it; None for what no stage of ours notes."""
    return value if isinstance(value, str | bool) or is_finite(value) else None


def kl_to(
    reference: tuple[GPT, Tokenizer],
    spoken: Spoken,
    logprobs: Sequence[Sequence[float]],
    temperature: float,
) -> list[float]:
    """log-prob of each answer, its tokens' `logprobs` summed, less that under the reference.

    KL is taken at the sampling temperature (1 for greedy), between whole distributions: top_k and
    top_p change what is said, not what it is measured by.
    """
    model, tokenizer = reference
    other = logprobs_of(model, *spoken.ids_for(tokenizer), temperature)
    return [sum(p) - sum(q) for p, q in zip(logprobs, other, strict=True)]


def rewards_of(reward: tuple[RewardModel, Tokenizer], spoken: Spoken) -> list[float]:
    """The reward model's score of each answer."""
    model, tokenizer = reward
    pairs = zip(*spoken.ids_for(tokenizer), strict=True)
    return reward_scores(model, [[*prompt, *answer] for prompt, answer in pairs])


def whole_logprobs(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    drawn: Sequence[Sample],
    temperature: float,
    truncated: bool,
) -> list[list[float]]:
    """Log-probs of the drawn ids under the model's whole distribution; the sampler's own where
    nothing was cut from it."""
    if truncated:
        return logprobs_of(model, prompts, [answer.ids for answer in drawn], temperature)
    return [answer.logprobs for answer in drawn]


def interval(
    values: Sequence[float], counts: Sequence[float] | None = None, seed: int = 0
) -> dict[str, Any]:
    """{"mean", "ci95": [low, high], "n"}: bootstrap over the items (2000 resamples, percentiles).

    With `counts` (each > 0) an item is a group and `values` its sum: the mean is sum(values) /
    sum(counts), n is sum(counts), and whole groups are drawn, as answers to one prompt are not
    independent.
    """
    x = np.asarray(values, dtype=float)
    n = np.ones_like(x) if counts is None else np.asarray(counts, dtype=float)
    if not len(x):
        return {"mean": None, "ci95": [None, None], "n": 0}
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES))
    ends = np.percentile([x[rows].sum() / n[rows].sum() for rows in draws], [2.5, 97.5])
    return {
        "mean": round(x.sum() / n.sum(), 6),
        "ci95": [round(float(end), 6) for end in ends],
        "n": int(n.sum()),
    }


def mean(values: Sequence[float]) -> float:
    """The mean, rounded as compare.json has it."""
    return round(sum(values) / len(values), 6)


def best_of_n(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected value of the answer of highest reward among n: rewards, values (P, K) -> (P).

    The mean over all C(K, n) choices of n of the K answers, hence unbiased (Nakano 2021, appendix
    I): the answer with the i-th lowest reward (from 0) is the best of C(i, n-1) of them. Equal
    rewards: the later answer wins.
    """
    size = rewards.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    return np.take_along_axis(values, rewards.argsort(axis=1, kind="stable"), axis=1) @ weights


def best_of_table(answers: Sequence[Answer], size: int) -> dict[str, dict[str, Any]]:
    """{n: {"gold", "reward", "kl"}} for n = 1, 2, 4 .. size; `size` answers to a prompt, one prompt
    behind the other.

    KL of best-of-n to the model that answers: ln n - (n-1)/n nats (Stiennon 2020, appendix G.3).
    """
    rewards = np.array([answer.reward for answer in answers]).reshape(-1, size)
    table = {}
    for n in sorted({2**i for i in range(size.bit_length())} | {size}):
        figures: dict[str, Any] = {"reward": interval(best_of_n(rewards, rewards, n))}
        if answers[0].gold is not None:
            golds = np.array([answer.gold for answer in answers]).reshape(-1, size)
            figures["gold"] = interval(best_of_n(rewards, golds, n))
        table[str(n)] = figures | {"kl": round(best_of_n_kl(n), 6)}
    return table


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n || policy), nats an answer: ln n - (n - 1) / n (Stiennon 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n
