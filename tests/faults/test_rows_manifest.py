"""Rows that a stage published: what was damaged or edited since is noticed when it is read, and may
be taken as it is."""

import json
import random
from pathlib import Path

import pytest
from test_bad_configs import refused
from test_damage import cut, each_damage

from common.handoff.locate import load_tokenizer
from common.program.errors import Failure, InputError
from common.program.files import hash_of
from common.rows.sources import read_rows
from data.adder import prepare as adder
from data.baby import prepare as baby

SMALL = {"digits": 1, "held_out": 20}


@pytest.fixture
def sums(tmp_path):
    adder.main(adder.Config(output_dir=str(tmp_path / "sums"), **SMALL))
    return tmp_path / "sums"


def test_damage_is_noticed(sums):
    """Any bit flip, and a cut, at a line end too."""

    def noticed() -> bool:
        try:
            read_rows(str(sums / "train.jsonl"))
        except InputError as error:
            return "differs from what" in str(error) and "delete that manifest.json" in str(error)
        return False

    files = [sums / "train.jsonl"]
    assert not noticed() and each_damage(files, 1, noticed) > 9
    lines = files[0].read_bytes().splitlines(keepends=True)
    files[0].write_bytes(b"".join(lines[:-1]))
    assert noticed()
    (sums / "manifest.json").unlink()
    assert len(read_rows(str(files[0]))) == len(lines) - 1  # as it is


def test_what_no_manifest_of_ours_lists_is_read(sums):
    (sums / "more.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    assert read_rows(str(sums / "more.jsonl"))
    whole = (sums / "manifest.json").read_text()
    for content in ("[]", "{}", '{"train.jsonl": 3}', '{"train.jsonl": {"size": 1}}', "3", "null"):
        (sums / "manifest.json").write_text(content)
        assert read_rows(str(sums / "train.jsonl")), content
    cut(sums / "manifest.json", random.Random(1))
    (sums / "manifest.json").write_text(whole[:-9])
    with pytest.raises(InputError, match=r"manifest\.json: damaged; run the stage again"):
        read_rows(str(sums / "train.jsonl"))
    (sums / "stage.json").unlink()  # another maker's, then
    assert read_rows(str(sums / "train.jsonl"))


def test_a_file_is_hashed_once(sums):
    before = hash_of.cache_info()
    for _ in range(3):
        read_rows(str(sums / "train.jsonl"))
    after = hash_of.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


def test_comparisons_are_verified_by_reward_training(program, write, tmp_path):
    """collect's own, and the first run's are not mixed with those of one that was cut short."""
    assert program("collect", "--config", str(write("collect", ""))).code == 0
    out = tmp_path / "out"
    listed = json.loads((out / "manifest.json").read_text())
    assert listed.keys() == {"comparisons.jsonl", "eval.jsonl", "stage.json"}
    file = out / "comparisons.jsonl"
    file.write_text(file.read_text().replace('"ranks": [0', '"ranks": [9'))
    config = write("reward", f"train_data: {file}\noutput_dir: {tmp_path}/reward")
    refused(program("reward", "--config", str(config)), [f"{file}: differs from what", "edited"])


def test_a_cut_leaves_no_mixture_of_two_runs(sums, monkeypatch):
    """After a full disk all is as it was; after a kill at any rename no file is an old one."""
    before = {name: (sums / name).read_bytes() for name in ("eval.jsonl", "train.jsonl")}
    other, real = adder.Config(output_dir=str(sums), seed=1, **SMALL), Path.replace

    def full(path, rows):
        raise Failure("no space")

    with monkeypatch.context() as patched, pytest.raises(Failure):
        patched.setattr("common.handoff.report.write_jsonl", full)
        adder.main(other)
    assert all((sums / name).read_bytes() == content for name, content in before.items())
    assert read_rows(str(sums / "train.jsonl"))

    def killed(path, target):
        if Path(target).name == "train.jsonl":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        adder.main(other)
    assert not (sums / "train.jsonl").exists() and not (sums / "manifest.json").exists()
    assert (sums / "eval.jsonl").read_bytes() != before["eval.jsonl"]
    adder.main(other)
    assert read_rows(str(sums / "train.jsonl")) and not list(sums.glob(".new*"))


def test_the_text_beside_a_tokenizer_may_be_edited_too(tmp_path):
    baby.main(baby.Config(output_dir=str(tmp_path)))
    (tmp_path / "documents.jsonl").write_text('{"text": "1111"}\n' * 2)
    for read in (lambda: read_rows(str(tmp_path / "documents.jsonl")), lambda: load(tmp_path)):
        with pytest.raises(InputError, match=r"documents\.jsonl: (differs|damaged)"):
            read()
    for name in ("manifest.json", "stage.json"):
        (tmp_path / name).unlink()
    assert load(tmp_path).vocab_size == 2 and read_rows(str(tmp_path / "documents.jsonl"))


def load(folder):
    return load_tokenizer(str(folder))


def test_an_edit_is_noticed_through_a_link(sums, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(sums / "train.jsonl")
    read_rows(str(tmp_path / "link.jsonl"))
    with (sums / "train.jsonl").open("a") as file:
        file.write("{}")
    with pytest.raises(InputError, match="differs from what"):
        read_rows(str(tmp_path / "link.jsonl"))
