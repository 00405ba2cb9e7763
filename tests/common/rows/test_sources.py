"""Rows read as they are and named by file and line, whatever they are packed in; damage is told,
and where it is."""

import gzip
import itertools
import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest

from common.program.errors import InputError
from common.rows import unpack
from common.rows.sources import BadRows, content_of, iter_rows, read_rows


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def pack(content: bytes, suffix: str) -> bytes:
    """In two pieces, as a file that was appended to."""
    import zstandard

    half = len(content) // 2
    one = (
        gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    )
    return one(content[:half]) + one(content[half:])


# read_rows


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n{"a": "two"}\n',
        '{"a": 1}\n{"a": "two"}',
        '\ufeff{"a": 1}\n{"a": "two"}\n',
        '{"a": 1}\r\n{"a": "two"}\r\n',
        '  {"a": 1}  \n\t{"a": "two"}\n   ',
    ],
    ids=["plain", "no last line end", "BOM", "CRLF", "spaces"],
)
def test_jsonl(tmp_path, content):
    path = write(tmp_path / "x.jsonl", content)
    rows = read_rows(path)
    assert [row.data for row in rows] == [{"a": 1}, {"a": "two"}]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
    path = write(tmp_path / "x.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n')
    assert [(row.data["a"], row.origin) for row in read_rows(path)] == [
        (1, f"{path}:2"),
        (2, f"{path}:5"),
    ]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """U+2028 and friends are legal inside a JSON string, and str.splitlines() would break there."""
    text = "a\u2028b\u2029c\u0085d\u00a0e"
    path = write(
        tmp_path / "x.jsonl",
        json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "next"}\n',
    )
    rows = read_rows(path)
    assert [row.data["text"] for row in rows] == [text, "next"]
    assert rows[1].origin == f"{path}:2"


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"a": 1', "broken JSON"),
        ("{'a': 1}", "broken JSON"),
        ('{"a": 1} {"a": 2}', "broken JSON"),
        ("null", "expected a JSON object"),
        ("[1, 2]", "expected a JSON object, found list"),
        ('"text"', "expected a JSON object, found str"),
    ],
    ids=["cut", "quotes", "two", "null", "list", "str"],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "x.jsonl", f'{{"a": 1}}\r\n\r\n{line}\r\n{{"a": 3}}\r\n')
    with pytest.raises(InputError, match=f"{re.escape(path)}:3: .*{words}"):
        read_rows(path)


def test_json_list(tmp_path):
    path = write(tmp_path / "x.json", '\ufeff[{"a": 1},\r\n {"a": "\u2028"}]')
    assert [(row.data["a"], row.origin) for row in read_rows(path)] == [
        (1, f"{path}:row 1"),
        ("\u2028", f"{path}:row 2"),
    ]
    for content, words in [
        ('{"a": 1}', "expected a JSON list of rows, found dict"),
        ('[{"a": 1},', "broken JSON"),
        ('[{"a": 1}, 7]', "row 2: a row must be a JSON object, this is '7'"),
        ("[]", "no rows"),
    ]:
        path = write(tmp_path / "y.json", content)
        with pytest.raises(InputError, match=f"{re.escape(path)}.*{words}"):
            read_rows(path)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "hi\u2028"}, {"role": "assistant", "content": "yes"}]
    table = pyarrow.table({"prompt": ["a", None], "n": [1, 2], "messages": [messages, messages]})
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table, path)
    rows = read_rows(str(path))
    assert [row.data for row in rows] == [
        {"prompt": "a", "n": 1, "messages": messages},
        {"prompt": None, "n": 2, "messages": messages},
    ]
    assert [row.origin for row in rows] == [f"{path}:1", f"{path}:2"]


def test_damaged_parquet_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", b"PAR1 not really")
    with pytest.raises(InputError, match=r"x\.parquet"):
        read_rows(path)


def test_txt_is_one_row(tmp_path):
    path = write(tmp_path / "x.txt", "\ufeffOne.\n\n{not json\nTwo \u2028 three.\n")
    assert [row[:2] for row in read_rows(path)] == [
        ({"text": "One.\n\n{not json\nTwo \u2028 three.\n"}, path)
    ]


def test_folder_in_order_of_names(tmp_path):
    write(tmp_path / "b.jsonl", '{"n": 2}\n')
    write(tmp_path / "a/z.json", '[{"n": 1}]')
    write(tmp_path / "c.txt", "text")
    write(tmp_path / "README.md", "no data")
    rows = read_rows(str(tmp_path))
    assert [row.data for row in rows] == [{"n": 1}, {"n": 2}, {"text": "text"}]


