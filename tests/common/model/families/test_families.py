"""Every family: which shapes it stands for, that its config.json says all of them, that its names
are those of all our modules."""

import pytest
from torch import nn

from common.model.families import FAMILIES, family_of
from common.model.families.family import refuse
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError

LOCAL = {"attention_pattern": ("local", "full"), "window": 5, "n_layer": 3}
SIZES = {"vocab_size": 50, "max_length": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = [
    ("gpt2", {"family": "gpt2"}),
    ("gpt2", {"family": "gpt2", "tie_embeddings": False, "norm_eps": 1e-3, "n_inner": 40}),
    ("gpt2", {"family": "gpt2", "attention_bias": False, "mlp_bias": False}),
    ("gpt_neo", {"family": "gpt2", **LOCAL}),
    ("gpt_neo", {"family": "gpt2", **LOCAL, "mlp_bias": False}),
    ("gpt_neo", {"family": "gpt2", **LOCAL, "attention_bias": True}),
    ("llama", {"tie_embeddings": False, "norm_eps": 1e-3, "n_inner": 40}),
    ("llama", {"n_kv_head": 2, "rope_theta": 500.0, "attention_bias": True, "mlp_bias": True}),
    ("ministral", {**LOCAL, "n_kv_head": 1}),
]
shapes = pytest.mark.parametrize("model_type, settings", SHAPES)


def test_every_family_is_tried():
    assert {model_type for model_type, _ in SHAPES} == set(FAMILIES)


@shapes
def test_config_json_says_the_whole_shape(model_type, settings):
    config = GPTConfig(**SIZES | settings)
    family = family_of(config)
    assert family.model_type == model_type
    raw = family.export_config(config)
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    assert family.import_config(common | raw) == config
    assert not set(common) & set(raw)


@shapes
def test_names_are_those_of_all_modules(model_type, settings):
    config = GPTConfig(**SIZES | settings)
    family = FAMILIES[model_type]
    modules = set()
    for model in (GPT(config), RewardModel(config)):
        own = (name for name, module in model.named_modules() if list(module.parameters(False)))
        modules |= {name.replace("blocks.0", "blocks.{}") for name in own if "blocks.1" not in name}
    modules = {name for name in modules if "blocks.2" not in name}
    assert set(family.names) == modules
    ours = [f"trunk.blocks.0.{part}" for part in family.transposed + family.always_biased]
    linear = {name for name, module in GPT(config).named_modules() if isinstance(module, nn.Linear)}
    assert set(ours) <= linear


def test_refused_is_what_is_there_and_not_allowed():
    refuse({"other": 1}, wanted=(2, 3))
    refuse({"wanted": 3}, wanted=(2, 3))
    with pytest.raises(InputError, match="wanted 4 is not supported; this GPT computes 2"):
        refuse({"wanted": 4}, wanted=(2, 3))
