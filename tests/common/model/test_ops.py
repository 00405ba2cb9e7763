"""Tensor maths against hand literals and plain Python loops; NaN on padding must stay there."""

import math

import pytest
import torch

from common.model.ops import length_mask, masked_mean, masked_sum, token_logprobs, whiten

NAN = float("nan")


def test_token_logprobs_literals():
    logits = torch.tensor(
        [[0.0, math.log(3.0)], [5.0, 5.0], [1000.0, 0.0]]
    )  # 1/4, 3/4 | 1/2, 1/2 | 1, 0
    got = token_logprobs(logits, torch.tensor([1, 0, 1])).tolist()
    assert got == pytest.approx([math.log(0.75), math.log(0.5), -1000.0], abs=1e-6)
    # temperature 1/2 doubles the logits: weights 1 and 9
    assert token_logprobs(logits[:1], torch.tensor([1]), 0.5).item() == pytest.approx(
        math.log(0.9), abs=1e-6
    )


def test_token_logprobs_against_plain_python():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.tensor([0, 10, 3, 3, 9, 1, 5])
    for temperature in (0.7, 1.0, 2.0):
        expected = []
        for row, token in zip(logits.tolist(), ids.tolist(), strict=True):
            total = math.fsum(math.exp(value / temperature) for value in row)
            expected.append(row[token] / temperature - math.log(total))
        assert token_logprobs(logits, ids, temperature).tolist() == pytest.approx(
            expected, abs=1e-5
        )


def test_token_logprobs_of_bf16_logits_are_computed_in_fp32():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    got = token_logprobs(logits, torch.tensor([0]))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(1 - math.log(math.e + math.e**2 + math.e**3), abs=1e-6)


def test_masked_sum_and_mean_literals():
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, float("inf")]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_sum(x, mask).item() == 7.0
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, torch.zeros(2, 3)).item() == 0.0


def test_whiten_literals():
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    x = torch.tensor([[1.0, 2.0, NAN], [3.0, 6.0, 1e9]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    root = math.sqrt(3.5)
    expected = [-2 / root, -1 / root, 0.0, 0.0, 3 / root, 0.0]
    assert whiten(x, mask).flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_whiten_ragged_rows_have_mean_0_and_std_1():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 13, generator=generator) * 5 + 40
    lengths = [13, 1, 2, 7, 5, 5, 12, 3, 1]
    mask = torch.tensor([[1.0] * n + [0.0] * (13 - n) for n in lengths])
    white = whiten(x, mask)
    kept = [value for row, n in zip(white.tolist(), lengths, strict=True) for value in row[:n]]
    mean = math.fsum(kept) / len(kept)
    assert mean == pytest.approx(0, abs=1e-4)
    assert math.fsum((value - mean) ** 2 for value in kept) / len(kept) == pytest.approx(
        1, abs=1e-3
    )
    assert all(
        value == 0 for row, n in zip(white.tolist(), lengths, strict=True) for value in row[n:]
    )


def test_length_mask_literals():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [
        [False] * 3,
        [True, True, False],
        [True] * 3,
    ]
