"""GPT-2 (Radford 2019): our gpt2 family. Its matrices are stored transposed (Conv1D)."""

from typing import Any

from common.model.families.family import HEADS, Family, refuse
from common.model.shape import GPTConfig

NAMES = {
    **HEADS,
    "trunk.wte": "transformer.wte",
    "trunk.wpe": "transformer.wpe",
    "trunk.norm": "transformer.ln_f",
    "trunk.blocks.{}.norm1": "transformer.h.{}.ln_1",
    "trunk.blocks.{}.attn.qkv": "transformer.h.{}.attn.c_attn",
    "trunk.blocks.{}.attn.out": "transformer.h.{}.attn.c_proj",
    "trunk.blocks.{}.norm2": "transformer.h.{}.ln_2",
    "trunk.blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "trunk.blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
}
MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")


def import_config(raw: dict[str, Any]) -> GPTConfig:
    """Our shape from GPT-2's config.json."""
    refuse(
        raw,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        reorder_and_upcast_attn=(False, True),
    )
    return GPTConfig(
        family="gpt2",
        vocab_size=raw["vocab_size"],
        max_length=raw["n_positions"],
        n_layer=raw["n_layer"],
        n_head=raw["n_head"],
        n_embd=raw["n_embd"],
        n_inner=raw.get("n_inner") or 0,
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        attention_bias=raw.get("attention_bias", True),
        mlp_bias=raw.get("mlp_bias", True),
    )


def export_config(c: GPTConfig) -> dict[str, Any]:
    """GPT-2's config.json. The two keys of biases are ours; transformers always has biases."""
    return {
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "n_positions": c.max_length,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_inner": c.n_inner,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new",
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
    }


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    fits=lambda c: c.family == "gpt2" and not c.has_local_layers,
    import_config=import_config,
    export_config=export_config,
    prefix="transformer.",
    names=NAMES,
    transposed=MATRICES,
    always_biased=MATRICES,
    ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks, in OpenAI's own upload
)
