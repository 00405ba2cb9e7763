"""Shard files grow in order, and are the same however many processes made them and however often
these were killed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.program.errors import InputError
from common.rows import sources
from common.text.tokenizer import _NO_REGEX, GAPS, GPT2_PATTERN, PATTERN, Tokenizer, _split
from stages.pretrain import tokenise
from stages.pretrain.prepare import Config, main
from stages.pretrain.shards import ShardWriter
from stages.pretrain.tokenise import Document, chunked, encode_all

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [
    f"{n} foxes and {n * n} birds went to town {n} times, where it was cold. " * (1 + n % 4)
    for n in range(120)
]


@pytest.fixture
def setting(tmp_path):
    """Three sources, the last a book; chunks of some documents, noted one by one."""
    for name, texts in (("a", TEXTS[:70]), ("b", TEXTS[70:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    (tmp_path / "book.txt").write_text("".join(TEXTS))

    def make(name: str, **keys) -> Config:
        sources = [str(tmp_path / source) for source in ("a.jsonl", "b.jsonl", "book.txt")]
        keys = {"vocab_size": 300, "eval_fraction": 0.1, "shard_tokens": 700} | keys
        return Config(train_data=sources, output_dir=str(tmp_path / name), **keys)

    return make


@pytest.fixture
def fine(monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 500)
    monkeypatch.setattr(tokenise, "SAVE_SECONDS", 0)


def made(cfg: Config) -> dict[str, bytes]:
    """All files but stage.json, which tells times."""
    return {
        file.name: file.read_bytes()
        for file in Path(cfg.output_dir).iterdir()
        if file.name not in ("stage.json", "manifest.json")
    }


# Processes


def test_processes_change_nothing(tokenizer):
    chunks = list(
        chunked(
            4,
            [
                Document({"train" if n % 3 else "eval": text}, f"f:{n}")
                for n, text in enumerate(TEXTS * 60)
            ],
        )
    )
    alone, together = (list(encode_all(tokenizer, iter(chunks), processes)) for processes in (1, 2))
    assert len(alone) == len(together) > 2
    for one, other in zip(alone, together, strict=True):
        assert one[:3] == other[:3]
        assert all(np.array_equal(one.ids[split], other.ids[split]) for split in ("train", "eval"))
    expected = [
        token for text in (TEXTS * 60)[::3] for token in (*tokenizer.encode(text), tokenizer.eot_id)
    ]
    assert np.concatenate([chunk.ids["eval"] for chunk in together]).tolist() == expected
    assert sum(chunk.documents for chunk in alone) == 7200
    assert (
        sum(chunk.bytes["train"] + chunk.bytes["eval"] for chunk in alone)
        == sum(map(len, TEXTS)) * 60
    )


def test_a_refused_text_is_named(tokenizer):
    documents = [Document({"train": "fine"}, "f:1"), Document({"train": "\ud800"}, "f:7")]
    with pytest.raises(InputError, match=r"f:7: lone surrogate"):
        list(encode_all(tokenizer, chunked(0, documents), 1))


# Files


def test_a_writer_goes_on_where_it_was(tmp_path):
    stream = np.arange(1000)
    whole = ShardWriter(tmp_path, "train", "uint16", 100)
    whole.write(stream)
    whole.sync()
    files = [file.read_bytes() for file in sorted(tmp_path.glob("train-*.bin"))]
    assert np.frombuffer(b"".join(files), np.uint16).tolist() == stream.tolist()
    assert [len(file) for file in files] == [200] * 10
    for at in (0, 1, 99, 100, 101, 450, 1000):
        first = ShardWriter(tmp_path, "part", "uint16", 100)
        first.write(stream[:at])
        crc = first.crc
        first.write(stream[at:] + 1)  # what no journal knows of
        first.sync()
        second = ShardWriter(tmp_path, "part", "uint16", 100)
        assert second.restore(at, crc)
        assert len(list(tmp_path.glob("part-*.bin"))) == -(-at // 100)
        second.write(stream[at:])
        second.sync()
        assert [file.read_bytes() for file in sorted(tmp_path.glob("part-*.bin"))] == files
        assert second.crc == whole.crc


def test_a_writer_refuses_files_that_are_not_its_own(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", 100)
    writer.write(np.arange(250))
    writer.sync()
    assert not ShardWriter(tmp_path, "train", "uint16", 100).restore(250, writer.crc + 1)
    assert not ShardWriter(tmp_path, "train", "uint16", 100).restore(
        251, writer.crc
    )  # shorter than was noted
    (tmp_path / "train-00001.bin").unlink()
    assert not ShardWriter(tmp_path, "train", "uint16", 100).restore(250, writer.crc)


# Kills


class Crash(Exception):
    pass


@pytest.mark.parametrize("weights", [None, [6, 3, 1]], ids=["one stream", "mixture"])
def test_an_interruption_anywhere_changes_nothing(setting, fine, monkeypatch, capsys, weights):
    whole = setting("whole", weights=weights)
    main(whole)
    parts, add = setting("parts", weights=weights), tokenise.Shelf.add
    for at in (0, 1, 7, 12):  # chunks until the next crash

        def failing(shelf, chunk, left=[at]):  # noqa: B006 (a count of its own for each)
            add(shelf, chunk)
            left[0] -= 1
            if left[0] < 0:
                for writer in shelf.writers.values():  # written, but in no journal
                    writer.sync()
                raise Crash

        monkeypatch.setattr(tokenise.Shelf, "add", failing)
        with pytest.raises(Crash):
            main(parts)
        monkeypatch.setattr(tokenise.Shelf, "begin", lambda *_, **__: pytest.fail("started over"))
    capsys.readouterr()
    monkeypatch.setattr(tokenise.Shelf, "add", add)
    main(parts)
    done = re.search(
        r"going on from .*progress\.json, (\d+) documents are done", capsys.readouterr().out
    )
    assert 40 < int(done[1]) < 121
    assert made(parts) == made(whole)


KILLED = """
import json, multiprocessing, os, sys
from common.config.schema import guard
from common.program.signals import interrupt_with
from stages.pretrain import prepare, tokenise

