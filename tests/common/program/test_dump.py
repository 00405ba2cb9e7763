"""JSON files hold what JSON can hold, or the run says what it cannot."""

import json
import math

import pytest

from common.program.errors import Failure
from common.program.files import dump


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"metrics": {"loss": math.nan}}, "metrics.loss is nan"),
        ({"a": [{"b": 1.0}, {"b": (0, -math.inf)}]}, r"a\[1\].b\[1\] is -inf"),
        (math.inf, "the value is inf"),
    ],
)
def test_a_number_that_is_not_finite_is_named(value, place):
    with pytest.raises(Failure, match=f"^{place}, and JSON holds finite numbers only"):
        dump(value)


def test_any_text_and_any_finite_number_come_back():
    value = {"text": "\x9b\u202e\ud800é\n", "number": 5e-324, "large": 10**40, "none": None}
    assert json.loads(dump(value)) == value
