"""The keys of a new model's shape: the papers' sizes, and what wins over what."""

import pytest
import torch
from pydantic import ValidationError

from common.model.gpt import GPT
from common.model.presets import PRESETS, ArchitectureConfig, shape_of

# Published parameter counts: GPT-2 as transformers counts its uploads; GPT-3 as its table 2.1
# rounds them.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
ROUNDED = {
    "gpt3-small": 125e6,
    "gpt3-medium": 350e6,
    "gpt3-large": 760e6,
    "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
    "gpt3-175b": 175e9,
}


def parameters(preset: str, vocab_size: int = 50257) -> int:
    with torch.device("meta"):
        return sum(
            p.numel()
            for p in GPT(shape_of(ArchitectureConfig(preset=preset), vocab_size, 1)).parameters()
        )


@pytest.mark.heavy
def test_presets_have_the_papers_sizes():
    assert {name: parameters(name) for name in PUBLISHED} == PUBLISHED
    for name, count in ROUNDED.items():
        assert parameters(name) == pytest.approx(count, rel=0.06), name
    assert (
        parameters("gpt", 40478) == 116_534_784 + 2 * 768
    )  # openai-gpt, and the last norm that it lacks
    assert set(PRESETS) == {*PUBLISHED, *ROUNDED, "gpt", "gpt-mini", "gpt-micro", "gpt-nano"}


def test_keys_win_over_the_preset_and_the_preset_over_the_default():
    shape = shape_of(
        ArchitectureConfig(preset="gpt2", n_layer=2, tie_embeddings=False, dropout=0.1), 100, 7
    )
    assert (shape.family, shape.n_layer, shape.n_embd, shape.max_length) == ("gpt2", 2, 768, 1024)
    assert (shape.tie_embeddings, shape.dropout, shape.vocab_size) == (False, 0.1, 100)
    plain = shape_of(ArchitectureConfig(n_layer=0), 100, 7)
    assert (plain.family, plain.n_layer, plain.n_head, plain.n_embd, plain.max_length) == (
        "llama",
        0,
        4,
        128,
        7,
    )
    assert shape_of(ArchitectureConfig(preset="gpt2", context_length=64), 100, 7).max_length == 64
    third = shape_of(ArchitectureConfig(preset="gpt3-small"), 100, 7)
    assert (
        third.attention_pattern == ("full", "local") * 6
        and third.window == 256
        and not third.attention_bias
    )
    dense = shape_of(ArchitectureConfig(preset="gpt3-small", attention_pattern=["full"]), 100, 7)
    assert dense.attention_pattern == ("full",) * 12 and dense.attention_bias


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValidationError, match="gpt3-175b"):
        ArchitectureConfig(preset="gpt5")
