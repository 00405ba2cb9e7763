"""Sampling: the right distribution, the same ids and log-probs as without cache and batch, stops,
limits, errors."""

import itertools
import math

import pytest
import torch

from common.model.cpu import compile
from common.model.sample import Sampling, pick, sample, stream
from common.program.errors import Failure, InputError

SHAPES = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "n_kv_head": 4},
    "grouped": {"family": "llama", "n_kv_head": 2},
}
shapes = pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
LENGTHS = [9, 1, 17, 4, 4, 12, 2, 30]
STOPS = list(
    range(5, 300, 13)
)  # about one token in thirteen ends an answer: rows leave the batch all the time


def prompts(lengths=LENGTHS, seed=5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def last_logits(model, ids: list[int]) -> list[float]:
    """Next-token logits by a plain forward pass: no batch, no padding, no cache."""
    return model(torch.tensor([ids]))[0, -1].tolist()


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in logits]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(value - top) for value in scaled))
    return [value - total for value in scaled]


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """Standard score of Pearson's statistic (Wilson-Hilferty); ids expected fewer than 5 times
    share one bin."""
    n, bins, rest = sum(counts), [], [0, 0.0]
    for count, p in zip(counts, probabilities, strict=True):
        if n * p >= 5:
            bins.append((count, n * p))
        else:
            rest = [rest[0] + count, rest[1] + n * p]
    if rest[1] > 0:
        bins.append(tuple(rest))
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    k = len(bins) - 1
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


# What is sampled


@shapes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_softmax(tiny_gpt, settings, temperature):
    model, prompt = tiny_gpt(**settings), prompts()[3]
    first = sample(
        model, [prompt] * 12000, max_new_tokens=1, temperature=temperature, seed=1, batch_size=3000
    )
    counts = [0] * 300
    for answer in first:
        counts[answer.ids[0]] += 1
    logits = last_logits(model, prompt)
    right = [math.exp(value) for value in log_softmax(logits, temperature)]
    wrong = [math.exp(value) for value in log_softmax(logits, temperature * 1.25)]
    assert abs(chi_square(counts, right)) < 4
    assert (
        chi_square(counts, wrong) > 8
    )  # the test would see a temperature that is off by a quarter


def test_second_token_follows_its_conditional_distribution(tiny_gpt):
    model, prompt = tiny_gpt("llama"), prompts()[3]
    both = sample(
        model, [prompt] * 6000, max_new_tokens=2, temperature=0.4, seed=2, batch_size=3000
    )
    firsts = [answer.ids[0] for answer in both]
    token = max(set(firsts), key=firsts.count)
    counts = [0] * 300
    for answer in both:
        if answer.ids[0] == token:
            counts[answer.ids[1]] += 1
    right = [math.exp(value) for value in log_softmax(last_logits(model, [*prompt, token]), 0.4)]
    assert sum(counts) > 500 and abs(chi_square(counts, right)) < 4


def test_inverse_of_the_cumulative_distribution_by_hand():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()  # id 1 has probability 0
    for draw, expected in [
        (0.0, 0),
        (0.4999, 0),
        (0.5, 2),
        (0.7499, 2),
        (0.75, 3),
        (1 - 2**-24, 3),
    ]:
        token, logprob = pick(logits, torch.tensor([draw]), Sampling(1))
        assert token.item() == expected, draw
        assert logprob.item() == pytest.approx(math.log([0.5, 0, 0.25, 0.25][expected]), abs=1e-6)
    # an impossible id at the start and at the end of the vocabulary is never met
    edge = torch.tensor([[0.0, 1.0, 0.0]]).log()
    assert {
        pick(edge, torch.tensor([u]), Sampling(1))[0].item() for u in (0.0, 0.3, 1 - 2**-24)
    } == {1}


GRID = torch.arange(2000) / 2000  # every id of probability > 1/2000 is met


def met(probabilities: list[float], **options) -> dict[int, float]:
    """Sampled ids and their probabilities (from the log-probs returned) over an even grid of
    draws."""
    logits = torch.tensor(probabilities).log().expand(len(GRID), -1)
    tokens, logprobs = pick(logits, GRID, Sampling(1, **options))
    return {int(t): round(math.exp(p), 4) for t, p in zip(tokens, logprobs, strict=True)}


FIVE = [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 0.5714, 3: 0.4286}),  # 4/7, 3/7
        ({"top_k": 5}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        ({"top_k": 50}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.39}, {1: 1.0}),
        ({"top_p": 0.41}, {1: 0.5714, 3: 0.4286}),
        ({"top_p": 0.69}, {1: 0.5714, 3: 0.4286}),
        ({"top_p": 0.71}, {1: 0.4706, 3: 0.3529, 4: 0.1765}),  # over .85
        ({"top_p": 0.94}, {0: 0.1053, 1: 0.4211, 3: 0.3158, 4: 0.1579}),  # over .95
        ({"top_p": 0.96}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.3, 4: 0.15}),
        (
            {"top_k": 3, "top_p": 0.8},
            {1: 0.5714, 3: 0.4286},
        ),  # of the three 8/17, 6/17, 3/17: two reach .8
        (
            {"temperature": 0.5},
            {0: 0.0351, 1: 0.5614, 2: 0.0088, 3: 0.3158, 4: 0.0789},
        ),  # squares over .285
        (
            {"temperature": 0.5, "top_p": 0.8},
            {1: 0.64, 3: 0.36},
        ),  # top-p after temperature: 16/25, 9/25
    ],
    ids=str,
)
def test_truncated_sets_are_exact(options, expected):
    assert met(FIVE, **options) == pytest.approx(expected, abs=1e-4)


