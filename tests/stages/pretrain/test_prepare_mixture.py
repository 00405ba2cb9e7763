"""Sources in seven formats, mixed in the proportions of LLaMA's table; other weights take the same
shards."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from common.config.schema import load
from common.handoff.locate import load_tokenizer
from common.program.errors import InputError
from common.program.files import verify
from common.rows.shards import Shards
from stages.pretrain import prepare, train
from stages.pretrain.prepare import Config, main

PERCENT = {
    "CommonCrawl": 67,
    "C4": 15,
    "GitHub": 4.5,
    "Wikipedia": 4.5,
    "Books": 4.5,
    "ArXiv": 2.5,
    "StackExchange": 2,
}


@pytest.fixture
def setting(llama, tmp_path):
    def make(**keys) -> Config:
        defaults = {
            "train_data": llama,
            "weights": list(PERCENT.values()),
            "tokenizer": "characters",
            "eval_fraction": 0.1,
        }
        return Config(output_dir=str(tmp_path / "shards"), **defaults | keys)

    return make


@pytest.fixture
def llama(tmp_path) -> list[str]:
    """Seven sources, each in a format of its own and with a letter of its own."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    def documents(letter: str) -> list[str]:
        return [letter * (30 + n % 50) for n in range(60)]

    def lines(letter: str) -> bytes:
        return "".join(json.dumps({"text": text}) + "\n" for text in documents(letter)).encode()

    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("b")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines("c")))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents("d")}), tmp_path / "d.parquet")
    (tmp_path / "e").mkdir()
    for n, text in enumerate(documents("e")):
        (tmp_path / f"e/{n}.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "f.json").write_text(
        json.dumps([{"prompt": text[:9], "completion": text[9:]} for text in documents("f")])
    )
    (tmp_path / "g.txt").write_text("".join(documents("g")))
    return [
        str(tmp_path / name)
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e", "f.json", "g.txt")
    ]


def shares(cfg: Config, split: str, rows: int) -> np.ndarray:
    """Per cent of the rows by the letter that most of a row's tokens are."""
    letters = {
        load_tokenizer(cfg.output_dir).encode(letter)[0]: n for n, letter in enumerate("abcdefg")
    }
    batch = Shards(cfg.output_dir, split, 16).batch(1, 0, rows).numpy()
    found = [letters[np.bincount(row).argmax()] for row in batch]
    return np.bincount(found, minlength=7) / rows * 100


def test_the_llama_mixture_from_seven_formats(setting):
    cfg = setting()
    main(cfg)
    expected = np.array(list(PERCENT.values()))
    deviation = np.sqrt(
        expected * (100 - expected) / 2000
    )  # per cent, of 2 000 independent draws; ours are spread evenly
    assert (np.abs(shares(cfg, "train", 2000) - expected) < 0.5 * deviation).all()
    assert np.abs(shares(cfg, "eval", 2000) - expected).max() < 0.3
    meta = json.loads(Path(cfg.output_dir, "shards.json").read_text())
    assert [source["share"] for source in meta["sources"]] == pytest.approx(expected / 100)
    assert [source["documents"] for source in meta["sources"]] == [60] * 6 + [1]
    epochs = Shards(cfg.output_dir, "train", 16).epochs(2000)
    for source, share in zip(meta["sources"], expected / 100, strict=True):
        assert epochs[source["source"]] == pytest.approx(
            2000 * share * 16 / source["tokens"]["train"]
        )
    assert len(list(Path(cfg.output_dir).glob("train-*-*.bin"))) == 7


def test_other_weights_take_the_shards_as_they_are(setting, monkeypatch):
    first = setting()
    main(first)
    noted = json.loads(Path(first.output_dir, "shards.json").read_text())
    monkeypatch.setattr(prepare, "survey", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(prepare, "documents_of", lambda *_: pytest.fail("read again"))
    other = setting(weights=[1, 1, 1, 1, 2, 2, 2])
    main(other)
    assert np.abs(shares(other, "train", 500) - [10, 10, 10, 10, 20, 20, 20]).max() < 0.7
    now = json.loads(Path(first.output_dir, "shards.json").read_text())
    assert now["tokens"] == noted["tokens"] and now["fingerprint"] != noted["fingerprint"]
    verify(Path(first.output_dir))


def test_training_tells_the_epochs_of_each_source(setting, tmp_path, capsys):
    cfg = setting()
    main(cfg)
    shape = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 8,
        "max_length": 16,
        "max_steps": 50,
        "per_device_train_batch_size": 8,
    }
    train.main(
        train.Config(
            train_data=cfg.output_dir,
            output_dir=str(tmp_path / "model"),
            mixed_precision="no",
            **shape,
        )
    )
    opening = capsys.readouterr().out
    stage = json.loads((tmp_path / "model/stage.json").read_text())
    meta = json.loads(Path(cfg.output_dir, "shards.json").read_text())
    for source, percent in zip(meta["sources"], PERCENT.values(), strict=True):
        epochs = 50 * 8 * 16 * percent / 100 / source["tokens"]["train"]
        assert stage["data"]["epochs"][source["source"]] == pytest.approx(epochs)
        assert f"; {epochs:.2f} of {source['source']}" in opening


def test_weights_that_are_none(setting, llama, tmp_path):
    given = ["--output_dir", "x", "--train_data", "a.txt", "b.txt"]
    assert load(Config, [*given, "--weights", "67", "4.5"]).weights == [67, 4.5]
    for words, told in [
        ("1 2 3", "3 weights for 2 entries of train_data"),
        ("1 0", "weights.1 = 0 is refused"),
        ("1e9 1", "the weight of b.txt is below 1e-05 of their sum; leave it out"),
    ]:
        with pytest.raises(InputError, match=told):
            load(Config, [*given, "--weights", *words.split()])
    with pytest.raises(InputError, match="names a source twice"):
        load(Config, ["--output_dir", "x", "--train_data", "a", "a", "--weights", "1", "2"])
    (tmp_path / "tiny.txt").write_text("a")
    with pytest.raises(
        InputError, match=r"train_data \S*tiny\.txt: too little text to train and evaluate on"
    ):
        main(setting(train_data=[llama[0], str(tmp_path / "tiny.txt")], weights=[1, 1]))
