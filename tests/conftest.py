"""Shared fixtures: no network, one thread, a tiny chat tokenizer, tiny random models of both
families; and which tests share a process."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads them
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start

import json
import signal
from collections.abc import Callable

import pytest
import torch

from common.handoff.publish import publish
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.text.tokenizer import Tokenizer
from stages.pretrain import prepare

torch.set_num_threads(1)
# A shell that starts the tests with `&` or nohup ignores these two, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

FAMILIES = ("gpt2", "llama")
# Where tests start programs or run whole stages, and fixtures that say the same of a test.
HEAVY_PLACES = {"benchmarks", "faults", "properties", "smoke", "test_pipeline.py"}
HEAVY_FIXTURES = {"fresh_accelerate", "setting", "trained", "peft"}
# What takes longest goes first, so that no process is left alone with it at the end.
FIRST = ["smoke", "faults", "plan", "cpu", "benchmarks"]
SENTENCES = [
    "What is two plus three? Two plus three is five. "
    "The red fox and the blue bird went to the old town.",
    "Name an animal. The fox is an animal. "
    "It's a good day, isn't it? Yes, it is a very good day in the town!",
    "Please write one sentence with the word river. "
    "The river is wide and the water in the river is cold.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out. With several processes (pytest -n) the tests of a file
    stay together, as they share fixtures; so do all that share the road in miniature."""
    for item in items:
        place = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        if place in HEAVY_PLACES or HEAVY_FIXTURES & set(item.fixturenames):
            item.add_marker("heavy")
        group = "road" if {"road", "finished"} & set(item.fixturenames) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: order(item.path.parent.name))


def order(folder: str) -> int:
    """Place of a folder's tests in the whole."""
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 ids: 256 bytes, 39 merges, 5 control tokens; with the chat template."""
    return Tokenizer.train_bpe(SENTENCES * 3, 300).with_chat()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights far from the usual start: clear preferences in the logits, no zero bias, no norm
    weight of exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)


def shape(family: str, vocab_size: int, **overrides) -> GPTConfig:
    settings = {
        "vocab_size": vocab_size,
        "max_length": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_inner": 64,
    }
    if family == "llama":
        settings["n_kv_head"] = 2
    return GPTConfig(family=family, **settings | overrides)


@pytest.fixture(scope="session")
def tiny_gpt(tokenizer) -> Callable[..., GPT]:
    """tiny_gpt(family, seed=0, **GPTConfig fields) -> a new random GPT in eval mode: 2 layers x 32,
    context 64."""

    def make(family: str = "llama", seed: int = 0, **overrides) -> GPT:
        model = GPT(shape(family, overrides.pop("vocab_size", tokenizer.vocab_size), **overrides))
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_reward(tokenizer) -> Callable[..., RewardModel]:
    """tiny_reward(family, seed=0, shift=0.0, **GPTConfig fields) -> a new random RewardModel in
    eval mode."""

    def make(family: str = "llama", seed: int = 0, shift: float = 0.0, **overrides) -> RewardModel:
        model = RewardModel(
            shape(family, overrides.pop("vocab_size", tokenizer.vocab_size), **overrides)
        )
        randomise(model, seed)
        model.shift.fill_(shift)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def stage_dir(tokenizer, tmp_path_factory) -> Callable[..., str]:
    """stage_dir(model, own_tokenizer=None, **stage.json keys) -> path of a new published
    directory."""

    def make(model: GPT | RewardModel, own_tokenizer: Tokenizer | None = None, **stage) -> str:
        folder = tmp_path_factory.mktemp("stage")
        kind = "lm" if isinstance(model, GPT) else "reward"
        content = {
            "stage": "test",
            "kind": kind,
            "parent": None,
            "gate": {"passed": True, "text": ""},
            "metrics": {},
        }
        publish(folder, model, own_tokenizer or tokenizer, content | stage)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def peft():
    """The package, which takes three seconds to import."""
    import peft

    return peft


@pytest.fixture
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # it refuses a second precision in one process
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    texts = [
        f"The fox number {n % 10} met the bird number {n % 7} by the river." for n in range(200)
    ]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    prepare.main(
        prepare.Config(
            train_data=[str(folder / "documents.jsonl")],
            output_dir=str(folder / "shards"),
            vocab_size=290,
            eval_fraction=0.1,
        )
    )
    return str(folder / "shards")


@pytest.fixture(scope="session")
def setting(tmp_path_factory, shards, tiny_gpt, tiny_reward, stage_dir):
    """setting(stage, **keys) -> keys of a run of 7 updates over more than one epoch, saved every 2,
    with dropout."""
    tmp_path = tmp_path_factory.mktemp("setting")
    answers = ["Yes.", "No, it is not.", "The fox."]
    rows = {
        "sft": [{"prompt": f"Is it {n}?", "completion": answers[n % 3]} for n in range(20)],
        "reward": [
            {"prompt": f"Is it {n}?", "answers": answers, "ranks": [n % 2, 1, 2]} for n in range(20)
        ],
        "rl": [{"prompt": f"Is it {n}?"} for n in range(20)],
    }
    for name, group in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in group))
    parent = stage_dir(tiny_gpt("llama", seed=1))
    shared = {
        "mixed_precision": "no",
        "max_steps": 7,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    trained = {
        "parent": parent,
        "eval_fraction": 0.2,
        "eval_steps": 3,
        "per_device_train_batch_size": 4,
        "max_length": 48,
    }
    own = {
        "pretrain": {
            "train_data": shards,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "max_length": 32,
            "dropout": 0.2,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "eval_steps": 3,
            "eval_rows": 8,
            "optimizer": "muon",
            "sample_prompts": ["Who?"],
            "sample_tokens": 4,
        },
        "sft": {
            "train_data": str(tmp_path / "sft.jsonl"),
            "dropout": 0.2,
            "samples": 1,
            "sample_tokens": 4,
            **trained,
        },
        "reward": {"train_data": str(tmp_path / "reward.jsonl"), **trained},
        "rl": {
            "parent": parent,
            "reward_model": stage_dir(tiny_reward("llama", seed=2)),
            "train_data": str(tmp_path / "rl.jsonl"),
            "max_prompt_length": 32,
            "max_new_tokens": 6,
            "per_device_train_batch_size": 4,
            "num_ppo_epochs": 2,
            "target_kl": 1.0,
            "kl_horizon": 20,
            "critic_warmup_steps": 1,
        },
    }
    return lambda stage, **keys: {**shared, **own[stage], **keys}
