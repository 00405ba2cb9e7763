"""Weight-name maps: our models <-> transformers' own directories, bit-exact both ways.

    ours                                          theirs
    gpt2                                          gpt2 (matrices transposed: Conv1D; a bias that ours lacks is stored as zeros)
    gpt2 with local layers, no attention_bias     gpt_neo (does not divide by sqrt(D): its queries are stored divided)
    llama                                         llama
    llama with local layers, no biases            ministral

Our `qkv` and `up` hold what most of them store as separate matrices; concatenation and splitting
lose nothing.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.handoff.locate import UNREAD
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Ours -> theirs, within block N. A tuple is a concatenation along the output dimension, in this
# order.
LLAMA_BLOCK = {
    "norm1": "input_layernorm",
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": "mlp.down_proj",
}
GPT2_BLOCK = {
    "norm1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
QKV = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")
NEO_BLOCK = {**GPT2_BLOCK, "attn.qkv": QKV, "attn.out": "attn.attention.out_proj"}
OUTER = {
    "llama": {
        "trunk.wte": "model.embed_tokens",
        "trunk.norm": "model.norm",
        "head": "lm_head",
        "score": "score",
    },
    "gpt2": {
        "trunk.wte": "transformer.wte",
        "trunk.wpe": "transformer.wpe",
        "trunk.norm": "transformer.ln_f",
        "head": "lm_head",
        "score": "score",
    },
}


def layout(config: GPTConfig) -> str:
    """transformers' model_type for such a model."""
    return {"gpt2": ("gpt2", "gpt_neo"), "llama": ("llama", "ministral")}[config.family][
        config.has_local_layers
    ]


