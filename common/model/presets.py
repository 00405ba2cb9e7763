"""The keys that give a new model its shape, and named shapes (presets) from the papers."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config.schema import stage_config
from common.model.costs import parameters
from common.model.gpt import GPT
from common.model.shape import GPTConfig
from common.program.errors import InputError

Positive = Annotated[int, Field(gt=0)]

# GPT-3's dense and locally banded layers; the paper does not say how wide a band is (GPT-Neo took
# 256).
_GPT3 = {
    "family": "gpt2",
    "attention_pattern": ("full", "local"),
    "window": 256,
    "max_length": 2048,
}


def _shape(n_layer: int, n_head: int, n_embd: int, **more: Any) -> dict[str, Any]:
    """Keys of a gpt2."""
    return {"family": "gpt2", "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **more}


PRESETS: dict[str, dict[str, Any]] = {
    # minGPT's own; gpt is the size of Radford 2018, though with the norms of GPT-2.
    "gpt-nano": _shape(3, 3, 48),
    "gpt-micro": _shape(4, 4, 128),
    "gpt-mini": _shape(6, 6, 192),
    "gpt": _shape(12, 12, 768, max_length=512),
    # Radford 2019, table 2.
    "gpt2": _shape(12, 12, 768, max_length=1024),
    "gpt2-medium": _shape(24, 16, 1024, max_length=1024),
    "gpt2-large": _shape(36, 20, 1280, max_length=1024),
    "gpt2-xl": _shape(48, 25, 1600, max_length=1024),
    # Brown 2020, table 2.1. There xl has 24 heads of 128 at width 2048, and 13b is 5140 wide:
    # neither divides; 16 and 5120 do.
    "gpt3-small": _shape(12, 12, 768, **_GPT3),
    "gpt3-medium": _shape(24, 16, 1024, **_GPT3),
    "gpt3-large": _shape(24, 16, 1536, **_GPT3),
    "gpt3-xl": _shape(24, 16, 2048, **_GPT3),
    "gpt3-2.7b": _shape(32, 32, 2560, **_GPT3),
    "gpt3-6.7b": _shape(32, 32, 4096, **_GPT3),
    "gpt3-13b": _shape(40, 40, 5120, **_GPT3),
    "gpt3-175b": _shape(96, 96, 12288, **_GPT3),
}  # fmt: skip
DEFAULTS = {"family": "llama", "n_layer": 4, "n_head": 4, "n_embd": 128}


# Keys that are called the same in GPTConfig, and that have no default of their own.
SAME = (
    *("family", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "window"),
    *("attention_bias", "mlp_bias"),
)


@stage_config
class ArchitectureConfig:
    """Keys of a new model's shape (ignored when a parent is given)."""

    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    """A named shape; the keys below change it. Without one: a llama of 4 layers, 4 heads, width
    128."""
    family: Literal["llama", "gpt2"] | None = None
    """llama: rotary positions, RMSNorm, SwiGLU; gpt2: learned positions, LayerNorm, GELU."""
    n_layer: Annotated[int, Field(ge=0, le=10_000)] | None = None
    """Blocks; 0 = a bigram model."""
    n_head: Positive | None = None
    """Attention heads."""
    n_kv_head: Positive | None = None
    """Key/value heads shared by groups of heads (llama); null = n_head."""
    n_embd: Positive | None = None
    """Width."""
    n_inner: Positive | None = None
    """Width inside the MLP; null = 4 n_embd (gpt2), 8/3 n_embd (llama)."""
    context_length: Positive | None = None
    """Positions the model can ever see; null = the preset's, else max_length."""
    attention_pattern: list[Literal["full", "local"]] | None = None
    """Kinds of layers, repeated: `full local` alternates dense attention with attention to a window
    (GPT-3)."""
    window: Positive | None = None
    """Positions that a local layer sees, its own among them."""
    attention_bias: bool | None = None
    """Biases in attention; null = gpt2 has them (unless some layers are local), llama not."""
    mlp_bias: bool | None = None
    """Biases in the MLP; null = gpt2 has them, llama not."""
    tie_embeddings: bool = True
    """Input and output embedding are one matrix."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout while training."""


def shape_of(cfg: ArchitectureConfig, vocab_size: int, max_length: int) -> GPTConfig:
    """The shape that the keys describe: a key that is given wins over the preset's, and that over
    the default. max_length: positions if neither key nor preset says."""
    given = {key: value for key in SAME if (value := getattr(cfg, key)) is not None}
    given |= {"max_length": cfg.context_length} if cfg.context_length else {}
    given |= {"attention_pattern": tuple(cfg.attention_pattern)} if cfg.attention_pattern else {}
    wanted = {"max_length": max_length, **DEFAULTS, **PRESETS.get(cfg.preset or "", {}), **given}
    return GPTConfig(
        vocab_size=vocab_size, tie_embeddings=cfg.tie_embeddings, dropout=cfg.dropout, **wanted
    )


def new_model(cfg: ArchitectureConfig, vocab_size: int, max_length: int) -> GPT:
    """A GPT of the shape that the keys describe, with random weights. Raises InputError when its
    context is shorter than the rows of max_length that it is to learn from."""
    shape = shape_of(cfg, vocab_size, max_length)
    if max_length > shape.max_length:
        length, preset = cfg.context_length, cfg.preset
        by = f"context_length {length}" if length else f"preset {preset}"
        context = f"the context of the new model is {shape.max_length} ({by})"
        raise InputError(f"max_length {max_length}: {context}")
    refuse_too_large(shape)
    return GPT(shape)


def refuse_too_large(shape: GPTConfig) -> None:
    """Raise InputError for a model whose fp32 weights and rotary tables this machine cannot
    hold."""
    size = 4 * (parameters(shape) + 2 * shape.max_length * shape.head_width)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        sizes = {name: getattr(shape, name) for name in ("n_layer", "n_embd", "n_inner")}
        named = ", ".join(f"{name} {value}" for name, value in sizes.items())
        raise InputError(
            f"{named}, context {shape.max_length}: a new model of {size / 1e9:,.0f} GB, this "
            f"machine has {memory / 1e9:,.0f} GB of memory"
        )
