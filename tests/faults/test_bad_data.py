"""Bad data: a row either trains, or is named `file:line` with the reason; no traceback, and no
success on nothing."""

import gzip
import json
import sys

import pytest

from tests.faults.conftest import ROWS

# Python 3.13 has words of its own for it, and points to the comma instead of what comes after it.
TRAILING_COMMA = (
    "at column 16: Illegal trailing comma"
    if sys.version_info >= (3, 13)
    else "at column 18: Expecting property name"
)
# (stage, the third line of its file, reason that it is counted under, what the message says)
LINES = [
    ("sft", b'{"prompt": "Hi", "completion": "Yes"', "broken JSON", "Expecting ',' delimiter"),
    ("sft", b"{'prompt': 'Hi', 'completion': 'Yes'}", "broken JSON", "at column 2"),
    ("sft", b'{"prompt": "Hi"} {"completion": "Yes"}', "broken JSON", "at column 18: Extra data"),
    ("sft", b"\0\0\0\0", "broken JSON", "at column 1"),
    ("sft", b'{"prompt": "a\0b", "completion": "Yes"}', "broken JSON", "Invalid control character"),
    ("sft", b'\xef\xbb\xbf{"prompt": "Hi", "completion": "Yes"}', "broken JSON", "BOM"),
    ("sft", b"[" * 100_000, "broken JSON", "recursion"),
    ("sft", b'{"prompt": "Hi", "completion": ' + b"1" * 5000 + b"}", "broken JSON", "digits"),
    ("prepare", b'{"text": "Hi"', "broken JSON", "at column 14"),
    ("reward", b'{"prompt": "Hi", }', "broken JSON", TRAILING_COMMA),
    ("reward", b'{"prompt": "Hi", 7}', "broken JSON", "at column 18: Expecting property name"),
    ("rl", b"Hi", "broken JSON", "at column 1"),
    ("sft", b"null", "not an object", "found NoneType"),
    ("sft", b'["Hi", "Yes"]', "not an object", "found list"),
    ("rl", b'"Hi"', "not an object", "found str"),
    ("sft", b'{"prompt": "\xe9", "completion": "Yes"}', "not UTF-8", "at column 13 (byte 0xe9)"),
    ("sft", b'{"prompt": "\xed\xa0\xbd", "completion": "Yes"}', "not UTF-8", "byte 0xed"),
    ("prepare", b'{"text": "abc\xc3"}', "not UTF-8", "byte 0xc3"),
    ("reward", b'{"prompt": "Hi", "chosen": "\xff", "rejected": "No"}', "not UTF-8", "byte 0xff"),
    (
        "sft",
        rb'{"prompt": "Hi", "completion": "a\ud83d"}',
        "lone surrogate",
        "U+D83D at position 1",
    ),
    ("prepare", rb'{"text": "\udc00"}', "lone surrogate", "U+DC00 at position 0"),
    ("collect", rb'{"prompt": "\ud83d", "completion": "Yes"}', "lone surrogate", "U+D83D"),
    (
        "reward",
        rb'{"prompt": "Hi", "chosen": "a", "rejected": "\ud83d"}',
        "lone surrogate",
        "U+D83D",
    ),
    ("rl", rb'{"prompt": "\ud83d"}', "lone surrogate", "U+D83D"),
    ("sft", b"{}", "columns", "columns found: none; accepted: messages | prompt, completion"),
    ("sft", b'{"prompt": "Hi", "answer": "Yes"}', "columns", "columns found: answer, prompt"),
    ("sft", rb'{"prompt": "Hi", "\u001b[2J\ud83d": "Yes"}', "columns", r"\x1b[2J\ud83d"),
    ("sft", b'{"prompt": null, "completion": "Yes"}', "columns", "columns found: completion"),
    ("sft", b'{"prompt": "Hi", "completion": null}', "columns", "columns found: prompt"),
    ("sft", b'{"conversations": "Hi"}', "columns", "conversations (a list)"),
    (
        "sft",
        b'{"prompt": 3, "completion": "Yes"}',
        "wrong type",
        "text or a list of messages, not 3",
    ),
    (
        "sft",
        b'{"prompt": "Hi", "completion": {"text": "Yes"}}',
        "wrong type",
        "not {'text': 'Yes'}",
    ),
    ("sft", b'{"prompt": "Hi", "completion": ["Yes"]}', "wrong type", "message 2 must be"),
    ("sft", b'{"instruction": 3, "output": "Yes"}', "wrong type", "not 3"),
    (
        "sft",
        b'{"messages": [{"role": "user", "content": null}]}',
        "wrong type",
        "content must be text, not None",
    ),
    ("sft", b'{"prompt": "Hi", "completion": ""}', "empty answer", "content is empty"),
    ("sft", b'{"messages": []}', "no messages", "not []"),
    ("sft", b'{"messages": "Hi"}', "no messages", "not 'Hi'"),
    (
        "sft",
        b'{"messages": [{"role": "tool", "content": "x"}]}',
        "unknown role",
        "role 'tool' is none of system, user",
    ),
    (
        "sft",
        b'{"conversations": [{"from": ["human"], "value": "x"}]}',
        "unknown role",
        "role ['human']",
    ),
    (
        "sft",
        b'{"messages": [{"role": "user", "content": "Hi"}]}',
        "no answer",
        "the last message is the user's",
    ),
    ("rl", b'{"question": "Hi"}', "columns", "columns found: question"),
    ("rl", b'{"prompt": ["Hi"]}', "wrong type", "not 'Hi'"),
    ("rl", b'{"messages": [{"role": "system", "content": "x"}]}', "no prompt", "no user's message"),
    (
        "collect",
        b'{"prompt": "Hi"}',
        "columns",
        "without a labeller each prompt needs its answer: columns found: prompt",
    ),
    ("collect", b'{"prompt": "Hi", "completion": ""}', "empty answer", "needs its answer"),
    ("reward", b'{"prompt": "Hi", "chosen": "Yes"}', "columns", "no column 'rejected'"),
    (
        "reward",
        b'{"prompt": "Hi", "chosen": null, "rejected": "No"}',
        "columns",
        "no column 'chosen'",
    ),
    ("reward", b'{"chosen": "Yes", "rejected": "No"}', "columns", "a comparison needs prompt"),
    ("reward", b'{"prompt": "Hi", "chosen": 3, "rejected": "No"}', "wrong type", "not '3'"),
    (
        "reward",
        b'{"prompt": "Hi", "answers": "abc", "ranks": [0, 1, 2]}',
        "wrong type",
        "answers must be a list, not 'abc'",
    ),
    (
        "reward",
        b'{"prompt": "Hi", "answers": ["a", "b"], "ranks": 5}',
        "wrong type",
        "ranks must be a list, not '5'",
    ),
    (
        "reward",
        b'{"prompt": "Hi", "answers": ["a", "b"], "ranks": ["best", 1]}',
        "wrong type",
        "ranks ['best', 1]",
    ),
    (
        "reward",
        b'{"prompt": "Hi", "answers": ["a", "b"], "ranks": [NaN, 1]}',
        "wrong type",
        "ranks [nan, 1]",
    ),
    (
        "reward",
        b'{"prompt": "Hi", "answers": ["a", "b", "c"], "ranks": [0, 1]}',
        "numbers differ",
        "3 answers, 2 ranks",
    ),
    ("prepare", b'{"body": "Hi"}', "columns", "no `text` column"),
    ("prepare", b'{"text": 5}', "columns", "columns found: text"),
]
IDS = [f"{stage}-{line[:60]!r}" for stage, line, _, _ in LINES]