def test_unreadable_sources(tmp_path):
    latin1 = write(tmp_path / "x.jsonl", '{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(
        InputError, match=rf"{re.escape(latin1)}:1: not UTF-8 at column 8 \(byte 0xe9\)"
    ):
        read_rows(latin1)
    for content in ("", "\n\n", "\ufeff"):
        empty = write(tmp_path / "empty.jsonl", content)
        with pytest.raises(InputError, match=rf"{re.escape(empty)}: no rows"):
            read_rows(empty)
    (tmp_path / "none").mkdir()
    for path in (
        tmp_path / "none",
        tmp_path / "missing.jsonl",
        "no/such/file",
        "./x",
        "missing.parquet",
    ):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_rows(str(path))
    with pytest.raises(
        InputError, match="no-such-person/no-such-data"
    ):  # offline: the Hub gives nothing
        read_rows("no-such-person/no-such-data")


# Packed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_read_as_if_they_were_not(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    texts = [f"{n} \u2028 é👩 " * 40 + "\n" for n in range(900)]
    plain = {
        "a.jsonl": "\ufeff"
        + "\r\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts),
        "b.json": json.dumps([{"text": text} for text in texts]),
        "d.txt": "\ufeffOne.\r\nTwo\n",
    }
    for name, content in plain.items():
        write(tmp_path / "plain" / name, content)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "plain/c.parquet")
    for file in (tmp_path / "plain").iterdir():
        write(tmp_path / "packed" / (file.name + suffix), pack(file.read_bytes(), suffix))
    write(tmp_path / "packed/notes.md.gz", b"not looked at")
    rows, packed = (read_rows(str(tmp_path / name)) for name in ("plain", "packed"))
    assert [row.data["text"] for row in rows] == [*texts * 3, "One.\nTwo\n"]
    assert [row.data for row in packed] == [row.data for row in rows]
    places = [row.origin.replace("/packed/", "/plain/").replace(suffix, "") for row in packed]
    assert places == [row.origin for row in rows]
    assert rows[1].origin.endswith("a.jsonl:3")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_to_a_packed_file_is_named(tmp_path, suffix):
    import random

    noise = random.Random(0)
    content = "".join(
        json.dumps({"text": noise.randbytes(300).hex()}) + "\n" for _ in range(1000)
    ).encode()
    whole = pack(content, suffix)
    assert len(whole) > 250_000
    cut = write(tmp_path / f"cut.jsonl{suffix}", whole[:200_000])
    with pytest.raises(
        InputError, match=rf"{re.escape(cut)}: its {suffix} data is cut off at byte 200000"
    ):
        read_rows(cut)
    good = list(itertools.islice(iter_rows(cut), 300))  # what lies before the damage can be read
    assert [row.data for row in good] == [json.loads(line) for line in content.split(b"\n")[:300]]
    hurt = bytearray(whole)
    hurt[100_000:100_010] = bytes(10)
    path = write(tmp_path / f"hurt.jsonl{suffix}", bytes(hurt))
    with pytest.raises(InputError) as told:
        read_rows(path)
    place = re.fullmatch(
        rf"{re.escape(path)}: damaged {suffix} data before byte (\d+) \(.*\)", str(told.value)
    )
    assert 100_000 < int(place[1]) <= len(whole)  # gzip may notice at its checksum alone
    path = write(tmp_path / f"none.jsonl{suffix}", content)
    place = f"damaged {suffix} data before byte {unpack.PACKED[suffix]}"
    with pytest.raises(InputError, match=rf"{re.escape(path)}: {place}"):
        read_rows(path)


def test_the_line_that_is_no_utf8_is_found_far_into_a_packed_file(tmp_path):
    content = ('{"text": "é"}\n' * 100_000).encode()
    at = content.index(b"\xc3", 1_200_000)
    broken, line = content[: at + 1] + content[at + 2 :], 1 + content[:at].count(b"\n")
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(broken, 1))
    with pytest.raises(
        InputError, match=rf"{re.escape(path)}:{line}: not UTF-8 at column 11 \(byte 0xc3\)"
    ):
        read_rows(path)
    path = write(tmp_path / "cut.txt", "One.\nabcé".encode()[:-1])
    with pytest.raises(
        InputError, match=rf"{re.escape(path)}: not UTF-8 at line 2, column 4 \(byte 0xc3\)"
    ):
        read_rows(path)


