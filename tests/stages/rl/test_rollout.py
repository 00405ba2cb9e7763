"""A rollout against the slow way: one unpadded row and one token at a time, in float64 where it is
ours to choose."""

import math

import pytest
import torch

from common.model.sample import sample
from stages.rl.algorithms.ppo import gae
from stages.rl.experience import Experience, rewards
from stages.rl.models import ActorCritic, Models
from stages.rl.rollout import Rollout, Sampling, evaluate, interleaved, roll_out

FAMILIES = ("gpt2", "llama")
TEMPERATURE = 0.7
STOPS = list(
    range(60)
)  # a fifth of the vocabulary, so that random models end their answers early and late


@pytest.fixture(params=FAMILIES)
def models(request, tiny_gpt, tiny_reward):
    """Four different networks; the policy is sampled from as it is."""
    family = request.param
    actor_critic = ActorCritic(tiny_gpt(family, seed=1), tiny_reward(family, seed=2, shift=0.25))
    return Models(
        actor_critic,
        actor_critic.policy,
        tiny_gpt(family, seed=3),
        tiny_reward(family, seed=4, shift=1.5),
    )


@pytest.fixture
def prompts(tokenizer):
    texts = [
        "Name an animal.",
        "What is two plus three?",
        "Hi",
        "The red fox and the blue bird",
        "Is it?",
        "a",
        "Go on",
        "ok",
    ]
    return [tokenizer.encode(text) for text in texts]


def roll(models, prompts, tokenizer, **changes) -> Rollout:
    settings = Sampling(
        max_new_tokens=9,
        temperature=TEMPERATURE,
        stop_ids=STOPS,
        pad_id=tokenizer.pad_id,
        evaluated_rows=3,
        sampled_rows=3,
    )
    return roll_out(models, prompts, settings._replace(**changes), seed=5)


def real(field: torch.Tensor, batch: Rollout, row: int) -> list[float]:
    """The unpadded part of a (B, T) field, after checking that the rest is 0."""
    length = int(batch.mask_BT[row].sum())
    assert not field[row, length:].any()
    return field[row, :length].tolist()


