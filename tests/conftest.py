"""Shared fixtures: no network, one thread, a tiny chat tokenizer, tiny random models of both families."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads them
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable

import pytest
import torch

from common.checkpoint import publish
from common.model import GPT, GPTConfig, RewardModel
from common.tokenizer import Tokenizer

torch.set_num_threads(1)

FAMILIES = ("gpt2", "llama")
SENTENCES = [
    "What is two plus three? Two plus three is five. The red fox and the blue bird went to the old town.",
    "Name an animal. The fox is an animal. It's a good day, isn't it? Yes, it is a very good day in the town!",
    "Please write one sentence with the word river. The river is wide and the water in the river is cold.",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 ids: 256 bytes, 39 merges, 5 control tokens; with the chat template."""
    return Tokenizer.train_bpe(SENTENCES * 3, 300).with_chat()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights far from the usual start: clear preferences in the logits, no zero bias, no norm weight of exactly 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)


def shape(family: str, vocab_size: int, **overrides) -> GPTConfig:
    settings = {"vocab_size": vocab_size, "max_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_inner": 64}
    if family == "llama":
        settings["n_kv_head"] = 2
    return GPTConfig(family=family, **settings | overrides)


@pytest.fixture(scope="session")
def tiny_gpt(tokenizer) -> Callable[..., GPT]:
    """tiny_gpt(family, seed=0, **GPTConfig fields) -> a new random GPT in eval mode: 2 layers x 32, context 64."""

    def make(family: str = "llama", seed: int = 0, **overrides) -> GPT:
        model = GPT(shape(family, overrides.pop("vocab_size", tokenizer.vocab_size), **overrides))
        randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_reward(tokenizer) -> Callable[..., RewardModel]:
    """tiny_reward(family, seed=0, shift=0.0, **GPTConfig fields) -> a new random RewardModel in eval mode."""

    def make(family: str = "llama", seed: int = 0, shift: float = 0.0, **overrides) -> RewardModel:
        model = RewardModel(shape(family, overrides.pop("vocab_size", tokenizer.vocab_size), **overrides))
        randomise(model, seed)
        model.shift.fill_(shift)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def stage_dir(tokenizer, tmp_path_factory) -> Callable[..., str]:
    """stage_dir(model, own_tokenizer=None, **stage.json keys) -> path of a new published directory."""

    def make(model: GPT | RewardModel, own_tokenizer: Tokenizer | None = None, **stage) -> str:
        folder = tmp_path_factory.mktemp("stage")
        kind = "lm" if isinstance(model, GPT) else "reward"
        content = {"stage": "test", "kind": kind, "parent": None, "gate": {"passed": True, "text": ""}, "metrics": {}}
        publish(folder, model, own_tokenizer or tokenizer, content | stage)
        return str(folder)

    return make
