"""The sampler: for any logits and settings an id that may be drawn, with its own log-prob."""

import math

import torch
from anything import result_or_line
from hypothesis import assume, given
from hypothesis import strategies as st

from common.model.sample import Sampling, pick, truncate

LOGITS = st.lists(
    st.floats(-80, 80, width=32) | st.just(float("-inf")), min_size=1, max_size=12
).filter(lambda row: max(row) > -math.inf)
UNIFORMS = st.floats(0, 1, exclude_max=True, width=32)
TEMPERATURES = st.just(0.0) | st.floats(0.05, 20)


@given(LOGITS, UNIFORMS, TEMPERATURES, st.integers(0, 14), st.floats(0.01, 1))
def test_what_is_drawn_may_be_drawn(logits, uniform, temperature, top_k, top_p):
    how = Sampling(1, temperature, top_k, top_p)
    how.check()
    ids, logprobs = pick(torch.tensor([logits]), torch.tensor([uniform]), how)
    drawn, found = int(ids), float(logprobs)
    assert 0 <= drawn < len(logits) and logits[drawn] > -math.inf
    assert math.isfinite(found) and found <= 1e-5
    if temperature == 0:
        assert logits[drawn] == max(logits)
        return
    rank = sum(other > logits[drawn] for other in logits)
    assert not top_k or rank < top_k
    exact = torch.tensor(logits, dtype=torch.double) / temperature
    before = exact.softmax(0)[torch.tensor(logits) > logits[drawn]].sum()
    if not top_k:
        assert float(before) < top_p + 1e-5
    if not top_k and top_p == 1:
        assert abs(float(exact.log_softmax(0)[drawn]) - found) < 1e-3


@given(LOGITS, st.integers(1, 14), st.floats(0.01, 1))
def test_what_is_left_is_the_likeliest(logits, top_k, top_p):
    assume(len(set(logits)) == len(logits))  # of equal ones either may go
    given_ = torch.tensor([logits])
    left = truncate(given_, top_k, top_p)[0] > -math.inf
    assert left.any()
    kept, gone = given_[0][left], given_[0][~left]
    assert len(kept) <= top_k
    if len(gone):
        assert kept.min() >= gone.max()
    among = given_[0].double().topk(min(top_k, len(logits))).values.softmax(0)
    assert float(among[: len(kept)].sum()) >= top_p - 1e-5 or len(kept) == len(among)


@given(st.floats(-1e30, 1e30), st.integers(), st.floats(-1e30, 1e30))
def test_settings_are_a_distribution_or_one_line(temperature, top_k, top_p):
    how = Sampling(1, temperature, top_k, top_p)
    checked = result_or_line(lambda: how.check() or True)
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        assert checked is None