@torch.no_grad()
def slow_logprobs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p(token | everything left of it) at the temperature, the whole vocabulary: (tokens,
    V)."""
    rows = []
    for t in range(len(answer)):
        logits = model(torch.tensor([prompt + answer[:t]]))[
            0, -1
        ]  # a forward pass that cannot see the token
        rows.append(torch.log_softmax(logits.double() / TEMPERATURE, -1))
    return torch.stack(rows)


def test_ids_are_the_sampled_ones(models, prompts, tokenizer):
    batch = roll(models, prompts, tokenizer)
    answers = sample(
        models.sampler,
        prompts,
        max_new_tokens=9,
        temperature=TEMPERATURE,
        seed=5,
        stop_ids=STOPS,
    )
    assert len({len(answer.ids) for answer in answers}) > 2, (
        "lengths must be ragged for this to mean anything"
    )
    assert {answer.stopped for answer in answers} == {True, False}
    size = batch.ids_BS.shape[1]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = prompt + answer.ids
        assert batch.ids_BS[row].tolist() == ids + [tokenizer.pad_id] * (size - len(ids))
        assert int(batch.prompt_lengths_B[row]) == len(prompt)
        assert batch.mask_BT[row].tolist() == [
            t < len(answer.ids) for t in range(batch.mask_BT.shape[1])
        ]
        assert bool(batch.stopped_B[row]) == answer.stopped
        # Plain sampling: what was drawn from and what PPO evaluates is one distribution.
        assert real(batch.logprobs_BT, batch, row) == pytest.approx(answer.logprobs, abs=1e-4)


def test_logprobs_entropy_values_and_scores_are_the_slow_ones(models, prompts, tokenizer):
    model, _, reference, reward_model = models
    batch = roll(models, prompts, tokenizer)
    for row, prompt in enumerate(prompts):
        answer = batch.ids_BS[
            row, len(prompt) : len(prompt) + int(batch.mask_BT[row].sum())
        ].tolist()
        mine, theirs = (
            slow_logprobs(model.policy, prompt, answer),
            slow_logprobs(reference, prompt, answer),
        )
        chosen = torch.tensor(answer)[:, None]
        assert real(batch.logprobs_BT, batch, row) == pytest.approx(
            mine.gather(1, chosen)[:, 0].tolist(), abs=1e-4
        )
        assert real(batch.ref_logprobs_BT, batch, row) == pytest.approx(
            theirs.gather(1, chosen)[:, 0].tolist(), abs=1e-4
        )
        assert real(batch.entropy_BT, batch, row) == pytest.approx(
            (-mine.exp() * mine).sum(1).tolist(), abs=1e-4
        )
        with torch.no_grad():
            # The value of token t is what the critic says before it is written.
            parts = [torch.tensor([prompt + answer[:t]]) for t in range(len(answer))]
            heads = [model.critic.score(model.critic.trunk(part))[0, -1] for part in parts]
            last = reward_model.score(reward_model.trunk(torch.tensor([prompt + answer])))[0, -1]
        assert real(batch.values_BT, batch, row) == pytest.approx(
            [float(v) - 0.25 for v in heads], abs=1e-4
        )
        assert float(batch.scores_B[row]) == pytest.approx(float(last) - 1.5, abs=1e-4)


def test_rewards_advantages_and_returns(models, prompts, tokenizer):
    batch = roll(models, prompts, tokenizer)
    rewards_BT = rewards(batch, kl_coef=0.3, score_clip=None, missing_stop_penalty=2.0)
    advantages_BT, returns_BT = gae(rewards_BT, batch.values_BT, batch.mask_BT, 0.9, 0.8)
    for row in range(len(prompts)):
        logprobs, reference = (
            real(batch.logprobs_BT, batch, row),
            real(batch.ref_logprobs_BT, batch, row),
        )
        expected = [-0.3 * (a - b) for a, b in zip(logprobs, reference, strict=True)]
        expected[-1] += float(batch.scores_B[row]) - (0 if batch.stopped_B[row] else 2)
        assert real(rewards_BT, batch, row) == pytest.approx(expected, abs=1e-5)
        values = real(batch.values_BT, batch, row)
        deltas = [
            r + 0.9 * after - v
            for r, v, after in zip(expected, values, [*values[1:], 0], strict=True)
        ]
        size = len(deltas)
        advantages = [sum(0.72 ** (i - t) * deltas[i] for i in range(t, size)) for t in range(size)]
        assert real(advantages_BT, batch, row) == pytest.approx(advantages, abs=1e-4)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        assert real(returns_BT, batch, row) == pytest.approx(returns, abs=1e-4)


def test_scores_are_clipped_after_the_shift(models, prompts, tokenizer):
    models.reward_model.shift.fill_(100.0)
    with torch.no_grad():
        models.reward_model.score.weight.mul_(0.01)
    plain = roll(models, prompts, tokenizer)
    assert (
        float(plain.scores_B.max()) < -90
    )  # the head says about 0: clipped before the shift it would stay there
    clipped_BT = rewards(plain, kl_coef=0.0, score_clip=5.0, missing_stop_penalty=0.0)
    plain_BT = rewards(plain, kl_coef=0.0, score_clip=None, missing_stop_penalty=0.0)
    # The scores are logged as the model gave them.
    assert float(plain.scores_B.max()) < -90
    assert clipped_BT.sum(1).tolist() == [-5.0] * len(prompts)
    assert plain_BT.sum(1).tolist() == pytest.approx(plain.scores_B.tolist())


def test_kl_from_itself_is_exactly_zero(models, prompts, tokenizer):
    batch = roll(models._replace(reference=models.sampler), prompts, tokenizer)
    assert batch.logprobs_BT.any()
    assert torch.equal(batch.logprobs_BT, batch.ref_logprobs_BT)


def test_what_stands_on_padding_is_never_read(models, prompts, tokenizer):
    """The same answers padded with other ids."""
    settings = Sampling(9, TEMPERATURE, STOPS, tokenizer.pad_id, evaluated_rows=3)
    answers = sample(
        models.sampler,
        prompts,
        max_new_tokens=9,
        temperature=TEMPERATURE,
        seed=5,
        stop_ids=STOPS,
    )
    batch = evaluate(models, prompts, answers, settings)
    for pad_id in range(17, 25):
        again = evaluate(models, prompts, answers, settings._replace(pad_id=pad_id))
        assert not torch.equal(again.ids_BS, batch.ids_BS)
        for name in ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT", "scores_B"):
            assert torch.equal(getattr(again, name), getattr(batch, name)), name


def test_batch_size_makes_no_difference(models, prompts, tokenizer):
    one, all_at_once = (
        roll(models, prompts, tokenizer, sampled_rows=b, evaluated_rows=b) for b in (1, 8)
    )
    assert torch.equal(one.ids_BS, all_at_once.ids_BS)
    assert torch.equal(one.mask_BT, all_at_once.mask_BT)
    for name in ("logprobs_BT", "ref_logprobs_BT", "values_BT", "scores_B"):
        torch.testing.assert_close(
            getattr(one, name), getattr(all_at_once, name), atol=1e-4, rtol=1e-4
        )
    pairs = [
        gae(rewards(batch, 0.3, None, 0.0), batch.values_BT, batch.mask_BT, 0.9, 0.8)
        for batch in (one, all_at_once)
    ]
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_chosen_rows_are_trimmed_and_predict_one_to_the_left():
    pad = 99
    ids = torch.tensor(
        [[1, 2, 3, 10, 11, pad, pad], [4, 20, 21, 22, 23, pad, pad], [5, 6, 7, 8, 9, 30, 31]]
    )
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    grid = torch.arange(12.0).view(3, 4)
    per_row = torch.arange(3.0)
    lengths = torch.tensor([3, 1, 5])
    batch = Rollout(ids, lengths, mask, grid, grid, grid, grid, per_row, mask[:, 0])
    assert batch.targets_N().tolist() == [10, 11, 20, 21, 22, 23, 30, 31]
    assert batch.predicts_BS().nonzero().tolist() == [
        [0, 2],
        [0, 3],
        [1, 0],
        [1, 1],
        [1, 2],
        [1, 3],
        [2, 4],
        [2, 5],
    ]
    experience = Experience(batch, grid, grid, grid).rows([0])
    part = experience.rollout
    assert part.ids_BS.tolist() == [[1, 2, 3, 10, 11]]
    assert part.mask_BT.tolist() == [[True, True]]
    assert part.logprobs_BT.tolist() == [[0.0, 1.0]]
    assert experience.advantages_BT.tolist() == [[0.0, 1.0]]
    both = batch.rows([2, 1])
    assert both.ids_BS.shape == (2, 7)
    assert both.mask_BT.shape == (2, 4)
    assert both.scores_B.tolist() == [2.0, 1.0]
    assert both.targets_N().tolist() == [30, 31, 20, 21, 22, 23]


def test_shares_of_processes_become_one_rollout(models, prompts, tokenizer):
    """Each of two processes has every second prompt: together the answers that one would give."""
    settings = Sampling(9, TEMPERATURE, STOPS, tokenizer.pad_id, evaluated_rows=3)
    whole = roll_out(models, prompts, settings, seed=5)
    parts = [roll_out(models, prompts[n::2], settings, seed=5, part=(n, 2)) for n in (0, 1)]
    assert len({part.mask_BT.shape[1] for part in parts}) == 2
    together = interleaved(parts, tokenizer.pad_id)
    for name in ("ids_BS", "prompt_lengths_B", "mask_BT", "stopped_B"):
        assert torch.equal(getattr(together, name), getattr(whole, name)), name
    for name in ("logprobs_BT", "ref_logprobs_BT", "entropy_BT", "values_BT", "scores_B"):
        torch.testing.assert_close(
            getattr(together, name), getattr(whole, name), atol=1e-4, rtol=1e-4
        )


def test_without_a_critic_every_value_is_zero(models, prompts, tokenizer):
    alone = models._replace(actor_critic=ActorCritic(models.sampler, None))
    batch, expected = (roll(some, prompts, tokenizer) for some in (alone, models))
    assert not batch.values_BT.any()
    assert torch.equal(batch.logprobs_BT, expected.logprobs_BT)


def test_sampling_follows_the_policy_at_the_temperature(models, tokenizer):
    """1500 first tokens to one prompt: the most likely id comes as often as softmax(logits / T)
    says."""
    prompt = tokenizer.encode("Name an animal.")
    batch = roll(
        models, [prompt] * 1500, tokenizer, max_new_tokens=1, sampled_rows=500, evaluated_rows=500
    )
    probabilities = slow_logprobs(models.sampler, prompt, [0])[0].exp()
    best = int(probabilities.argmax())
    expected = float(probabilities[best])
    found = float((batch.ids_BS[:, len(prompt)] == best).float().mean())
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 1500))