tokenise.CHUNK, tokenise.SAVE_SECONDS = 500, 0
add = tokenise.Shelf.add

def dying(shelf, chunk):
    add(shelf, chunk)
    if shelf.sources[1]["done"] > 20:
        shelf.writers["train"].sync()  # written, but in no journal
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), int(sys.argv[2]))

tokenise.Shelf.add = dying
if __name__ == "__main__":
    interrupt_with("prepare")
    guard(lambda: prepare.main(prepare.Config(**json.loads(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    ("kind", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGINT, 75)]
)
def test_a_killed_run_is_finished_by_the_next(kind, code, setting, fine, monkeypatch):
    whole, killed = setting("whole"), setting("killed", num_proc=2)
    main(whole)
    keys = {"train_data": killed.train_data, "output_dir": killed.output_dir, "num_proc": 2}
    keys |= {"vocab_size": 300, "eval_fraction": 0.1, "shard_tokens": 700}
    command = [sys.executable, "-c", KILLED, json.dumps(keys), str(int(kind))]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert job.returncode == code, job.stderr
    assert not (Path(killed.output_dir) / "shards.json").exists()
    journal = json.loads((Path(killed.output_dir) / tokenise.JOURNAL).read_text())
    assert [source["done"] for source in journal["sources"]][::2] == [70, 0]
    assert 0 < journal["sources"][1]["done"] <= 20
    workers = [int(word) for word in job.stdout.split()[-2:]]
    for _ in range(100):  # they end with their parent
        if not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
            break
        time.sleep(0.1)
    if sys.platform == "linux":
        assert not [worker for worker in workers if Path(f"/proc/{worker}/cmdline").exists()]
    encoded = []
    encode = tokenise.encode
    monkeypatch.setattr(
        tokenise, "encode", lambda *chunk: encoded.append(chunk[1]) or encode(*chunk)
    )
    main(setting("killed"))  # by one process this time
    assert set(encoded) == {1, 2}  # nothing of the first source again
    assert made(killed) == made(whole)


def test_only_what_was_made_from_the_same_is_taken(setting, fine, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenise, "CHUNK", 4000)

    def crash(shelf, chunk, add=tokenise.Shelf.add):
        add(shelf, chunk)
        if shelf.sources[1]["done"] > 20:
            raise Crash

    def goes_on(cfg: Config) -> bool:
        begun = []
        begin = tokenise.Shelf.begin.__func__
        with monkeypatch.context() as patch:
            patch.setattr(
                tokenise.Shelf,
                "begin",
                classmethod(lambda cls, *a, **k: begun.append(1) or begin(cls, *a, **k)),
            )
            main(cfg)
        return not begun

    def interrupt(**keys) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(tokenise.Shelf, "add", crash)
            with pytest.raises(Crash):
                main(setting("x", **keys))

    interrupt()
    assert goes_on(setting("x", num_proc=1))
    assert not goes_on(
        setting("x")
    )  # a finished one starts over, as it may be run again for its code
    for keys in (
        {"seed": 1},
        {"eval_fraction": 0.2},
        {"vocab_size": 310},
        {"shard_tokens": 650},
        {"weights": [1, 1, 1]},
    ):
        interrupt()
        assert not goes_on(setting("x", **keys)), keys
    interrupt()
    shard = tmp_path / "x/train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    assert not goes_on(setting("x"))
    interrupt()
    (tmp_path / "a.jsonl").write_text(
        (tmp_path / "a.jsonl").read_text().replace("foxes", "boxes", 1)
    )
    assert not goes_on(setting("x"))
    main(setting("fresh"))
    assert made(setting("x")) == made(setting("fresh"))


def test_a_source_that_shrinks_while_it_is_read(setting, fine, monkeypatch, tmp_path):
    begin = tokenise.Shelf.begin.__func__

    def shrink(cls, *args, **keys):
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": "no more"}))
        return begin(cls, *args, **keys)

    monkeypatch.setattr(tokenise.Shelf, "begin", classmethod(shrink))
    with pytest.raises(InputError, match=r"b\.jsonl: changed while it was being read"):
        main(setting("x"))


# Long documents

PLACES = [
    "a b",
    "it's  two\n\n\nlines\n next",
    "x \n \n y",
    "word.\n\nword",
    "\t\tcode  { }\n",
    "日本。\n語 ",
    "1234 567 ",
    " " * 300 + "z",
    "'s",
    "é\u2028 \u0085",
]


@pytest.mark.heavy
@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
def test_a_long_text_has_the_ids_of_its_pieces(tokenizer, monkeypatch, pattern):
    parts = {"type": "Sequence", "pretokenizers": [_split(pattern), _NO_REGEX]}
    own = Tokenizer(tokenizer._model, parts, tuple(tokenizer._special))
    rng = np.random.default_rng(0)
    cuts = 0
    for size in (1, 3, 20):
        monkeypatch.setattr(tokenise, "CHUNK", size)
        for _ in range(300):
            text = "".join(rng.choice(PLACES) for _ in range(30))
            blocks = [text[i : i + 17] for i in range(0, len(text), 17)]
            pieces = list(tokenise.between_words(blocks, own.gap))
            assert "".join(pieces) == text
            assert [i for piece in pieces for i in own.encode(piece)] == own.encode(text)
            cuts += len(pieces) - 1
    assert cuts > 5000


GAPLESS = {
    "base64": "QUJD1RE+Vk/h0dXY3eHl6MTIz",
    "Chinese": "的一是不了人我在有他这中大来上国。、，４５",
    "blank": "\n\u3000\t",
    "symbols": "x1_'s!é²٣",
}


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
@pytest.mark.parametrize("letters", GAPLESS)
def test_a_text_without_gaps_has_the_ids_of_its_pieces(tokenizer, monkeypatch, pattern, letters):
    """However it comes in blocks."""
    monkeypatch.setattr(tokenise, "CHUNK", 300)
    monkeypatch.setattr(tokenise, "GAPLESS", 2000)
    parts = {"type": "Sequence", "pretokenizers": [_split(pattern), _NO_REGEX]}
    own = Tokenizer(tokenizer._model, parts, tuple(tokenizer._special))
    text = "".join(np.random.default_rng(0).choice([*GAPLESS[letters]], 30_000))
    text = text + "and now. " * 100 + text[:700]
    pieces = list(tokenise.between_words([text], own.gap))
    for size in (17, 1999, 5000):
        blocks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(tokenise.between_words(blocks, own.gap)) == pieces
    assert "".join(pieces) == text and len(pieces) > 15
    assert [i for piece in pieces for i in own.encode(piece)] == own.encode(text)


def test_a_text_without_gaps_takes_time_as_long_as_it_is(monkeypatch):
    """What is looked at, in characters: by searches for a gap, and by adding up blocks."""
    monkeypatch.setattr(tokenise, "CHUNK", 1000)
    monkeypatch.setattr(tokenise, "GAPLESS", 4000)
    seen, gap = [], re.compile(GAPS[PATTERN])

    class Counting:
        """A gap that counts how far it is searched."""

        pattern = gap.pattern

        def search(self, held: str, start: int, end: int | None = None):
            seen.append(min(len(held), end or len(held)) - start)
            return gap.search(held, start, end or len(held))

    for blocks in (["ACGT" * 500] * 200, ["ACGT" * 100_000]):
        seen.clear()
        pieces = list(tokenise.between_words(blocks, Counting()))
        assert [len(piece) for piece in pieces] == [4000] * 100
        assert sum(seen) < 2 * 400_000


@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("number", [1, 30])
def test_a_book_in_pieces_is_the_same_book(tmp_path, monkeypatch, number, fraction):
    """As .txt and as .jsonl, held out as a whole or giving its tail, cut into pieces or not."""
    rng = np.random.default_rng(1)
    books = [
        "".join(rng.choice([*TEXTS, "\n\n", "   \n"]) for _ in range(20)) + "\n \n" * n
        for n in range(number)
    ]
    (tmp_path / "txt").mkdir()
    for n, book in enumerate(books):
        (tmp_path / f"txt/{n:02d}.txt").write_text(book)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": book}) + "\n" for book in books)
    )
    files = []
    for chunk, block, source in (
        (1 << 18, 1 << 20, "txt"),
        (100, 130, "txt"),
        (100, 1 << 20, "rows.jsonl"),
    ):
        monkeypatch.setattr(tokenise, "CHUNK", chunk)
        monkeypatch.setattr(sources, "BLOCK", block)
        cfg = Config(
            train_data=[str(tmp_path / source)],
            output_dir=str(tmp_path / "x"),
            vocab_size=300,
            eval_fraction=fraction,
        )
        main(cfg)
        files.append(
            {name: content for name, content in made(cfg).items() if name != "shards.json"}
        )
    assert files[0] == files[1] == files[2]


def test_a_text_that_is_refused_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK", 50)
    monkeypatch.setattr(sources, "BLOCK", 64)
    book = tmp_path / "book.txt"
    keys = {"train_data": [str(book)], "output_dir": str(tmp_path / "x"), "eval_fraction": 0.1}
    book.write_text("abc def\n" * 60)
    main(Config(tokenizer="characters", **keys))
    book.write_text("abc def\n" * 40 + "abc?def" + "abc def\n" * 40)
    with pytest.raises(
        InputError,
        match=r"book\.txt from character \d+ on: character '\?' .* at position \d+ is none of",
    ):
        main(Config(tokenizer=str(tmp_path / "x"), **keys | {"output_dir": str(tmp_path / "y")}))
    book.write_bytes(b"abc def\n" * 40 + b"abc \xff def")
    with pytest.raises(
        InputError, match=r"book\.txt: not UTF-8 at line 41, column 5 \(byte 0xff\)"
    ):
        main(Config(**keys))
    book.write_bytes(b"abc def " * 40 + b"abc \xff def")
    with pytest.raises(InputError, match=r"book\.txt: not UTF-8 at column 325 \(byte 0xff\)"):
        main(Config(**keys))