@pytest.fixture
def on(program, write, tmp_path):
    """on(stage, content, name, more) -> how the stage ends on a file of this content, and its
    stage.json."""

    def run(stage, content: bytes, name: str = "rows.jsonl", more: str = ""):
        (tmp_path / name).write_bytes(content)
        path = f"[{tmp_path / name}]" if stage == "prepare" else tmp_path / name
        ended = program(stage, "--config", str(write(stage, f"train_data: {path}\n{more}".strip())))
        assert "Traceback" not in ended.out + ended.err
        verdict = tmp_path / "out" / "stage.json"
        return ended, json.loads(verdict.read_text()) if verdict.exists() else None

    return run


def with_third(stage: str, line: bytes) -> bytes:
    rows = [row.encode() for row in ROWS[stage]]
    return b"\n".join([*rows[:2], line, *rows[2:]]) + b"\n"


@pytest.mark.parametrize(("stage", "line", "reason", "words"), LINES, ids=IDS)
def test_a_bad_row_ends_the_stage_and_is_named(stage, line, reason, words, on, tmp_path):
    ended, verdict = on(stage, with_third(stage, line))
    assert (ended.code, verdict) == (2, None), ended
    assert ended.err.startswith(f"error: {tmp_path / 'rows.jsonl'}:3: ")
    assert ended.err.count("\n") == 1
    assert words in ended.err


