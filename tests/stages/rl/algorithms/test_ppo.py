"""PPO's maths against numbers worked out by hand and against formulas written out a second time in
plain Python."""

import math
from types import SimpleNamespace

import pytest
import torch

from stages.rl.algorithms import ppo
from stages.rl.algorithms.ppo import gae, policy_loss, value_loss

NAN, HUGE = float("nan"), 1e30
LN2 = 0.6931472


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.tensor(expected), atol=tolerance, rtol=tolerance
    )


def test_gae_literal():
    # deltas: 1 + .25 - .5 = .75; 0 - 1 - .25 = -1.25; 2 + 0 + 1 = 3 (the value behind the end is 0)
    advantages, returns = gae(
        torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 0.25, -1.0]]), torch.ones(1, 3)
    )
    close(advantages, [[2.27, 1.6, 3.0]])
    close(returns, [[2.77, 1.85, 2.0]])
    # gamma .5, lambda .5: deltas .625, -.75, 3; A_1 = -.75 + .75 = 0; A_0 = .625
    advantages, _ = gae(
        torch.tensor([[1.0, 0.0, 2.0]]),
        torch.tensor([[0.5, 0.25, -1.0]]),
        torch.ones(1, 3),
        0.5,
        0.5,
    )
    close(advantages, [[0.625, 0.0, 3.0]])


def brute_force(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_(t + l), as the sum it is defined by, for one unpadded
    episode."""
    size = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(size)]
    return [sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, size)) for t in range(size)]


@pytest.mark.parametrize("padding", [0.0, HUGE, NAN])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_brute_force_on_ragged_rows_whatever_the_padding_holds(gamma, lam, padding):
    lengths, size = [7, 1, 4, 2, 6], 7
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(len(lengths), size, generator=generator) for _ in range(2))
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    rewards[~mask] = values[~mask] = padding
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        kept = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = brute_force(*kept, gamma, lam)
        close(advantages[row], expected + [0.0] * (size - length))
        close(
            returns[row],
            [a + v for a, v in zip(expected, kept[1], strict=True)] + [0.0] * (size - length),
        )


def test_policy_loss_clips_both_signs():
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0])
    new = ratios.log().requires_grad_()
    loss, clipped, approx_kl = policy_loss(new, torch.zeros(5), advantages, 0.2)
    # -min(1.5, 1.2), -min(.5, .8), -min(-1.5, -1.2), -min(-.5, -.8), -2
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8 - 2.0, abs=1e-5)
    assert int(clipped) == 2  # the first and the fourth
    # r - 1 - ln r: .5 - ln 1.5 twice, -.5 + ln 2 twice, 0
    assert float(approx_kl) == pytest.approx(2 * (0.5 - 0.4054651) + 2 * (LN2 - 0.5), abs=1e-5)
    loss.backward()
    close(new.grad, [0.0, -0.5, 1.5, 0.0, -2.0])  # -A r, nothing where the clip holds


def test_policy_loss_survives_an_absurd_token():
    new = torch.tensor([300.0, -300.0]).requires_grad_()
    result = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, -1.0]))
    assert result.loss.item() == pytest.approx(math.exp(20) + 0.8, rel=1e-5)
    result.loss.backward()
    assert torch.isfinite(new.grad).all()


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.0, 0.0, 0.0, 0.5),  # free 1, held (.2)^2: the larger
        (1.0, 0.0, 2.0, 1.62),  # free 1, held 1.8^2 = 3.24: halved
        (0.1, 0.0, 1.0, 0.405),  # inside the range both are .9^2
        (-1.0, 0.0, -2.0, 1.62),
        (3.0, 3.0, 3.0, 0.0),
    ],
)
def test_value_loss_literal(value, old, target, expected):
    loss = value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_value_loss_is_a_sum_and_the_clip_stops_the_gradient():
    values = torch.tensor([1.0, 1.0, 0.1]).requires_grad_()
    loss = value_loss(values, torch.zeros(3), torch.tensor([0.0, 2.0, 1.0]), 0.2)
    assert loss.item() == pytest.approx(0.5 + 1.62 + 0.405, abs=1e-6)
    loss.backward()
    close(values.grad, [1.0, 0.0, -0.9])


def test_what_the_update_loop_reads_of_ppo():
    """A critic, whitened advantages, GAE at the config's gamma and lambda, the loss, its parts."""
    assert ppo.NEEDS_CRITIC and ppo.WHITENS_ADVANTAGES
    keys = SimpleNamespace(
        gamma=0.5, gae_lambda=1.0, clip_range=0.2, clip_range_value=0.2, vf_coef=0.1
    )
    advantages, returns = ppo.advantages(
        torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 0.25, -1.0]]), torch.ones(1, 3), keys
    )
    # deltas .625, -.75, 3; A_1 = -.75 + 1.5, A_0 = .625 + .375
    close(advantages, [[1.0, 0.75, 3.0]])
    close(returns, [[1.5, 1.0, 2.0]])
    new = torch.tensor([1.5, 1.0]).log().requires_grad_()
    tokens = SimpleNamespace(
        logprobs_N=new,
        values_N=torch.tensor([1.0, 3.0], requires_grad=True),
        old_logprobs_N=torch.zeros(2),
        old_values_N=torch.tensor([0.0, 3.0]),
        advantages_N=torch.tensor([1.0, 2.0]),
        returns_N=torch.tensor([0.0, 3.0]),
    )
    loss, statistics = ppo.loss(tokens, keys)
    close(loss, -1.2 - 2.0 + 0.1 * 0.5)
    assert list(statistics) == ["policy_loss", "value_loss", "clip_fraction", "approx_kl"]
    close(torch.stack(list(statistics.values())), [-3.2, 0.5, 1.0, 0.5 - 0.4054651])
    assert not any(value.requires_grad for value in statistics.values())
    loss.backward()
    close(new.grad, [0.0, -2.0])
    close(tokens.values_N.grad, [0.1, 0.0])
