"""PPO's maths against numbers worked out by hand and against formulas written out a second time in
plain Python."""

import math

import pytest
import torch

from stages.rl.algorithms.ppo import (
    explained_variance,
    gae,
    kl_estimates,
    next_kl_coef,
    policy_loss,
    shape_scores,
    token_rewards,
    value_loss,
)
from tools.compare.measure import best_of_n_kl

NAN, HUGE = float("nan"), 1e30
LN2 = 0.6931472


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.tensor(expected), atol=tolerance, rtol=tolerance
    )


def test_kl_estimators_literal():
    k1, k2, k3 = kl_estimates(
        torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0 - LN2, -2.0 + LN2, -0.5])
    )
    close(
        k1, [LN2, -LN2, 0.0]
    )  # negative where the policy likes the token less than the reference: never clamped
    close(k2, [0.2402265, 0.2402265, 0.0])
    close(k3, [0.1931472, 0.3068528, 0.0])  # 1/2 - 1 + ln 2, 2 - 1 - ln 2


def test_k1_and_k3_are_unbiased_under_the_policy():
    p, q = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    k1, k2, k3 = kl_estimates(torch.tensor(p).log(), torch.tensor(q).log())
    weights = torch.tensor(p)
    assert float((weights * k1).sum()) == pytest.approx(exact, abs=1e-6)
    assert float((weights * k3).sum()) == pytest.approx(exact, abs=1e-6)
    assert float((weights * k2).sum()) != pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(
    ("clip", "penalty", "expected"),
    [
        (5.0, 1.0, [5.0, -5.0, 1.0, 4.0]),
        (None, 1.0, [7.0, -9.0, 1.0, 7.5]),
        (5.0, 0.0, [5.0, -5.0, 2.0, 5.0]),
    ],
)
def test_scores_are_clipped_then_cut_off_answers_pay(clip, penalty, expected):
    scores, stopped = torch.tensor([7.0, -9.0, 2.0, 8.5]), torch.tensor([True, True, False, False])
    close(shape_scores(scores, stopped, clip, penalty), expected)


def test_token_rewards_put_the_score_on_the_last_real_token():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    kl = torch.tensor([[0.5, -1.0, 2.0, NAN], [3.0, HUGE, NAN, -HUGE], [0.0, 0.0, 1.0, -1.0]])
    rewards = token_rewards(torch.tensor([10.0, -4.0, 1.0]), kl, mask, 0.1)
    close(rewards, [[-0.05, 0.1, 9.8, 0.0], [-4.3, 0.0, 0.0, 0.0], [0.0, 0.0, -0.1, 1.1]])


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


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1005),
        (5.4, 0.0995),
        (12.0, 0.101),
        (600.0, 0.101),
        (0.0, 0.099),
        (-3.0, 0.099),
    ],
)
def test_adaptive_coefficient_literal(kl, expected):
    # .1 (1 + clip(kl / 6 - 1, +-.2) 500 / 10 000)
    assert next_kl_coef(0.1, kl, target=6.0, horizon=10_000, episodes=500) == pytest.approx(
        expected, abs=1e-9
    )


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(explained_variance(returns, returns)) == pytest.approx(1)
    assert float(explained_variance(returns - 7, returns)) == pytest.approx(
        1
    )  # a bias is no variance
    assert float(explained_variance(torch.full((4,), 9.0), returns)) == pytest.approx(0, abs=1e-6)
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3)  # Var(2 R) = 4 Var(R)


def test_best_of_n_kl():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.1931472, abs=1e-6)
    assert best_of_n_kl(16) == pytest.approx(1.8350887, abs=1e-6)
    # The best of n uniform draws has density n u^(n - 1): its KL from the uniform one, by the
    # midpoint rule.
    n, cells = 4, 20_000
    density = [n * ((i + 0.5) / cells) ** (n - 1) for i in range(cells)]
    assert best_of_n_kl(n) == pytest.approx(sum(d * math.log(d) for d in density) / cells, abs=1e-4)
