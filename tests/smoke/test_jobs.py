"""The real jobs, launched as the README says: text -> base -> assistant -> comparisons -> reward model -> PPO, in miniature."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.checkpoint import load_model, load_tokenizer, verify

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
PLAIN = [sys.executable, "-m"]
TRAINERS = ["stages.pretrain.train", "stages.sft.train", "stages.reward.train", "stages.rl.train"]
JOBS = ["stages.pretrain.prepare", *TRAINERS[:2], "stages.reward.collect", *TRAINERS[2:]]

# Step: its module and its keys; {here} is the run's folder.
ROAD = {
    "prepare": ("stages.pretrain.prepare", {"train_data": ["{here}/documents.jsonl"], "vocab_size": 290, "eval_fraction": 0.1}),
    "pretrain": (
        "stages.pretrain.train",
        {
            "train_data": "{here}/prepare", "max_steps": 30, "n_layer": 1, "n_head": 2, "n_embd": 32, "max_length": 24,
            "context_length": 48, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 10,
            "sample_prompts": ["Who met the fox?"], "sample_tokens": 5,
        },
    ),
    "sft": (
        "stages.sft.train",
        {
            "parent": "{here}/pretrain", "train_data": "{here}/sft.jsonl", "num_train_epochs": 2, "max_length": 48,
            "learning_rate": 1e-2, "samples": 2, "sample_tokens": 8, "logging_steps": 2,
        },
    ),
    "collect": (
        "stages.reward.collect",
        {
            "parent": "{here}/sft", "train_data": "{here}/sft.jsonl", "pairs": ["{here}/people.json"], "answers_per_prompt": 2,
            "max_prompts": 24, "max_new_tokens": 12, "max_prompt_length": 30,
        },
    ),
    "reward": (
        "stages.reward.train",
        {
            "parent": "{here}/sft", "train_data": "{here}/collect/comparisons.jsonl", "eval_data": "{here}/collect/eval.jsonl",
            "num_train_epochs": 3, "max_length": 48, "learning_rate": 1e-2, "logging_steps": 2,
        },
    ),
    "rl": (
        "stages.rl.train",
        {
            "parent": "{here}/sft", "reward_model": "{here}/reward", "train_data": "{here}/sft.jsonl", "max_steps": 3,
            "max_prompt_length": 30, "max_new_tokens": 12, "per_device_train_batch_size": 8, "num_ppo_epochs": 2,
            "learning_rate": 1e-3, "samples": 3,
        },
    ),
}  # fmt: skip


def call(command: list[str], **environment: str) -> subprocess.Popen:
    """Started in the checkout, offline, one thread; its output is kept."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(folder of the whole run, what each step printed)."""
    here = tmp_path_factory.mktemp("road")
    facts = [(f"Who met fox {n % 10}?", f"Bird {n % 7} met fox {n % 10}.") for n in range(60)]
    documents = [{"text": f"{question} {answer} They went to the river."} for question, answer in facts * 4]
    (here / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    sft = [{"prompt": question, "completion": answer} for question, answer in facts]
    (here / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sft))
    people = [
        {
            "conversations": [{"from": "human", "value": f"Is it {n}?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": f"Fox {n}"},
        }
        for n in range(10)
    ]
    (here / "people.json").write_text(json.dumps(people))
    printed = {}
    for step, (module, keys) in ROAD.items():
        config = here / f"{step}.yaml"
        config.write_text(yaml.safe_dump(keys).replace("{here}", str(here)))
        start = LAUNCH if module in TRAINERS else PLAIN
        job = call([*start, module, "--config", str(config), "--output_dir", str(here / step)])
        out, err = job.communicate(timeout=200)
        assert job.returncode == 0, f"{step} failed:\n{out}\n{err}"
        printed[step] = out
    return here, printed


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
        losses = [row["eval_loss"] for row in lines(here / step / "metrics.jsonl") if "eval_loss" in row]
        assert losses[-1] < 0.7 * losses[0]
    assert len(lines(here / "rl" / "metrics.jsonl")) == 3


def test_hand_offs_fit_each_other(road):
    here, _ = road
    tokenizers = {step: load_tokenizer(str(here / step)) for step in ("prepare", "pretrain", "sft", "reward", "rl")}
    assert [tokenizers[step].chat for step in tokenizers] == [False, False, True, True, True]
    ids = [tokenizer.encode("Bird 3 met fox 9. <|endoftext|>") for tokenizer in tokenizers.values()]
    assert all(one == ids[0] for one in ids)
    assert load_model(str(here / "rl")).config == load_model(str(here / "sft")).config
    load_model(str(here / "reward"), "reward")
    load_model(str(here / "rl" / "critic"), "reward")
    rows = lines(here / "collect" / "comparisons.jsonl") + lines(here / "collect" / "eval.jsonl")
    assert len(rows) == 34
    assert sum("chosen" in row for row in rows) == 10


def test_wrong_keys_end_in_one_line():
    jobs = {module: call([*PLAIN, module, "--learning_rat", "1", "--output_dirs", "x"]) for module in TRAINERS}
    for module, job in jobs.items():
        out, err = job.communicate(timeout=100)
        assert job.returncode == 2, module
        assert not out
        assert err.strip().splitlines() == [err.strip()]
        assert "Traceback" not in err
        assert "--learning_rat;" in err
        assert "did you mean `learning_rate`?" in err


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


def test_help():
    jobs = {module: call([*PLAIN, module, "--help"]) for module in JOBS}
    for module, job in jobs.items():
        out, err = job.communicate(timeout=100)
        assert (job.returncode, err) == (0, ""), module
        assert f"-m {module}" in out  # how it is launched
        for key in ("--config FILE", "--output_dir", "--seed"):
            assert key in out
