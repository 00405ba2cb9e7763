"""The maths that algorithms share, against numbers worked out by hand and against formulas written
out a second time in plain Python."""

import math

import pytest
import torch

from stages.rl.maths import (
    explained_variance,
    kl_estimates,
    next_kl_coef,
    shape_scores,
    token_rewards,
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