def theirs(name: str, config: GPTConfig) -> tuple[list[str], list[int] | None]:
    """Their module names for our module `name`, and the output sizes of the parts (None: not
    split)."""
    if not name.startswith("trunk.blocks."):
        return [OUTER[config.family][name]], None
    layer, part = name.removeprefix("trunk.blocks.").split(".", 1)
    kind = layout(config)
    prefix = f"transformer.h.{layer}." if config.family == "gpt2" else f"model.layers.{layer}."
    names = {"gpt2": GPT2_BLOCK, "gpt_neo": NEO_BLOCK}.get(kind, LLAMA_BLOCK)[part]
    if isinstance(names, str):
        return [prefix + names], None
    sizes = [config.n_inner] * 2
    if part == "attn.qkv":
        sizes = [n * config.head_width for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [prefix + name for name in names], sizes


def is_transposed(name: str, config: GPTConfig) -> bool:
    return layout(config) == "gpt2" and name.endswith(
        ("qkv.weight", "out.weight", "up.weight", "down.weight")
    )


def absent_biases(config: GPTConfig) -> dict[str, int]:
    """Biases that their layout has and our model lacks: name -> size. They are zeros."""
    if config.family != "gpt2":
        return {}
    sizes = {} if config.attention_bias else {"attn.out": config.n_embd}
    if not config.attention_bias and layout(config) == "gpt2":
        sizes["attn.qkv"] = 3 * config.n_embd
    sizes |= {} if config.mlp_bias else {"mlp.up": config.n_inner, "mlp.down": config.n_embd}
    modules = [
        (f"trunk.blocks.{layer}.{part}", size)
        for layer in range(config.n_layer)
        for part, size in sizes.items()
    ]
    return {f"{theirs(module, config)[0][0]}.bias": size for module, size in modules}


def export_weights(
    model: GPT | RewardModel, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Our weights under transformers' names. A tied head is stored once; the reward shift is not a
    weight of theirs."""
    config, out = model.config, {}
    for name, tensor in (state or model.state_dict()).items():
        if name == "shift" or (name == "head.weight" and config.tie_embeddings):
            continue
        module, kind = name.rsplit(".", 1)
        names, sizes = theirs(module, config)
        tensor = tensor.detach().cpu()
        parts = (
            list(tensor.split(sizes))
            if sizes
            else [tensor.t() if is_transposed(name, config) else tensor]
        )
        if layout(config) == "gpt_neo" and name.endswith("qkv.weight"):
            parts[0] = parts[0] / math.sqrt(config.head_width)
        out |= {
            f"{their}.{kind}": part.contiguous() for their, part in zip(names, parts, strict=True)
        }
    return out | {name: torch.zeros(size) for name, size in absent_biases(config).items()}


def import_weights(model: GPT | RewardModel, tensors: dict[str, Tensor], origin: str) -> None:
    """Copy transformers' tensors into our model; a missing, surplus or misshapen one is an
    InputError naming it."""
    config = model.config
    prefix = "transformer." if config.family == "gpt2" else "model."
    # OpenAI's own upload of GPT-2 lacks the prefix, and carries causal masks as if they were
    # weights.
    bare = not any(name.startswith(prefix) for name in tensors)
    tensors = {
        (prefix + name if bare and not name.startswith(("lm_head", "score")) else name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(
            (
                ".attn.bias",
                ".attn.masked_bias",
                ".attention.bias",
                ".masked_bias",
                ".rotary_emb.inv_freq",
            )
        )
    }
    for name in absent_biases(config):
        if name in tensors and tensors.pop(name).any():
            raise InputError(
                f"{origin}: {name} is not zero, though config.json says that this model has no such bias"
            )
    state = {}
    for name, parameter in model.state_dict().items():
        if name == "shift":
            continue
        module, kind = name.rsplit(".", 1)
        their_names = [f"{their}.{kind}" for their in theirs(module, config)[0]]
        if name == "head.weight" and config.tie_embeddings:
            tensors.pop(their_names[0], None)
            continue
        missing = [their for their in their_names if their not in tensors]
        if missing:
            raise InputError(
                f"{origin}: no tensor {missing[0]} in the weights; a {config.family} directory has one"
            )
        parts = [tensors.pop(their) for their in their_names]
        if layout(config) == "gpt_neo" and name.endswith("qkv.weight"):
            parts[0] = parts[0] * math.sqrt(config.head_width)
        tensor = parts[0].t() if is_transposed(name, config) else torch.cat(parts)
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}"
            raise InputError(f"{origin}: {their_names[0]} has shape {shapes}")
        state[name] = tensor
    surplus = [name for name in tensors if isinstance(model, GPT) or name != "lm_head.weight"]
    if surplus:
        raise InputError(
            f"{origin}: tensor {surplus[0]} has no place in this model ({len(surplus)} such)"
        )
    model.load_state_dict(state, strict=False)


def export_config(model: GPT | RewardModel, tokenizer_ids: dict[str, int]) -> dict[str, Any]:
    """config.json for the model; tokenizer_ids: eos_token_id, pad_token_id."""
    c = model.config
    common = {
        "vocab_size": c.vocab_size,
        "dtype": "float32",
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": tokenizer_ids["eos_token_id"],
        **tokenizer_ids,
    }
    kind = "ForCausalLM" if isinstance(model, GPT) else "ForSequenceClassification"
    if isinstance(model, RewardModel):
        common |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        common |= {"score_shift": float(model.shift)}
    form = layout(c)
    if form == "gpt_neo":
        layers = ["local" if layer == "local" else "global" for layer in c.attention_pattern]
        return common | {
            "architectures": ["GPTNeo" + kind],
            "model_type": form,
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
    if form == "gpt2":
        kind = "LMHeadModel" if isinstance(model, GPT) else kind
        return common | {
            "attention_bias": c.attention_bias,
            "mlp_bias": c.mlp_bias,
            "architectures": ["GPT2" + kind],
            "model_type": "gpt2",
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
    if form == "ministral":
        types = {"full": "full_attention", "local": "sliding_attention"}
        common |= {
            "layer_types": [types[layer] for layer in c.attention_pattern],
            "sliding_window": c.window,
        }
    return common | {
        "architectures": [form.capitalize() + kind],
        "model_type": form,
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


def import_config(raw: dict[str, Any], origin: str) -> GPTConfig:
    """GPTConfig from transformers' config.json; what our GPT cannot compute is refused by name."""
    form = raw.get("model_type")
    if form not in ("gpt2", "gpt_neo", "llama", "ministral"):
        raise InputError(
            f"{origin}: model_type {form!r}; this GPT reads gpt2, gpt_neo, llama and ministral"
        )
    try:
        if form == "gpt_neo":
            refuse(raw, origin, activation_function=("gelu_new",))
            refuse({"attention_bias": raw.get("attention_bias")}, origin, attention_bias=(False,))
            kinds = [kind for pattern, times in raw["attention_types"] for kind in pattern * times]
            return GPTConfig(
                family="gpt2",
                vocab_size=raw["vocab_size"],
                max_length=raw["max_position_embeddings"],
                n_layer=raw["num_layers"],
                n_head=raw["num_heads"],
                n_embd=raw["hidden_size"],
                n_inner=raw.get("intermediate_size"),
                norm_eps=raw.get("layer_norm_epsilon", 1e-5),
                tie_embeddings=raw.get("tie_word_embeddings", True),
                attention_bias=False,
                mlp_bias=raw.get("mlp_bias", True),
                attention_pattern=tuple("local" if kind == "local" else "full" for kind in kinds),
                window=raw["window_size"],
            )
        if form == "gpt2":
            refuse(
                raw,
                origin,
                activation_function=("gelu_new", "gelu_pytorch_tanh"),
                scale_attn_weights=(True,),
            )
            refuse(
                raw,
                origin,
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
                n_inner=raw.get("n_inner"),
                norm_eps=raw.get("layer_norm_epsilon", 1e-5),
                tie_embeddings=raw.get("tie_word_embeddings", True),
                attention_bias=raw.get("attention_bias", True),
                mlp_bias=raw.get("mlp_bias", True),
            )
        local = {}
        if form == "ministral":
            kinds = raw.get("layer_types") or ["sliding_attention"] * raw["num_hidden_layers"]
            local = {
                "attention_pattern": tuple(
                    "local" if kind == "sliding_attention" else "full" for kind in kinds
                )
            }
            local["window"] = raw["sliding_window"]
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        refuse(raw, origin, hidden_act=("silu",))
        kind = rope.get("rope_type", rope.get("type", "default"))  # "type" was its name before 2024
        refuse({"rope_type": kind}, origin, rope_type=("default",))
        heads = raw["num_attention_heads"]
        refuse(raw, origin, head_dim=(raw["hidden_size"] // heads, None))
        return GPTConfig(
            family="llama",
            vocab_size=raw["vocab_size"],
            max_length=raw["max_position_embeddings"],
            n_layer=raw["num_hidden_layers"],
            n_head=heads,
            n_embd=raw["hidden_size"],
            n_kv_head=raw.get("num_key_value_heads"),
            n_inner=raw["intermediate_size"],
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            **local,
        )
    except KeyError as error:
        raise InputError(f"{origin}: key {error} is missing") from None
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
    ) as error:  # a word for a number, a width of 0
        raise InputError(f"{origin}: config.json describes no model ({error})") from None


def refuse(raw: dict[str, Any], origin: str, **allowed: tuple) -> None:
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            raise InputError(
                f"{origin}: {key} {raw[key]!r} is not supported; this GPT computes {values[0]!r}"
            )


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{folder}: no config.json there, so it is not a model directory")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: broken JSON ({error.msg})") from None
    except ValueError as error:  # no UTF-8
        raise InputError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or of its shards. A pickle is never opened."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: damaged; fetch or save the model again") from None
        if foreign := [
            name for name in names if Path(name).name != name or not name.endswith(".safetensors")
        ]:
            raise InputError(f"{index}: names {foreign[0]}; {UNREAD}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        if not (folder / name).exists():
            others = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
            raise InputError(
                f"{folder}: no {name}{f', only {others[0]}' if others else ''}; {UNREAD}"
            )
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise InputError(
                f"{folder / name}: damaged ({error}); fetch or save it again"
            ) from None
    return tensors
