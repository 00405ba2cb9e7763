"""What a file of rows may hold, and the rule that all of it obeys: a right result, or one line."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from common.program.errors import InputError

TEXT = st.text(max_size=12)
ANY_TEXT = st.text(st.characters(), max_size=12)  # with lone surrogates
NAMES = (
    *("messages", "prompt", "completion", "instruction", "input", "output", "conversations"),
    *("chosen", "rejected", "answers", "ranks", "stopped", "sources", "text"),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, st.just(10**400)
)
PARTS = st.sampled_from(("role", "content", "from", "value"))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PARTS, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(("system", "user", "assistant", "human", "gpt"))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": TEXT})
    | st.fixed_dictionaries({"from": ROLES, "value": TEXT}),
    max_size=4,
)
LISTS = st.lists(TEXT, max_size=3) | st.lists(st.integers(0, 2), max_size=3)
# Most columns are right, so that one wrong one is met behind others that pass.
ROWS = st.dictionaries(st.sampled_from(NAMES), TEXT | MESSAGES | LISTS | VALUES, max_size=4)


def result_or_line(work: Callable[..., Any], *args: Any) -> Any:
    """What work(*args) returns; None where it is an InputError, which must be one line."""
    try:
        return work(*args)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error)
        return None