def test_a_broken_line_of_a_packed_file_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl.zst", pack(b'{"a": 1}\n\n{"a": \n', ".zst"))
    with pytest.raises(InputError, match=rf"{re.escape(path)}:3: broken JSON"):
        read_rows(path)
    for missing in ("gone.jsonl.zst", "gone.txt.gz", "gone.gz"):
        with pytest.raises(InputError, match=f"{missing}: no such file"):
            read_rows(missing)


# What is too much, or no file


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("format", [".jsonl", ".json", ".txt", ".parquet"])
def test_a_bomb_is_refused_before_it_is_held(tmp_path, monkeypatch, format, suffix):
    """100 MB of blanks, in some thousand bytes."""
    import zstandard

    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    bomb = compress(b"\n" + b" " * 10**8)
    path = write(tmp_path / f"x{format}{suffix}", bomb)
    monkeypatch.setattr(unpack, "LONGEST", 10**6)
    monkeypatch.setattr(unpack, "LARGEST", 10**6)
    monkeypatch.setattr(unpack, "PACKED", {".gz": 1 << 10, ".zst": 1 << 7})
    tracemalloc.start()
    with pytest.raises(InputError, match=re.escape(path) + ".*1,000,000 (characters|bytes)"):
        read_rows(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * 10**7
    tracemalloc.stop()


def test_a_line_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "LONGEST", 20)
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": "123456789"}\n{"a": 2}')
    assert len(read_rows(path)) == 3
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": "1234567890"}\n{"a": 2}')
    for kind in ("error", "skip"):
        with pytest.raises(InputError, match=rf"{path}:3: a line of 20 characters or more"):
            read_rows(path, bad=BadRows(kind))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.zst", "x.txt", "x.json", "x.parquet", "x"])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()  # is only walked through
    for source in (tmp_path / name, tmp_path) if Path(name).suffix else (tmp_path / name,):
        for reading in (read_rows, content_of):
            with pytest.raises(InputError, match=f"/{name}: is a FIFO, a socket or a device, and"):
                reading(str(source))
    with pytest.raises(InputError, match="/dev/null: is a FIFO, a socket or a device"):
        read_rows("/dev/null")


def test_what_python_has_no_value_for_is_a_bad_row(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"one", b"\xff", b"three"]).view("string")
    times = pyarrow.array([0, 1, 10**18]).view("timestamp[us]")
    ok = ["a", "b", "c"]
    for column, row in ((broken, 2), (times, 3)):
        path = str(tmp_path / "x.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": ok, "unused": column}), path)
        with pytest.raises(InputError, match=f"{path}:{row}: a value cannot be read: "):
            read_rows(path)
        bad = BadRows("skip")
        kept = read_rows(path, bad=bad)
        assert [r.data["text"] for r in kept] == [t for n, t in enumerate(ok, 1) if n != row]
        assert bad.counts == {"not readable": 1}


# Streams


def test_rows_come_one_by_one(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    rows = iter_rows(path)
    assert [next(rows).data["a"], next(rows).data["a"]] == [1, 2]
    with pytest.raises(InputError, match=r"x\.jsonl:3: broken JSON"):
        next(rows)


def test_a_hub_data_set_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        found = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(iter_rows("owner/name:en"))
    assert [row[:2] for row in rows] == [
        ({"text": "one"}, "owner/name:en:1"),
        ({"text": "two"}, "owner/name:en:2"),
    ]
    assert [row.data for row in read_rows("owner/name")] == [row.data for row in rows]
    assert asked == [("owner/name", "en", "train", True), ("owner/name", None, "train", False)]

    def breaking(*args, **keys):
        yield {"text": "one"}
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    with pytest.raises(
        InputError, match=r"owner/name: the Hub's stream broke behind row 1 \(reset\)"
    ):
        list(iter_rows("owner/name"))


# What a source holds


def test_content_is_told_by_bytes_and_names_within_a_folder(tmp_path):
    for folder in ("one", "two", "three", "four"):
        write(tmp_path / folder / "a.txt", "text")
        write(tmp_path / folder / "sub/b.jsonl", '{"n": 1}')
        write(tmp_path / folder / "README.md", folder)  # no data
    write(tmp_path / "three/a.txt", "texT")
    (tmp_path / "four/a.txt").rename(tmp_path / "four/c.txt")
    found = [content_of(str(tmp_path / folder)) for folder in ("one", "two", "three", "four")]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    # echo -n text | sha256sum
    digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert content_of(str(tmp_path / "one/a.txt")) == digest
    assert content_of("no-such-person/no-such-data") is None  # offline
