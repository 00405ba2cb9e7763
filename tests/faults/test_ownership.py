"""What is in an output_dir already: a program replaces and deletes only what it wrote itself, and
never what it reads."""

import json
import shutil
from pathlib import Path

import pytest
from children import child
from test_bad_configs import refused

from common.config.fields import inputs_of, kinds_of, schemas_of
from common.handoff.ownership import OWNER, writer_of
from common.program.errors import InputError
from data.adder import prepare as adder
from data.alpaca import prepare as alpaca
from data.baby import prepare as baby
from data.demo import prepare as demo
from stages.pretrain import prepare
from stages.pretrain import train as pretrain
from stages.reward import collect
from stages.reward import train as reward
from stages.rl import train as rl
from stages.sft import train as sft
from tools import curves, overoptimise
from tools.chain import __main__ as chain
from tools.compare import __main__ as compare

TRAINING = ("pretrain", "sft", "reward", "rl")
LOGS = ("metrics.jsonl", "samples.jsonl", "mistakes.jsonl")
MODEL = ("model.safetensors", "config.json", "tokenizer.json", "stage.json", "manifest.json")
INDEX = "model.safetensors.index.json"
# What each program writes; one of them, by another's hand, keeps it from running.
NAMES = {
    "prepare": ("train-00000.bin", "eval-00-00000.bin", "progress.json", *MODEL[2:]),
    "collect": ("comparisons.jsonl", "eval.jsonl", "sampled.json", "stage.json"),
    **dict.fromkeys(TRAINING, (*LOGS, *MODEL, INDEX, "adapter", "critic", "state")),
}
FOREIGN = ("train.bin", "val.bin", "pytorch_model.bin", "notes.txt", "data.jsonl", "train-old.bin")
PROGRAMS = (adder, alpaca, baby, demo, prepare, pretrain, sft, collect, reward, rl)
TOOLS = (curves, overoptimise, chain, compare)
NO_PATHS = {"labeller", "contrast", "text", "prompt", "gold", "html", "sample_prompts"}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_key_that_names_a_path_says_so():
    """By its type: the check of what would be overwritten asks nothing else."""
    for program in (*PROGRAMS, *TOOLS):
        for key, schema in schemas_of(program.Config).items():
            kinds = [kind.get("items", kind) for kind in kinds_of(schema).values()]
            text = [kind for kind in kinds if kind.get("type") == "string" and "enum" not in kind]
            text = [kind for kind in text if "const" not in kind and "format" not in kind]
            assert not text or key in NO_PATHS | {"output_dir"}, f"{program.__name__}: {key}"
            names_rows = key in ("train_data", "eval_data", "pairs", "prompts", "comparisons")
            if names_rows and program is not pretrain:
                assert any(kind.get("format") == "rows" for kind in kinds), key


def test_inputs_of_a_config():
    cfg = collect.Config(parent="a/b", train_data="x.jsonl", pairs=["y", "z"], output_dir="out")
    found = [("parent", "a/b", False), ("train_data", "x.jsonl", True)]
    assert list(inputs_of(cfg)) == [*found, ("pairs", "y", True), ("pairs", "z", True)]


CASES = [(stage, name) for stage in ("prepare", "collect", "sft") for name in NAMES[stage]]


@pytest.mark.parametrize(("stage", "name"), CASES)
def test_what_another_wrote_is_neither_replaced_nor_deleted(stage, name, program, write, tmp_path):
    out = tmp_path / "out"
    if "." in name:
        out.mkdir()
        (out / name).write_text("{}")
    else:
        (out / name).mkdir(parents=True)
        (out / name / "weights.bin").write_text("years of work")
    before = snapshot(out)
    ended = program(stage, "--config", str(write(stage, "")))
    refused(ended, [f"output_dir {out}: {name} is there and was not written by {stage}", "move it"])
    assert snapshot(out) == before


