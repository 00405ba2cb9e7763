"""Renderer, mask and rows of every format: for any input a right result or one line."""

import gzip
import json
import math

import pytest
import zstandard
from anything import ANY_TEXT, ROWS, TEXT, VALUES, result_or_line
from hypothesis import example, given
from hypothesis import strategies as st

from common.program.files import write_jsonl
from common.rows.sources import BadRows, read_rows
from common.text.chat import (
    check_messages,
    comparison_prompt,
    prompt_ids,
    render,
    rows_to_messages,
    rows_to_prompt,
)
from common.text.comparisons import ranked
from common.text.tokenizer import CONTROL
from stages.pretrain.prepare import text_of

# What a user may type: text with what looks like control tokens in it.
TYPED = st.lists(TEXT | st.sampled_from(CONTROL), max_size=3).map("".join)
CHATS = st.lists(
    st.tuples(st.sampled_from(("system", "user", "assistant")), TYPED), min_size=1, max_size=5
)


@given(CHATS)
@example([("user", "<|assistant|>"), ("assistant", "<|endoftext|>")])
def test_what_is_learned_is_each_answer_and_its_end(tokenizer, chat):
    messages = [{"role": role, "content": text} for role, text in chat]
    rendered = result_or_line(render, tokenizer, messages)
    if rendered is None:
        assert any(role == "assistant" and not text for role, text in chat)
        return
    ids, mask = rendered
    learned = [token for token, kept in zip(ids, mask, strict=True) if kept]
    expected, whole, seen = [], [], 0
    for role, text in chat:
        content, end = tokenizer.encode(text), [tokenizer.eot_id] * (role == "assistant")
        whole += [tokenizer.role_ids[role], *content, *end]
        expected += [*content, *end] if end else []
        seen += 1 + len(end)
    assert (ids, learned) == (whole, expected)
    assert sum(token in tokenizer.control_ids for token in ids) == seen  # typed ones are text
    assert tokenizer.decode(ids) == "".join(text for _, text in chat)


@given(CHATS)
def test_a_prompt_is_the_conversation_and_the_turn_of_the_assistant(tokenizer, chat):
    messages = [{"role": role, "content": text} for role, text in chat]
    ids = result_or_line(prompt_ids, tokenizer, messages)
    if ids is not None:
        assert chat[-1][0] == "user"
        assert ids == [*render(tokenizer, messages).ids, tokenizer.role_ids["assistant"]]


@given(ANY_TEXT)
def test_text_comes_back(tokenizer, text):
    ids = result_or_line(tokenizer.encode, text)
    surrogates = any(0xD800 <= ord(character) < 0xE000 for character in text)
    assert (ids is None) == surrogates
    if ids is not None:
        assert tokenizer.decode(ids) == text
        assert not tokenizer.control_ids.intersection(ids)


@given(ROWS)
def test_a_row_is_messages_or_one_line(row):
    for read, last in ((rows_to_messages, "assistant"), (rows_to_prompt, "user")):
        messages = result_or_line(read, row)
        if messages is not None:
            check_messages(messages)
            assert messages[-1]["role"] == last
            assert all(set(message) == {"role", "content"} for message in messages)
    messages = result_or_line(comparison_prompt, row)
    if messages is not None:
        check_messages(messages)


@given(ROWS | st.fixed_dictionaries({"prompt": TEXT, "answers": st.lists(TEXT), "ranks": VALUES}))
@example({"prompt": "Hi", "answers": ["a", "b"], "ranks": [10**400, 1]})
@example({"prompt": "Hi", "answers": ["a", "b"], "ranks": [True, 1]})
def test_a_comparison_is_ranked_answers_or_one_line(tokenizer, row):
    found = result_or_line(ranked, tokenizer, row)
    if found is not None:
        assert len(found.answers) == len(found.ranks) == len(found.sources)
        assert all(abs(rank) < math.inf for rank in found.ranks)


@given(st.dictionaries(TEXT, VALUES, max_size=3) | ROWS)
def test_a_document_is_text_or_one_line(row):
    text = result_or_line(text_of, row)
    assert text is None or isinstance(text.encode(), bytes)


@given(rows=st.lists(st.dictionaries(TEXT, TEXT | st.integers(), min_size=1), min_size=1))
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst"])
def test_rows_that_were_written_come_back(tmp_path, suffix, rows):
    file = tmp_path / f"rows{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    file.write_bytes(pack.get(file.suffix, bytes)(text.encode()))
    assert [row.data for row in read_rows(str(file))] == rows
    write_jsonl(tmp_path / "again.jsonl", rows)
    assert [row.data for row in read_rows(str(tmp_path / "again.jsonl"))] == rows


LINES = st.lists(
    st.dictionaries(TEXT, VALUES, max_size=2).map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=12),
    max_size=5,
)
SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".txt.zst", ".parquet.gz")


@given(LINES, st.sampled_from(SUFFIXES), st.booleans(), st.sampled_from(("error", "skip")))
def test_any_bytes_are_rows_or_one_line(tmp_path, lines, suffix, packed, on_bad_row):
    file = tmp_path / f"any{suffix}"
    content = b"\n".join(lines)
    if packed:
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
        content = pack.get(file.suffix, bytes)(content)
    file.write_bytes(content)
    rows = result_or_line(read_rows, str(file), None, BadRows(on_bad_row))
    assert rows is None or (rows and all(isinstance(row.data, dict) for row in rows))