@pytest.mark.parametrize(("stage", "line", "reason", "words"), LINES, ids=IDS)
def test_or_is_skipped_counted_and_named(stage, line, reason, words, on, tmp_path):
    ended, verdict = on(stage, with_third(stage, line), more="on_bad_row: skip")
    assert ended.code == 0, ended
    (told,) = [said for said in ended.out.split("\n") if said.startswith("skipped ")]
    assert told.startswith(f"skipped {tmp_path / 'rows.jsonl'}:3: ")
    assert words in told
    assert verdict["data"]["skipped"] == {reason: 1}


LONG = (
    b'{"prompt": "'
    + b"The red fox. " * 60
    + b'", "completion": "Yes", "chosen": "a", "rejected": "b"}\n'
)
SAME = b'{"prompt": "%d", "chosen": "Yes", "rejected": "Yes"}\n'
LOST = b'{"prompt": "Hi"}\n{"prompt": "Hi", "completion": ""}\n{"prompt": "Hi", "completion": ""}\n'
FILES = [
    ("sft", "rows.jsonl", b"", "", ["rows.jsonl: no rows"]),
    ("prepare", "rows.jsonl", b"\n \r\n\t\n", "", ["rows.jsonl: no rows"]),
    ("rl", "rows.jsonl", b"\xef\xbb\xbf", "", ["rows.jsonl: no rows"]),
    (
        "sft",
        "rows.jsonl",
        LOST,
        "on_bad_row: skip",
        ["no rows that can be used; skipped: 1 x columns, 2 x empty answer"],
    ),
    ("reward", "rows.jsonl", LOST, "on_bad_row: skip", ["no rows that can be used", "3 x columns"]),
    (
        "rl",
        "rows.jsonl",
        b"Hi\nYes\n",
        "on_bad_row: skip",
        ["no rows that can be used", "2 x broken JSON"],
    ),
    (
        "collect",
        "rows.jsonl",
        b"Hi\n",
        "on_bad_row: skip",
        ["no rows that can be used", "1 x broken JSON"],
    ),
    (
        "prepare",
        "rows.jsonl",
        b"{}\n",
        "on_bad_row: skip",
        ["no rows that can be used", "1 x columns"],
    ),
    (
        "reward",
        "rows.jsonl",
        b'{"prompt": "Hi", "answers": ["a", "b"], "ranks": [%d, 1]}' % (10**400),
        "",
        ["rows.jsonl:1: ranks [1000", "a list of numbers is needed"],
    ),
    (
        "sft",
        "rows.jsonl",
        '{"prompt": "Hi"}'.encode("utf-16"),
        "",
        ["rows.jsonl:1: not UTF-8 at column 1 (byte 0xff)"],
    ),
    (
        "sft",
        "rows.jsonl",
        '{"prompt": "Hi"}'.encode("utf-16le"),
        "",
        ["rows.jsonl:1: every other byte is 0, as in UTF-16", "iconv"],
    ),
    (
        "prepare",
        "book.txt",
        ("The fox.\n" * 99).encode("utf-16le"),
        "",
        ["book.txt: every other byte is 0, as in UTF-16", "iconv"],
    ),
    (
        "prepare",
        "book.txt",
        b"One.\nTw\xf6.\n",
        "",
        ["book.txt: not UTF-8 at line 2, column 3 (byte 0xf6)"],
    ),
    ("prepare", "book.txt", b" \n", "", ["book.txt", "too little text"]),
    (
        "sft",
        "rows.json",
        b'[{"prompt": "Hi",\n "completion" "Yes"}]',
        "",
        ["rows.json: broken JSON at line 2, column 15"],
    ),
    (
        "sft",
        "rows.json",
        b'{"prompt": "Hi"}',
        "",
        ["rows.json: expected a JSON list of rows, found dict"],
    ),
    (
        "sft",
        "rows.json",
        b'[{"prompt": "Hi", "completion": "Yes"}, 7]',
        "",
        ["rows.json:row 2: a row must be a JSON object"],
    ),
    (
        "sft",
        "rows.csv",
        b"prompt,completion\nHi,Yes\n",
        "",
        ["rows.csv: a .csv file is not read", ".jsonl"],
    ),
    ("sft", "rows.parquet", b"PAR1 not really PAR1", "", ["rows.parquet: not readable as Parquet"]),
    ("sft", "rows.jsonl.gz", b"not packed", "", ["rows.jsonl.gz: damaged .gz data"]),
    (
        "sft",
        "rows.jsonl.gz",
        gzip.compress(LONG * 9)[:-9],
        "on_bad_row: skip",
        ["rows.jsonl.gz: its .gz data is cut off"],
    ),
    ("sft", "rows.txt", b"Hi", "", ["rows.txt: columns found: text"]),
    (
        "sft",
        "rows.jsonl",
        b'{"prompt": "Hi", "completion": "Yes"}\n',
        "",
        ["rows.jsonl:1: all 1 rows share the held-out"],
    ),
    (
        "sft",
        "rows.jsonl",
        LONG + LONG.replace(b"red", b"old"),
        "",
        ["rows.jsonl:1: this and all 1 rows", "60 tokens or more"],
    ),
    (
        "rl",
        "rows.jsonl",
        LONG * 3,
        "",
        ["rows.jsonl:1: this and all 3 prompts are longer than max_prompt_length 50"],
    ),
    ("rl", "rows.jsonl", b'{"prompt": "Hi"}', "", ["a rollout takes 2 prompts", "has 1"]),
    ("collect", "rows.jsonl", LONG * 3, "", ["all 3 prompts are longer than max_prompt_length 50"]),
    (
        "collect",
        "rows.jsonl",
        ROWS["sft"][0].encode(),
        "",
        ["all 1 comparisons share the held-out prompts"],
    ),
    (
        "reward",
        "rows.jsonl",
        SAME % 1 + SAME % 2,
        "",
        ["rows.jsonl:1: this and all 1 comparisons", "'identical': 1"],
    ),
    (
        "reward",
        "rows.jsonl",
        LONG + LONG.replace(b"red", b"old"),
        "",
        ["rows.jsonl:1: ", "'too_long': 2", "max_length 60"],
    ),
    ("sft", "x" * 300 + ".jsonl", None, "", ["File name too long"]),
    ("prepare", "x" * 300 + ".jsonl", None, "", ["File name too long"]),
    ("sft", "nowhere.jsonl", None, "", ["nowhere.jsonl: no such file"]),
]


