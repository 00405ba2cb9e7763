"""Ministral (Mistral AI 2024): our llama family with local layers and no biases."""

from typing import Any

from common.model.families import llama
from common.model.shape import GPTConfig

KINDS = {"full": "full_attention", "local": "sliding_attention"}  # of layers, ours -> theirs


def import_config(raw: dict[str, Any]) -> GPTConfig:
    """Our shape from Ministral's config.json."""
    kinds = raw.get("layer_types") or [KINDS["local"]]  # repeated to all layers
    pattern = tuple("local" if kind == KINDS["local"] else "full" for kind in kinds)
    return llama.import_config(raw, attention_pattern=pattern, window=raw["sliding_window"])


def export_config(c: GPTConfig) -> dict[str, Any]:
    """Ministral's config.json: that of Llama, and which layers are local."""
    layers = [KINDS[kind] for kind in c.attention_pattern]
    return llama.export_config(c) | {"layer_types": layers, "sliding_window": c.window}


FAMILY = llama.FAMILY._replace(
    model_type="ministral",
    architectures=("MinistralForCausalLM", "MinistralForSequenceClassification"),
    fits=lambda c: c.family == "llama" and c.has_local_layers,
    import_config=import_config,
    export_config=export_config,
)