@pytest.mark.parametrize("stage", ["prepare", "collect", *TRAINING])
def test_other_files_stay_and_its_own_are_replaced(stage, program, write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in FOREIGN:
        (out / name).write_text("years of work")
    config = str(write(stage, ""))
    for attempt in range(3):  # anew, again, and in a folder of a release that left no marker
        assert program(stage, "--config", config).code == 0, attempt
        assert {(out / name).read_text() for name in FOREIGN} == {"years of work"}
        listed = json.loads((out / "manifest.json").read_text())
        assert listed and not set(FOREIGN) & listed.keys()
        (out / OWNER).unlink()
    # Another stage's folder.
    other = "collect" if stage == "sft" else "sft"
    before = snapshot(out)
    ended = program(other, "--config", str(write(other, f"output_dir: {out}")))
    refused(ended, [f"was written by {stage}"])
    assert snapshot(out) == before


INPUTS = [
    *[(stage, "train_data: {out}/samples.jsonl") for stage in TRAINING[1:]],
    ("sft", "eval_data: {out}/metrics.jsonl"),
    ("sft", "train_data: {out}/state/rows.jsonl"),
    ("sft", "parent: {out}"),
    ("collect", "train_data: {out}/eval.jsonl"),
    ("collect", "pairs: ['{out}/comparisons.jsonl']"),
    ("collect", "pairs: ['{out}/../out/eval.jsonl']"),
    ("prepare", "train_data: ['{out}/progress.json']"),
    ("prepare", "tokenizer: {out}"),
]


@pytest.mark.parametrize(("stage", "text"), INPUTS)
def test_inputs_are_not_overwritten(stage, text, program, write, tmp_path):
    """Also where the folder is the stage's own."""
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    (out / OWNER).write_text(json.dumps({"stage": stage}))
    for name in ("samples", "metrics", "eval", "comparisons", "state/rows"):
        (out / f"{name}.jsonl").write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
    before = snapshot(out)
    ended = program(stage, "--config", str(write(stage, text.format(out=out))))
    refused(ended, ["overwritten", "name another directory", text.split(":")[0]])
    assert snapshot(out) == before


def test_a_folder_of_rows_may_not_hold_what_is_made_of_them(program, write, tmp_path):
    """It would be read as rows the next time."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "The fox."}\n' * 9)
    keys = f"train_data: ['{tmp_path}/texts']\noutput_dir: {tmp_path}/texts/shards"
    refused(program("prepare", "--config", str(write("prepare", keys))), ["all files are read"])


def test_a_state_of_an_earlier_release_is_gone_on_from(setting, tmp_path):
    """It has no marker, and neither has what is beside it."""
    from test_damage import killed

    keys = setting("sft", output_dir=str(tmp_path / "cut"))
    killed("sft", keys, 5)
    assert writer_of(tmp_path / "cut") == "sft"
    (tmp_path / "cut" / OWNER).unlink()
    notes = tmp_path / "cut" / "state" / "notes.txt"
    notes.write_text("years of work")
    ended = child("sft", keys)
    assert ended.code == 0 and "going on from" in ended.out, ended.err
    assert notes.read_text() == "years of work"
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_an_adapter_stays_until_another_is_published(setting, tmp_path):
    keys = setting("sft", output_dir=str(tmp_path / "out"), max_steps=1)
    assert child("sft", keys | {"lora_r": 2}).code == 0
    adapter = tmp_path / "out" / "adapter"
    before = snapshot(adapter)
    ended = child("sft", keys | {"learning_rate": 1e30, "max_steps": 3})
    assert ended.code == 1 and snapshot(adapter) == before, ended.err
    assert child("sft", keys).code == 0
    assert not adapter.exists()


@pytest.mark.parametrize("main", [adder.main, baby.main])
def test_data_too(main, tmp_path):
    config = {adder.main: adder, baby.main: baby}[main].Config(output_dir=str(tmp_path))
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(InputError, match=r"stage\.json is there and was not written by data"):
        main(config)
    (tmp_path / "stage.json").unlink()
    main(config)
    main(config)


@pytest.mark.parametrize("where", ["/proc/x", "/sys/x"])
@pytest.mark.parametrize("stage", ["prepare", "collect", "sft"])
def test_a_place_where_nothing_can_be_written(stage, where, program, write):
    refused(program(stage, "--config", str(write(stage, f"output_dir: {where}"))), [where])


@pytest.mark.parametrize("stage", ["reward", "rl"])
def test_a_model_without_manifest_is_told_by_its_weights(stage, setting, tmp_path):
    """As one of another maker: swapped between stop and resume it is another run."""
    from test_damage import killed

    keys = setting(stage, output_dir=str(tmp_path / "cut"))
    for key in ("parent", "reward_model") if stage == "rl" else ("parent",):
        foreign = tmp_path / key
        shutil.copytree(keys[key], foreign)
        (foreign / "manifest.json").unlink()
        (foreign / "stage.json").unlink()
        keys[key] = str(foreign)
    killed(stage, keys, 3)
    weights = foreign / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\1")
    ended = child(stage, keys)
    assert ended.code == 2 and f"{key}'s content" in ended.err, ended.err
    weights.write_bytes(before)
    assert child(stage, keys).code == 0


def test_shards_of_an_earlier_release_are_gone_on_from(program, write, tmp_path):
    """An interrupted prepare has neither marker nor stage.json, but its journal."""
    config = str(write("prepare", "weights: [1]"))
    assert program("prepare", "--config", config).code == 0
    for name in (OWNER, "stage.json", "shards.json", "manifest.json"):
        (tmp_path / "out" / name).unlink()
    ended = program("prepare", "--config", config)
    assert ended.code == 0 and "going on from" in ended.out, ended.err


def test_a_log_that_is_a_link_leaves_its_target(program, write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "rows").write_text("years of work")
    (tmp_path / "out" / OWNER).write_text(json.dumps({"stage": "sft"}))
    (tmp_path / "out" / "samples.jsonl").symlink_to(tmp_path / "rows")
    assert program("sft", "--config", str(write("sft", ""))).code == 0
    assert (tmp_path / "rows").read_text() == "years of work"