def test_truncation_is_by_row():
    logits = torch.tensor([FIVE, FIVE[::-1]]).log()
    for u in (0.0, 0.5, 0.999):
        assert pick(logits, torch.full((2,), u), Sampling(1, top_k=1))[0].tolist() == [1, 3]
        assert pick(logits, torch.full((2,), u), Sampling(1, top_p=0.3))[0].tolist() == [1, 3]


@shapes
def test_temperature_0_is_the_argmax_loop(tiny_gpt, settings):
    model = tiny_gpt(**settings)
    for answer, prompt in zip(
        sample(model, prompts(), max_new_tokens=12, temperature=0), prompts(), strict=True
    ):
        ids, logprobs = list(prompt), []
        for _ in range(12):
            logits = last_logits(model, ids)
            best = max(range(300), key=logits.__getitem__)
            ids.append(best)
            logprobs.append(log_softmax(logits)[best])
        assert answer.ids == ids[len(prompt) :]
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


# Log-probs and independence


@shapes
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@torch.no_grad()
def test_logprobs_equal_those_of_a_full_forward(tiny_gpt, settings, temperature):
    """Ragged prompts in one batch, rows leaving it at the stop tokens: each log-prob as an unpadded
    forward gives it."""
    model = tiny_gpt(**settings)
    answers = sample(
        model, prompts(), max_new_tokens=20, temperature=temperature, seed=7, stop_ids=STOPS
    )
    assert len({len(answer.ids) for answer in answers}) > 3
    for answer, prompt in zip(answers, prompts(), strict=True):
        logits = model(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 : -1].tolist()
        expected = [
            log_softmax(row, temperature)[token]
            for row, token in zip(logits, answer.ids, strict=True)
        ]
        assert answer.logprobs == pytest.approx(expected, abs=2e-4)


def test_logprobs_under_truncation_are_of_the_truncated_distribution(tiny_gpt):
    model, prompt = tiny_gpt("llama"), prompts()[0]
    for answer in sample(model, [prompt] * 20, max_new_tokens=1, top_k=3, seed=1):
        logits = last_logits(model, prompt)
        best = sorted(range(300), key=logits.__getitem__, reverse=True)[:3]
        assert answer.ids[0] in best
        expected = log_softmax([logits[i] for i in best])[best.index(answer.ids[0])]
        assert answer.logprobs[0] == pytest.approx(expected, abs=1e-4)


@shapes
def test_a_row_does_not_depend_on_its_batch(tiny_gpt, settings):
    model, options = tiny_gpt(**settings), {"max_new_tokens": 15, "seed": 11, "stop_ids": STOPS}
    together = [answer.ids for answer in sample(model, prompts(), **options)]
    for batch_size in (1, 2, 3):
        assert [
            answer.ids for answer in sample(model, prompts(), batch_size=batch_size, **options)
        ] == together
    for count in (1, 3, 7):
        assert [answer.ids for answer in sample(model, prompts()[:count], **options)] == together[
            :count
        ]
    # other neighbours in the places before and behind
    others = [prompts([23], seed=i)[0] if i != 5 else prompts()[5] for i in range(8)]
    assert sample(model, others, **options)[5].ids == together[5]


def test_a_long_neighbour_does_not_take_a_row_s_room(tiny_gpt):
    """Context 32: a prompt of 4 has room for 20 tokens, also beside a prompt of 30, which has room
    for 2."""
    model = tiny_gpt("llama", max_length=32)
    short, long = prompts([4, 30])
    alone = sample(model, [short], max_new_tokens=20, seed=3)[0]
    beside = sample(model, [short, long], max_new_tokens=20, seed=3)
    assert [len(alone.ids), len(beside[1].ids)] == [20, 2]
    assert beside[0].ids == alone.ids


def test_rows_seeds_and_calls_differ_as_they_should(tiny_gpt):
    model, same = tiny_gpt("llama"), [prompts()[0]] * 6
    answers = [tuple(answer.ids) for answer in sample(model, same, max_new_tokens=12, seed=1)]
    assert len(set(answers)) == 6
    torch.manual_seed(99)  # the global stream is neither used ...
    before = torch.get_rng_state()
    assert [
        tuple(answer.ids) for answer in sample(model, same, max_new_tokens=12, seed=1)
    ] == answers
    assert torch.equal(torch.get_rng_state(), before)  # ... nor advanced
    assert not set(answers) & {
        tuple(answer.ids) for answer in sample(model, same, max_new_tokens=12, seed=2)
    }


