"""The real jobs, launched as the README says: text -> base -> assistant -> comparisons -> reward
model -> PPO, in miniature."""

import json
import re

import pytest

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.program.files import verify
from tests.forked import program
from tests.smoke.conftest import LAUNCH, ROAD, TRAINERS, call, lines

JOBS = ["stages.pretrain.prepare", *TRAINERS[:2], "stages.reward.collect", *TRAINERS[2:]]


@pytest.mark.parametrize("step", ROAD)
def test_every_job_leaves_its_papers(road, step):
    here, printed = road
    stage = json.loads((here / step / "stage.json").read_text())
    assert stage["stage"] == step
    assert stage["gate"].keys() == {"passed", "text"}
    verdicts = re.findall(rf"^gate {step}: (PASS|FAIL)  (.+)$", printed[step], re.MULTILINE)
    assert verdicts == [("PASS" if stage["gate"]["passed"] else "FAIL", stage["gate"]["text"])]
    assert stage["config"]["output_dir"] == str(here / step)
    assert stage["wall_time"] > 0
    assert stage["versions"]["torch"]
    if step != "collect":
        verify(here / step)
        manifest = json.loads((here / step / "manifest.json").read_text())
        assert {"stage.json", "tokenizer.json"} <= manifest.keys()
    if step in ("pretrain", "sft", "reward", "rl"):
        assert {"config.json", "model.safetensors"} <= manifest.keys()
        rows = lines(here / step / "metrics.jsonl")
        assert rows
        assert all("step" in row for row in rows)
        assert stage["kind"] == ("reward" if step == "reward" else "lm")
        assert stage["step"] == rows[-1]["step"]
        parent = {"pretrain": None, "sft": "pretrain", "reward": "sft", "rl": "sft"}[step]
        assert stage["parent"] == (parent and str(here / parent))


def test_the_loss_falls_and_samples_are_kept(road):
    here, _ = road
    for step, samples in (("pretrain", 1), ("sft", 2), ("rl", 9)):
        assert len(lines(here / step / "samples.jsonl")) == samples
    for step in ("pretrain", "sft"):
        losses = [
            row["eval_loss"] for row in lines(here / step / "metrics.jsonl") if "eval_loss" in row
        ]
        assert losses[-1] < 0.7 * losses[0]
    assert len(lines(here / "rl" / "metrics.jsonl")) == 3


def test_hand_offs_fit_each_other(road):
    here, _ = road
    tokenizers = {
        step: load_tokenizer(str(here / step))
        for step in ("prepare", "pretrain", "sft", "reward", "rl")
    }
    assert [tokenizers[step].chat for step in tokenizers] == [False, False, True, True, True]
    ids = [tokenizer.encode("Bird 3 met fox 9. <|endoftext|>") for tokenizer in tokenizers.values()]
    assert all(one == ids[0] for one in ids)
    assert load_model(str(here / "rl")).config == load_model(str(here / "sft")).config
    load_model(str(here / "reward"), "reward")
    load_model(str(here / "rl" / "critic"), "reward")
    rows = lines(here / "collect" / "comparisons.jsonl") + lines(here / "collect" / "eval.jsonl")
    assert len(rows) == 34
    assert sum("chosen" in row for row in rows) == 10


@pytest.mark.parametrize("module", TRAINERS)
def test_wrong_keys_end_in_one_line(module):
    ended = program(module, "--learning_rat", "1", "--output_dirs", "x")
    assert ended.code == 2
    assert not ended.out
    assert ended.err.strip().splitlines() == [ended.err.strip()]
    assert "Traceback" not in ended.err
    assert "--learning_rat;" in ended.err
    assert "did you mean `learning_rate`?" in ended.err


def test_a_wrong_file_key_names_file_and_line(tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text("parent: x\ntrain_data: y\noutput_dir: z\nmax_lenght: 4\n")
    code = tmp_path / "code"
    job = call([*LAUNCH, "stages.sft.train", "--config", str(config)], EXIT_CODE_FILE=str(code))
    _, err = job.communicate(timeout=100)
    assert job.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"{config}:4" in line
    assert "did you mean `max_length`?" in line
    assert code.read_text() == "2"  # accelerate itself says 1


@pytest.mark.parametrize("module", JOBS)
def test_help(module):
    ended = program(module, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"-m {module}" in ended.out  # how it is launched
    for key in ("--config FILE", "--output_dir", "--seed"):
        assert key in ended.out
