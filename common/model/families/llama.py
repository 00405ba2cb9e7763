"""Llama (Touvron 2023): our llama family."""

from typing import Any

from common.model.families.family import HEADS, Family, Names, refuse
from common.model.shape import GPTConfig

NAMES: Names = {
    **HEADS,
    "trunk.wte": "model.embed_tokens",
    "trunk.norm": "model.norm",
    "trunk.blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "trunk.blocks.{}.attn.qkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "trunk.blocks.{}.attn.out": "model.layers.{}.self_attn.o_proj",
    "trunk.blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "trunk.blocks.{}.mlp.up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "trunk.blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
}


def import_config(raw: dict[str, Any], **more: Any) -> GPTConfig:
    """Our shape from Llama's config.json, of today and of before 2024; `more` fields of it from
    families that are like it."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    heads, kind = raw["num_attention_heads"], rope.get("rope_type", rope.get("type", "default"))
    refuse(raw, hidden_act=("silu",), head_dim=(raw["hidden_size"] // heads, None))
    refuse({"rope_type": kind}, rope_type=("default",))
    for place in (raw, rope):
        refuse(place, partial_rotary_factor=(1.0, None))
    shape = {
        "family": "llama",
        "vocab_size": raw["vocab_size"],
        "max_length": raw["max_position_embeddings"],
        "n_layer": raw["num_hidden_layers"],
        "n_head": heads,
        "n_embd": raw["hidden_size"],
        "n_kv_head": raw.get("num_key_value_heads") or 0,
        "n_inner": raw["intermediate_size"],
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
    }
    return GPTConfig(**shape | more)


def export_config(c: GPTConfig) -> dict[str, Any]:
    """Llama's config.json."""
    return {
        "max_position_embeddings": c.max_length,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_width,
        "intermediate_size": c.n_inner,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "attention_dropout": 0.0,
    }


FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM", "LlamaForSequenceClassification"),
    fits=lambda c: c.family == "llama" and not c.has_local_layers,
    import_config=import_config,
    export_config=export_config,
    prefix="model.",
    names=NAMES,
    ignored=(".rotary_emb.inv_freq",),  # a table that old versions of transformers saved
)