# Stops and limits


@shapes
def test_an_answer_ends_with_its_first_stop_token(tiny_gpt, settings):
    model, options = tiny_gpt(**settings), {"max_new_tokens": 20, "seed": 4}
    free = sample(model, prompts(), **options)
    stopping = sample(model, prompts(), stop_ids=STOPS, **options)
    assert all(len(answer.ids) == 20 and not answer.stopped for answer in free)
    for all_ids, answer in zip(free, stopping, strict=True):
        kept = list(itertools.takewhile(lambda token: token not in STOPS, all_ids.ids))
        assert answer.ids == all_ids.ids[: len(kept) + 1]
        assert answer.stopped == (len(kept) < 20)
        assert len(answer.logprobs) == len(answer.ids)
    assert {answer.stopped for answer in stopping} == {True, False}


def test_max_new_tokens_and_the_context_limit(tiny_gpt):
    for family in ("gpt2", "llama"):
        model = tiny_gpt(family, max_length=16)
        for length, asked, got in [(4, 5, 5), (4, 12, 12), (4, 50, 12), (15, 50, 1), (4, 0, 0)]:
            answer = sample(model, prompts([length]), max_new_tokens=asked)[0]
            assert (len(answer.ids), len(answer.logprobs), answer.stopped) == (got, got, False)
        with pytest.raises(InputError, match="prompt 1 has 16 tokens, the model's context is 16"):
            sample(model, prompts([15, 16]), max_new_tokens=1)
        with pytest.raises(InputError, match="prompt 0 has 17 tokens"):
            list(stream(model, prompts([17])[0], max_new_tokens=1))


def test_no_prompts_no_answers(tiny_gpt):
    assert sample(tiny_gpt("llama"), [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    "prompt, options, words",
    [
        ([], {}, "prompt 0 is empty"),
        ([1], {"temperature": -0.1}, "temperature -0.1"),
        ([1], {"temperature": math.nan}, "temperature nan"),
        ([1], {"temperature": math.inf}, "temperature inf"),
        ([1], {"top_k": -1}, "top_k -1"),
        ([1], {"top_p": 0.0}, "top_p 0.0"),
        ([1], {"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_refused_options(tiny_gpt, prompt, options, words):
    model = tiny_gpt("llama")
    with pytest.raises(InputError, match=words):
        sample(model, [prompt], max_new_tokens=2, **options)
    with pytest.raises(InputError, match=words):
        list(stream(model, prompt, max_new_tokens=2, **options))


@shapes
def test_stream_gives_the_ids_of_sample(tiny_gpt, settings):
    model, settings = tiny_gpt(**settings), {"max_new_tokens": 20, "seed": 6, "stop_ids": STOPS}
    for prompt in prompts():
        for options in ({}, {"temperature": 0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}):
            answer = sample(model, [prompt], **settings, **options)[0]
            assert (
                list(stream(model, prompt, **settings, **options))
                == answer.ids[: -1 if answer.stopped else None]
            )


def test_progress_counts_every_row_and_the_mode_comes_back(tiny_gpt):
    model, done = tiny_gpt("gpt2", dropout=0.5), []
    expected = sample(model, prompts(), max_new_tokens=4, seed=1)
    model.train()
    got = sample(model, prompts(), max_new_tokens=4, seed=1, batch_size=3, progress=done.append)
    assert [answer.ids for answer in got] == [answer.ids for answer in expected]  # dropout was off
    assert done == [3, 3, 2]
    assert model.training and model.trunk.blocks[0].training


# What is not finite, and what overflows


LIMITS = ({}, {"top_k": 3}, {"top_p": 0.9})


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_logits_that_are_not_finite_are_no_token(tiny_gpt, number, options):
    """From the third token on, in one row of many."""
    model, calls = tiny_gpt("llama"), []

    def spoil(module, inputs, logits):
        calls.append(1)
        if len(calls) >= 3:
            logits[-1, 7] = number
        return logits

    model.head.register_forward_hook(spoil)
    with pytest.raises(Failure, match="logits are not finite at token 3 of an answer"):
        sample(model, prompts(), max_new_tokens=6, **options)
    calls.clear()
    with pytest.raises(Failure, match="logits are not finite at token 3 of an answer"):
        list(stream(model, prompts()[0], max_new_tokens=6, **options))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        *(
            {"temperature": cold, **more}
            for cold in (1e-6, 1e-37, 1e-45, 1e-320)
            for more in LIMITS
        ),
        *({"top_p": small} for small in (1e-30, 1e-46, 1e-300)),
    ],
    ids=str,
)
def test_an_extreme_temperature_or_top_p_gives_the_likeliest_id(options, native, monkeypatch):
    if not native:
        monkeypatch.setattr(compile, "library", lambda: None)
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(2)) * 30
    for draw in (0.0, 0.5, 1 - 2**-24):
        ids, logprobs = pick(logits, torch.full((7,), draw), Sampling(1, **options))
        assert ids.tolist() == logits.argmax(-1).tolist()
        assert logprobs.tolist() == [0.0] * 7
