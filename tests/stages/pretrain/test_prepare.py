"""Documents -> shards: nothing added but one end-of-text each, nothing lost, nothing held out that
is also trained on."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from common.handoff.locate import load_tokenizer
from common.program.errors import InputError
from common.program.files import verify
from common.rows.shards import Shards
from stages.pretrain.prepare import Config, main

SENTENCE = "the red fox and a blue bird went to town where rivers are cold"
WORDS = SENTENCE.split()
DOCUMENTS = [
    " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 12)) + f". Number {n}, isn't it?\n"
    for n in range(40)
]
DOCUMENTS[3] += "<|endoftext|> and <|pad|><|user|> stay text"
DOCUMENTS[7] = "  two\n\n\nlines é👩 \t"


@pytest.fixture
def setting(tmp_path):
    def make(documents=DOCUMENTS, **keys) -> Config:
        file = tmp_path / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        defaults = {
            "train_data": [str(file)],
            "output_dir": str(tmp_path / "shards"),
            "vocab_size": 300,
            "eval_fraction": 0.1,
        }
        return Config(**defaults | keys)

    return make


def shards(cfg: Config, split: str, dtype=np.uint16) -> list[np.ndarray]:
    return [
        np.fromfile(file, dtype) for file in sorted(Path(cfg.output_dir).glob(f"{split}-*.bin"))
    ]


def documents_in(cfg: Config, split: str) -> list[str]:
    """Cut at the end-of-text tokens and decoded, control tokens shown."""
    tokenizer = load_tokenizer(cfg.output_dir)
    parts, part = [], []
    for token in np.concatenate(shards(cfg, split)).tolist():
        if token == tokenizer.eot_id:
            parts.append(tokenizer.decode(part, skip_control=False))
            part = []
        else:
            part.append(token)
    assert not part, "the last document has no end-of-text"
    return parts


def test_round_trip_and_split(setting):
    cfg = setting()
    main(cfg)
    train, heldout = documents_in(cfg, "train"), documents_in(cfg, "eval")
    assert len(heldout) == 4
    # Exactly one end-of-text is behind each, or there were empty ones.
    assert sorted(train + heldout) == sorted(DOCUMENTS)
    assert [text for text in DOCUMENTS if text in train] == train  # in their order
    assert not set(train) & set(heldout)
    meta = json.loads(Path(cfg.output_dir, "shards.json").read_text())
    assert meta["tokens"] == {
        split: sum(map(len, shards(cfg, split))) for split in ("train", "eval")
    }
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", 300)
    assert meta["bytes"] == sum(len(text.encode()) for text in train)
    verify(Path(cfg.output_dir))


def test_control_text_is_encoded_as_text(setting):
    cfg = setting([*DOCUMENTS[:30], "<|endoftext|>", "<|pad|><|assistant|>"], eval_fraction=0.05)
    main(cfg)
    ids = np.concatenate(shards(cfg, "train") + shards(cfg, "eval"))
    tokenizer = load_tokenizer(cfg.output_dir)
    assert (ids == tokenizer.eot_id).sum() == 32
    # The other four control ids come behind it and never occur.
    assert ids.max() == tokenizer.eot_id


def test_split_and_tokenizer_follow_the_seed(setting, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = setting(output_dir=str(tmp_path / name), seed=seed)
        main(cfg)
        files = [
            file
            for file in sorted(Path(cfg.output_dir).iterdir())
            if file.suffix == ".bin" or file.name == "tokenizer.json"
        ]
        assert len(files) == 3
        found.append([file.read_bytes() for file in files])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_shards_of_a_given_size_hold_the_same_stream(setting, tmp_path):
    whole = setting(output_dir=str(tmp_path / "whole"))
    parts = setting(output_dir=str(tmp_path / "parts"), shard_tokens=100)
    main(whole)
    main(parts)
    (stream,) = shards(whole, "train")
    cut = shards(parts, "train")
    assert len(cut) > 2
    assert {len(part) for part in cut[:-1]} == {100}
    assert 0 < len(cut[-1]) <= 100
    assert np.array_equal(np.concatenate(cut), stream)


def test_a_second_run_leaves_no_shard_of_the_first(setting):
    main(setting(shard_tokens=100))
    cfg = setting(DOCUMENTS[:12])
    main(cfg)
    assert len(documents_in(cfg, "train")) + len(documents_in(cfg, "eval")) == 12


def test_a_book_gives_its_tail(setting, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("\n".join(DOCUMENTS))
    cfg = setting(train_data=[str(book)], eval_fraction=0.2)
    main(cfg)
    (train,), (heldout,) = documents_in(cfg, "train"), documents_in(cfg, "eval")
    assert train + heldout == "\n".join(DOCUMENTS)
    assert len(heldout) == pytest.approx(0.2 * len(train + heldout), abs=2)


def test_few_short_documents_leave_no_empty_one(setting):
    """Ten documents at 2 %: each gives its tail, and the shortest have none to give."""
    cfg = setting([*DOCUMENTS[:8], "Hi", "no"], eval_fraction=0.02)
    main(cfg)
    assert all(documents_in(cfg, "train"))
    assert all(documents_in(cfg, "eval"))


def test_empty_documents_are_counted(setting):
    cfg = setting([*DOCUMENTS[:20], "", " \n", "\t"])
    main(cfg)
    stage = json.loads(Path(cfg.output_dir, "stage.json").read_text())
    assert stage["metrics"]["empty"] == 3
    assert len(documents_in(cfg, "train")) + len(documents_in(cfg, "eval")) == 20


def test_a_character_that_only_the_held_out_text_has_is_no_obstacle(setting):
    for n in range(6):
        documents = ["abcabcabc" + chr(ord("k") + i) for i in range(10)]
        cfg = setting(documents, tokenizer="characters", seed=n)
        main(cfg)
        assert sorted(documents_in(cfg, "train") + documents_in(cfg, "eval")) == documents


def test_sft_rows_are_documents_too(setting, tmp_path):
    file = tmp_path / "alpaca.json"
    rows = [{"instruction": "Add them.", "input": "two, three", "output": "five"}] + [
        {"instruction": f"Say {n}", "input": "", "output": f"It is {n}"} for n in range(19)
    ]
    file.write_text(json.dumps(rows))
    cfg = setting(train_data=[str(file)], tokenizer="characters")
    main(cfg)
    found = documents_in(cfg, "train") + documents_in(cfg, "eval")
    assert len(found) == 20
    assert "Add them.\n\ntwo, three\nfive" in found


def test_an_existing_tokenizer_is_taken_over(setting, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "given")
    cfg = setting(tokenizer=str(tmp_path / "given"))
    main(cfg)
    made = load_tokenizer(cfg.output_dir)
    assert made.encode(DOCUMENTS[0]) == tokenizer.encode(DOCUMENTS[0])
    assert len(documents_in(cfg, "train")) == 36


def test_a_hub_data_set_is_streamed(setting, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"text": text} for text in DOCUMENTS])
    asked = []

    def stream(*name, split, streaming):
        asked.append((name, split, streaming))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", stream)
    cfg = setting(train_data=["owner/name:en"])
    main(cfg)
    assert sorted(documents_in(cfg, "train") + documents_in(cfg, "eval")) == sorted(DOCUMENTS)
    # To count, to train the tokenizer, to tokenise.
    assert asked == [(("owner/name", "en"), "train", True)] * 3


def test_mistakes_are_told(setting, tmp_path):
    with pytest.raises(InputError, match="too little"):
        main(setting([" "]))
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(InputError, match=r"odd\.jsonl:2.*body"):
        main(setting(train_data=[str(file)]))
    with pytest.raises(InputError, match="vocab_size"):
        main(setting(vocab_size=100))
    file.write_text('{"text": "fine"}\n\n{"text": "half \\ud83d"}\n')
    with pytest.raises(InputError, match=r"odd\.jsonl:3: lone surrogate U\+D83D at position 5"):
        main(setting(train_data=[str(file)]))
    cfg = setting()
    file.write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"odd\.jsonl: too little text: all 2 documents are empty"):
        main(setting(train_data=[*cfg.train_data, str(file)]))
    main(setting(["ab" * 9] * 20, output_dir=str(tmp_path / "ab"), tokenizer="characters"))
    with pytest.raises(
        InputError, match=r"documents\.jsonl:1: character 't' .* is none of this tokenizer's 2"
    ):
        main(setting(tokenizer=str(tmp_path / "ab")))


# A stream of several sources


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture
def several(tmp_path):
    """Whole documents held out of the first and last, the tails of the others."""

    def lines(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(tmp_path / name)

    (tmp_path / "book.txt").write_text("\n".join(DOCUMENTS))
    many, book = lines("many.jsonl", [*DOCUMENTS, " "]), str(tmp_path / "book.txt")
    return [many, book, lines("few.jsonl", DOCUMENTS[:5]), lines("more.jsonl", DOCUMENTS[::-1])]


def test_without_weights_shards_and_rows_are_those_of_earlier_releases(setting, several):
    """Checkpoints that were published can be made again bit by bit. The digests are those of commit
    4952a88."""
    cfg = setting(train_data=several, tokenizer="characters", shard_tokens=3000, seed=5)
    main(cfg)
    files = sorted(Path(cfg.output_dir).glob("*.bin"))
    assert [file.name for file in files] == [
        "eval-00000.bin",
        *(f"train-0000{n}.bin" for n in range(3)),
    ]
    found = [digest(file.read_bytes()) for file in files]
    assert found == ["02df7c0313fa8d0c", "abb10e419118627f", "ecab6a9a5a5afa2d", "fbae31738327277d"]
    for split, expected in (("train", "bb891f0a9f19586b"), ("eval", "cf7d6412cf57e3b2")):
        rows = Shards(cfg.output_dir, split, 50)
        assert digest(rows.batch(3, 0, 3 * rows.rows).numpy().tobytes()) == expected


def test_the_fingerprint_is_of_content_tokenizer_and_settings(setting, several, tmp_path):
    def meta(name: str, **keys) -> dict:
        cfg = setting(
            **{"train_data": several, "output_dir": str(tmp_path / name), "tokenizer": "characters"}
            | keys
        )
        main(cfg)
        return json.loads(Path(cfg.output_dir, "shards.json").read_text())

    first = meta("first")
    assert [source["source"] for source in first["sources"]] == several
    assert [(source["documents"], source["empty"]) for source in first["sources"]] == [
        (40, 1),
        (1, 0),
        (5, 0),
        (40, 0),
    ]
    for split in ("train", "eval"):
        assert sum(source["tokens"][split] for source in first["sources"]) == first["tokens"][split]
    book = first["sources"][1]
    assert book["content"] == hashlib.sha256(Path(several[1]).read_bytes()).hexdigest()
    assert sum(book["bytes"].values()) == len("\n".join(DOCUMENTS).encode())
    moved = [str(Path(file).rename(tmp_path / f"x{Path(file).name}")) for file in several]
    assert meta("second", train_data=moved)["fingerprint"] == first["fingerprint"]
    others = [
        meta("third", train_data=moved, **keys)["fingerprint"]
        for keys in ({"seed": 1}, {"eval_fraction": 0.2})
    ]
    with Path(moved[0]).open("a") as file:
        file.write("\n")  # no other token, but another source
    others.append(meta("fourth", train_data=moved)["fingerprint"])
    assert len({first["fingerprint"], *others}) == 4
