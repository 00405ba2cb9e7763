"""GPT-Neo (Black 2021): our gpt2 family with local layers, and in attention a bias of the output
alone, or none.

It does not divide scores by sqrt(D), so its queries are stored divided.
"""

import math
from typing import Any

from common.model.families import gpt2
from common.model.families.family import Family, Names, refuse
from common.model.shape import MOST, GPTConfig

NAMES: Names = {
    **gpt2.NAMES,
    "trunk.blocks.{}.attn.qkv": (
        "transformer.h.{}.attn.attention.q_proj",
        "transformer.h.{}.attn.attention.k_proj",
        "transformer.h.{}.attn.attention.v_proj",
    ),
    "trunk.blocks.{}.attn.out": "transformer.h.{}.attn.attention.out_proj",
}


def import_config(raw: dict[str, Any]) -> GPTConfig:
    """Our shape from GPT-Neo's config.json."""
    refuse(raw, activation_function=("gelu_new", "gelu_pytorch_tanh"))
    most = MOST["n_layer"]
    kinds = [k for pattern, times in raw["attention_types"] for k in pattern * min(times, most)]
    return GPTConfig(
        family="gpt2",
        vocab_size=raw["vocab_size"],
        max_length=raw["max_position_embeddings"],
        n_layer=raw["num_layers"],
        n_head=raw["num_heads"],
        n_embd=raw["hidden_size"],
        n_inner=raw.get("intermediate_size") or 0,
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        attention_bias=raw.get("attention_bias", True),
        mlp_bias=raw.get("mlp_bias", True),
        attention_pattern=tuple("local" if kind == "local" else "full" for kind in kinds),
        window=raw["window_size"],
    )


def export_config(c: GPTConfig) -> dict[str, Any]:
    """GPT-Neo's config.json. The two keys of biases are ours."""
    layers = ["local" if kind == "local" else "global" for kind in c.attention_pattern]
    return {
        "max_position_embeddings": c.max_length,
        "hidden_size": c.n_embd,
        "num_layers": c.n_layer,
        "num_heads": c.n_head,
        "intermediate_size": c.n_inner,
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "window_size": c.window,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new",
        "resid_dropout": c.dropout,
        "embed_dropout": c.dropout,
        "attention_dropout": c.dropout,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
    }


FAMILY = Family(
    model_type="gpt_neo",
    architectures=("GPTNeoForCausalLM", "GPTNeoForSequenceClassification"),
    fits=lambda c: c.family == "gpt2" and c.has_local_layers,
    import_config=import_config,
    export_config=export_config,
    prefix="transformer.",
    names=NAMES,
    always_biased=("attn.out", "mlp.up", "mlp.down"),
    query_divisor=lambda c: math.sqrt(c.head_width),
    ignored=(".attention.bias", ".masked_bias"),  # causal masks
)