@pytest.mark.parametrize(("stage", "name", "content", "more", "parts"), FILES)
def test_a_file_without_a_usable_row_is_refused(
    stage, name, content, more, parts, on, program, write, tmp_path
):
    if content is None:  # no such file
        path = f"[{tmp_path / name}]" if stage == "prepare" else tmp_path / name
        ended, verdict = program(stage, "--config", str(write(stage, f"train_data: {path}"))), None
    else:
        ended, verdict = on(stage, content, name, more)
    assert (ended.code, verdict) == (2, None), ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert all(part in ended.err for part in parts), ended.err


SFT = "\n".join(ROWS["sft"]).encode()
FOUR = {"train": {"rows": 3, "truncated": 0, "dropped": 0}, "skipped": {}}
TEN_MB = b'{"prompt": "Hi", "completion": "' + b"The fox. " * 1_111_111 + b'"}\n'
TRAINED = [
    ("sft", b"\xef\xbb\xbf" + SFT, FOUR),
    ("sft", SFT.replace(b"\n", b"\r\n") + b"\r\n", FOUR),
    ("sft", b"\n\n" + SFT.replace(b"\n", b"\n \n"), FOUR),
    ("sft", SFT.replace(b"}", b', "id": 7, "messages": null, "x": [1e9]}'), FOUR),
    ("sft", SFT.replace(b"Five", rb"a\u0000b"), FOUR),
    ("sft", SFT.replace(b"Five", "\u2028\u0085é👩".encode()), FOUR),
    ("sft", SFT.replace(b'"Name an animal."', b'""'), FOUR),
    ("sft", SFT.replace(b"Five.", b" "), FOUR),
    ("sft", LONG + SFT, {"train": {"rows": 3, "truncated": 1, "dropped": 1}}),
    ("sft", TEN_MB + SFT, {"train": {"rows": 4, "truncated": 1, "dropped": 0}}),
    (
        "reward",
        SAME % 1 + "\n".join(ROWS["reward"]).encode(),
        {"train": {"comparisons": 3, "identical": 1, "tied": 1}},
    ),
    (
        "reward",
        LONG + "\n".join(ROWS["reward"]).encode(),
        {"train": {"comparisons": 3, "too_long": 2, "tied": 1}},
    ),
    ("rl", LONG + b"\r\n".join(row.encode() for row in ROWS["rl"]), {"skipped": {}}),
    ("collect", LONG + "\n".join(ROWS["collect"]).encode(), {"skipped": {}}),
    (
        "prepare",
        b'{"text": ""}\n{"text": "a\\u0000b \\r\\n"}\n' + "\n".join(ROWS["prepare"]).encode(),
        {"skipped": {}},
    ),
]


