"""The hand-off directory: damage, absence, a cut-short save and a wrong kind are InputErrors;
scores survive bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import common.handoff.publish
import common.program.files
from common.handoff.locate import lineage, load_tokenizer, locate, read_stage
from common.handoff.publish import load_config, load_model, publish
from common.handoff.report import provenance
from common.program.errors import Failure, InputError

LM_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def load_everything(path: str, kind: str = "lm") -> None:
    load_model(path, kind)
    load_tokenizer(path)


def refusal(path, kind: str = "lm") -> str:
    """The one line of InputError that loading `path` ends with."""
    with pytest.raises(InputError) as error:
        load_everything(str(path), kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_manifest_holds_size_and_sha256_of_every_file(tiny_gpt, tiny_reward, stage_dir):
    for folder, expected in (
        (stage_dir(tiny_gpt()), LM_FILES),
        (stage_dir(tiny_reward()), LM_FILES - {"generation_config.json"}),
    ):
        assert {file.name for file in Path(folder).iterdir()} == expected | {"manifest.json"}
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        contents = {name: (Path(folder) / name).read_bytes() for name in expected}
        assert manifest == {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        }


@pytest.mark.parametrize("name", sorted(LM_FILES))
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "missing"])
def test_a_damaged_file_is_named(tiny_gpt, stage_dir, name, damage):
    folder = Path(stage_dir(tiny_gpt()))
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        changed = {
            "flipped": content,
            "cut": content[:-1],
            "longer": (folder / name).read_bytes() + b"\n",
        }[damage]
        (folder / name).write_bytes(changed)
    message = refusal(folder)
    assert str(folder / name) in message and "run the stage again" in message


@pytest.mark.parametrize(
    "content", [b"", b'{"config.json": {', b"[]", b'{"config.json": 5}', b"\xff\xfe"]
)
def test_a_damaged_manifest_is_named(tiny_gpt, stage_dir, content):
    folder = Path(stage_dir(tiny_gpt()))
    (folder / "manifest.json").write_bytes(content)
    assert "manifest.json" in refusal(folder)


def crash_after(files: int, monkeypatch) -> None:
    """From now on the process dies when it is about to put file number `files` (from 0) in
    place."""
    seen, write = [], common.handoff.publish.write_atomically

    def dying(file: Path, content: bytes) -> None:
        if len(seen) == files:
            raise KeyboardInterrupt
        seen.append(file)
        write(file, content)

    for owner in (common.handoff.publish, common.program.files):
        monkeypatch.setattr(owner, "write_atomically", dying)


@pytest.mark.parametrize("files", range(5))
@pytest.mark.parametrize("again", [False, True], ids=["first save", "save over another"])
def test_a_save_cut_short_is_refused(tiny_gpt, tokenizer, tmp_path, monkeypatch, files, again):
    """config, weights, stage.json, generation_config, manifest: killed before each of these five
    writes."""
    if again:
        publish(tmp_path, tiny_gpt(seed=1), tokenizer, {"stage": "test"})
        load_everything(str(tmp_path))
    crash_after(files, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, tiny_gpt(seed=2), tokenizer, {"stage": "test"})
    monkeypatch.undo()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(InputError):  # already by the model alone, whatever else is there
        load_model(str(tmp_path))
    publish(tmp_path, tiny_gpt(seed=2), tokenizer, {"stage": "test"})  # and the next run mends it
    assert torch.equal(
        load_model(str(tmp_path)).trunk.wte.weight, tiny_gpt(seed=2).trunk.wte.weight
    )


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Failure, match="disk full"):
        common.handoff.publish.write_atomically(file, b"new")
    assert file.read_bytes() == b"old"


def test_nothing_of_a_former_save_is_left(tiny_gpt, tiny_reward, tokenizer, tmp_path):
    """A directory that held a chat model, now a reward model without template."""
    publish(tmp_path, tiny_gpt(), tokenizer, {"stage": "a"})
    publish(
        tmp_path,
        tiny_reward(vocab_size=262),
        type(tokenizer).train_bpe(["ab ab"], 262),
        {"stage": "b"},
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.keys() == LM_FILES - {"generation_config.json", "chat_template.jinja"}


def test_an_adapter_is_vouched_for(tiny_gpt, tokenizer, tmp_path):
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text("{}")
    publish(tmp_path, tiny_gpt(), tokenizer, {"stage": "a"})
    load_everything(str(tmp_path))
    file.write_text("[]")
    assert str(file) in refusal(tmp_path)


def test_the_wrong_kind_names_both(tiny_gpt, tiny_reward, stage_dir):
    lm, reward = stage_dir(tiny_gpt()), stage_dir(tiny_reward(), parent="runs/demo/sft")
    message = refusal(lm, "reward")
    assert (
        lm in message
        and "holds a language model" in message
        and "a reward model is wanted" in message
    )
    message = refusal(reward, "lm")
    assert (
        reward in message
        and "holds a reward model" in message
        and "a language model is wanted" in message
    )
    assert "did you mean its parent runs/demo/sft?" in message


@families
@pytest.mark.parametrize("shift", [0.0, 1.2345678, -1e-7, 37.0])
@torch.no_grad()
def test_scores_are_identical_after_save_and_load(tiny_reward, stage_dir, family, shift):
    model = tiny_reward(family, shift=shift)
    again = load_model(stage_dir(model), "reward")
    ids, lengths = (
        torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(0)),
        torch.tensor([20, 1, 5, 5, 19, 8]),
    )
    assert torch.equal(again.shift, model.shift)
    assert torch.equal(again(ids, lengths), model(ids, lengths))
    assert torch.equal(again.values(ids), model.values(ids))
    unshifted = tiny_reward(family)(ids, lengths)
    assert torch.allclose(
        again(ids, lengths), unshifted - shift, atol=1e-5
    )  # the shift is in the scores, once


@families
@torch.no_grad()
def test_logits_are_identical_after_save_and_load(tiny_gpt, stage_dir, family):
    model = tiny_gpt(family)
    path = stage_dir(model)
    ids = torch.arange(60).reshape(2, 30)
    assert torch.equal(load_model(path)(ids), model(ids))
    assert load_config(path) == model.config
    assert load_model(path, dropout=0.1).config.dropout == 0.1


def test_the_same_model_gives_the_same_bytes(tiny_gpt, stage_dir):
    first, second = (Path(stage_dir(tiny_gpt())) for _ in range(2))
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


def test_tokenizer_is_identical_after_save_and_load(tiny_gpt, stage_dir, tokenizer):
    again = load_tokenizer(stage_dir(tiny_gpt()))
    text = "It's 17 rivers, <|endoftext|> é 👍"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert again.chat and (again.eot_id, again.pad_id, again.vocab_size) == (295, 296, 300)


def test_weights_gathered_elsewhere_are_what_is_published(tiny_gpt, tokenizer, tmp_path):
    weights = tiny_gpt(seed=5).state_dict()
    publish(tmp_path, tiny_gpt(seed=1), tokenizer, {}, weights=weights)
    assert torch.equal(
        load_model(str(tmp_path)).trunk.blocks[1].mlp.up.weight,
        weights["trunk.blocks.1.mlp.up.weight"],
    )


@pytest.mark.parametrize(
    "path", ["runs/no/such", "./x", "/nowhere/x", "no-such-organisation/no-such-model-at-all", "x"]
)
def test_no_such_directory(path):
    with pytest.raises(InputError, match=path) as error:
        locate(path)
    assert "\n" not in str(error.value)


def test_stage_and_lineage(tiny_gpt, stage_dir, tmp_path):
    path = stage_dir(tiny_gpt(), step=7)
    assert read_stage(path)["step"] == 7 and read_stage(tmp_path) == {}
    manifest = (Path(path) / "manifest.json").read_bytes()
    assert lineage(path) == {"parent": path, "parent_hash": hashlib.sha256(manifest).hexdigest()}
    assert lineage(None) == {"parent": None}
    assert {"torch", "transformers", "accelerate", "python"} <= provenance()["versions"].keys()


def test_provenance_writes_nothing_into_the_repository():
    """A git status that is killed while it refreshes the index leaves a lock behind."""
    root = Path(__file__).resolve().parents[3]
    index = root / ".git" / "index"
    if not index.is_file():
        pytest.skip("no clone")
    (root / "LICENSE").touch()  # which a status would note
    before = index.stat().st_mtime_ns
    assert provenance()["versions"]
    assert index.stat().st_mtime_ns == before


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance()["commit"] is None and provenance()["dirty"] is False


@pytest.mark.parametrize("content", ["{broken", "[1]", "5", "null", "\udcff"])
def test_a_stage_json_of_others_says_nothing(tmp_path, content):
    (tmp_path / "stage.json").write_bytes(content.encode(errors="surrogateescape"))
    assert read_stage(tmp_path) == {}


def test_what_we_would_not_have_written_is_left_out(tmp_path):
    kept = {"parent": "runs/sft", "wall_time": 2, "metrics": [1]}
    odd = {"commit": 7, "config": None, "step": "x", "about": []}
    (tmp_path / "stage.json").write_text(json.dumps(kept | odd))
    assert read_stage(tmp_path) == kept
    (tmp_path / "stage.json").write_text(json.dumps({"parent": ["a"], "wall_time": "x"}))
    assert read_stage(tmp_path) == {}
