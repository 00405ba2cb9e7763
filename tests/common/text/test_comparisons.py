"""Comparisons whose two sides are whole conversations."""

import pytest

from common.program.errors import InputError
from common.text.comparisons import ranked

ASKED = "\n\nHuman: Hi.\nWho are you?\n\nAssistant: A model.\n\nHuman: Of what?\n\nAssistant:"


def test_a_transcript_of_hh_rlhf_is_the_same_as_messages(tokenizer):
    """The answer of an assistant may hold what looks like a name."""
    row = {"chosen": f"{ASKED} Of text. Human: no", "rejected": f"{ASKED} Of you."}
    talk = [
        {"role": "user", "content": "Hi.\nWho are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Of what?"},
    ]
    plain = {"prompt": talk, "chosen": "Of text. Human: no", "rejected": "Of you."}
    assert ranked(tokenizer, row) == ranked(tokenizer, plain)


@pytest.mark.parametrize(
    "rejected", [ASKED.replace("Hi", "Hello") + " Of you.", "Of you.", "\n\nHuman: Hi."]
)
def test_conversations_that_differ_are_no_comparison(rejected, tokenizer):
    with pytest.raises(InputError, match="differ before their last answer"):
        ranked(tokenizer, {"chosen": f"{ASKED} Of text.", "rejected": rejected})


USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Hi"), *[("assistant", "A")] * 2)
)


@pytest.mark.parametrize(
    ("chosen", "rejected", "told"),
    [
        ([USER, GOOD], [{**USER, "content": "Ho"}, BAD], "differ before their last answer"),
        ([GOOD, USER], [GOOD, BAD], "this one is the user's"),
        ([USER, GOOD], [USER, USER], "this one is the user's"),
    ],
)
def test_messages_that_are_no_comparison(chosen, rejected, told, tokenizer):
    with pytest.raises(InputError, match=told):
        ranked(tokenizer, {"prompt": "Hi", "chosen": chosen, "rejected": rejected})