@pytest.mark.parametrize(
    ("stage", "content", "counts"), TRAINED, ids=[f"{s}-{c[:40]!r}" for s, c, _ in TRAINED]
)
def test_odd_files_that_train(stage, content, counts, on):
    ended, verdict = on(stage, content)
    assert (ended.code, "error" in ended.err) == (0, False), ended
    for side, expected in counts.items():
        found = verdict["data"][side]
        assert (
            {key: found[key] for key in expected} == expected
            if side != "skipped"
            else found == expected
        )


def test_only_the_first_skipped_rows_are_named_and_all_are_counted(on):
    content = b"broken\n" * 9 + SFT + b'\n{"prompt": "Hi"}\n'
    ended, verdict = on("sft", content, more="on_bad_row: skip")
    assert ended.out.count("skipped ") == 5
    assert verdict["data"]["skipped"] == {"broken JSON": 9, "columns": 1}


def test_bad_rows_at_the_end_do_not_make_up_the_held_out_ones(on):
    ended, verdict = on(
        "sft",
        SFT + b'\n{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n',
        more="on_bad_row: skip",
    )
    assert ended.code == 0, ended
    assert verdict["data"]["train"]["rows"] == 3
    assert verdict["data"]["eval"]["rows"] == 1


def test_people_s_bad_pairs_are_named_before_sampling(on, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "Hi", "chosen": "Yes", "rejected": "\\ud83d"}\n' + ROWS["reward"][0]
    )
    ended, _ = on("collect", SFT, more=f"pairs: [{tmp_path / 'pairs.jsonl'}]")
    assert ended.code == 2
    assert f"{tmp_path / 'pairs.jsonl'}:1: lone surrogate" in ended.err
    ended, verdict = on(
        "collect", SFT, more=f"pairs: [{tmp_path / 'pairs.jsonl'}]\non_bad_row: skip"
    )
    assert (ended.code, verdict["data"]["skipped"]) == (0, {"lone surrogate": 1})


def test_a_lone_surrogate_in_a_column_that_is_only_handed_on(on, tmp_path):
    """It is written as JSON's escape, and so read back as it was."""
    row = {"prompt": "Who?", "chosen": "Yes", "rejected": "No", "note": "\ud83d"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    ended, _ = on("collect", SFT, more=f"pairs: [{tmp_path / 'pairs.jsonl'}]")
    assert ended.code == 0
    lines = [*(tmp_path / "out/comparisons.jsonl").open(), *(tmp_path / "out/eval.jsonl").open()]
    assert row in map(json.loads, lines)


def test_there_are_enough_cases():
    assert len(LINES) + len(FILES) + len(TRAINED) >= 40
