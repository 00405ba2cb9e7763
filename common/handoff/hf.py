"""Our models <-> transformers' own directories, bit-exact both ways.

What differs between families of models (names of weights, config.json, what is stored transposed or
scaled) is in common/model/families, a file each; here is what all of them share. Our `qkv` and `up`
hold what most families store as separate matrices; concatenation and splitting lose nothing.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.handoff.locate import UNREAD
from common.model.costs import layers_of, parameters
from common.model.families import FAMILIES, family_of
from common.model.families.family import Family
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.program.files import refuse_irregular

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BLOCK = re.compile(r"(?<=blocks\.)\d+")  # its number, in the name of a module of ours


# Names and parts


def theirs(module: str, config: GPTConfig) -> tuple[list[str], list[int] | None]:
    """Their module names for our module, and the output sizes of the parts (None: not split)."""
    found = BLOCK.search(module)
    names = family_of(config).names[BLOCK.sub("{}", module)]
    several = [names] if isinstance(names, str) else names
    numbered = [name.format(found.group()) if found else name for name in several]
    if isinstance(names, str):
        return numbered, None
    if module.endswith("attn.qkv"):
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        return numbered, [count * config.head_width for count in heads]
    return numbered, [config.n_inner] * 2


def split(module: str, tensor: Tensor, config: GPTConfig) -> list[Tensor]:
    """The parts of our module's weight (outputs, inputs) or bias (outputs), one for each of their
    modules."""
    _, sizes = theirs(module, config)
    parts = list(tensor.split(sizes)) if sizes else [tensor]
    divisor = family_of(config).query_divisor
    if divisor and module.endswith("attn.qkv"):
        parts[0] = parts[0] / divisor(config)
    return parts


def join(module: str, parts: list[Tensor], config: GPTConfig) -> Tensor:
    """The reverse of `split`."""
    divisor = family_of(config).query_divisor
    if divisor and module.endswith("attn.qkv"):
        parts = [parts[0] * divisor(config), *parts[1:]]
    return torch.cat(parts)


def is_transposed(module: str, kind: str, family: Family) -> bool:
    """Whether the family stores this weight as (inputs, outputs)."""
    return kind == "weight" and module.endswith(family.transposed)


def absent_biases(config: GPTConfig) -> dict[str, int]:
    """Biases that their layout has and our model lacks: name -> size. They are zeros."""
    absent = {}
    for part in family_of(config).always_biased:
        name = part.split(".")[1]
        for layer in range(0 if name in config.biased else config.n_layer):
            (module,) = theirs(f"trunk.blocks.{layer}.{part}", config)[0]
            absent[f"{module}.bias"] = layers_of(config)[name][1]
    return absent


# Weights


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
        parts = split(module, tensor.detach().cpu(), config)
        if is_transposed(module, kind, family_of(config)):
            parts = [part.t() for part in parts]
        for their, part in zip(theirs(module, config)[0], parts, strict=True):
            out[f"{their}.{kind}"] = part.contiguous()
    return out | {name: torch.zeros(size) for name, size in absent_biases(config).items()}


def import_weights(model: GPT | RewardModel, tensors: dict[str, Tensor], origin: str) -> None:
    """Copy transformers' tensors into our model; a missing, surplus or misshapen one is an
    InputError naming it."""
    config = model.config
    tensors = _weights_alone(tensors, family_of(config))
    for name in absent_biases(config):
        if name in tensors and tensors.pop(name).any():
            wrong = "is not zero, though config.json says that this model has no such bias"
            raise InputError(f"{origin}: {name} {wrong}")
    state = {}
    for name, parameter in model.state_dict().items():
        if name == "head.weight" and config.tie_embeddings:
            tensors.pop(f"{theirs('head', config)[0][0]}.weight", None)
        elif name != "shift":
            state[name] = _take(name, tuple(parameter.shape), tensors, config, origin)
    surplus = [name for name in tensors if isinstance(model, GPT) or name != "lm_head.weight"]
    if surplus:
        more = f"({len(surplus)} such)"
        raise InputError(f"{origin}: tensor {surplus[0]} has no place in this model {more}")
    model.load_state_dict(state, strict=False)


def _weights_alone(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Their tensors less those that are no weights, and with the family's prefix, which OpenAI's
    own upload of GPT-2 lacks."""
    bare = not any(name.startswith(family.prefix) for name in tensors)
    heads = ("lm_head", "score")
    return {
        family.prefix + name if bare and not name.startswith(heads) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(family.ignored)
    }


def _take(
    name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], config: GPTConfig, origin: str
) -> Tensor:
    """Our tensor of this name and shape, out of theirs, which are taken away. Raises InputError for
    one that is missing, of another shape, or quantised."""
    family = family_of(config)
    module, kind = name.rsplit(".", 1)
    names = [f"{their}.{kind}" for their in theirs(module, config)[0]]
    if missing := [their for their in names if their not in tensors]:
        has_one = f"a {family.model_type} directory has one"
        raise InputError(f"{origin}: no tensor {missing[0]} in the weights; {has_one}")
    parts = [tensors.pop(their) for their in names]
    for their, part in zip(names, parts, strict=True):
        if not part.is_floating_point():
            kind = str(part.dtype).removeprefix("torch.")
            raise InputError(
                f"{origin}: {their} holds {kind} numbers, which are no weights as they are; "
                "fetch or save the model in fp32, bf16 or fp16"
            )
    try:
        if is_transposed(module, kind, family):
            parts = [part.t() for part in parts]
        tensor = join(module, parts, config)
    except RuntimeError as error:  # parts that do not fit each other
        told = str(error).splitlines()[0]
        raise InputError(f"{origin}: {names[0]} has a shape of no such model ({told})") from None
    if tuple(tensor.shape) != shape:
        shapes = f"{tuple(tensor.shape)}, config.json says {shape}"
        raise InputError(f"{origin}: {names[0]} has shape {shapes}")
    return tensor


# config.json


def export_config(
    model: GPT | RewardModel, tokenizer_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json for the model; tokenizer_ids: eos_token_id, pad_token_id."""
    config, is_reward = model.config, isinstance(model, RewardModel)
    family = family_of(config)
    raw: dict[str, Any] = {
        "architectures": [family.architectures[is_reward]],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "dtype": "float32",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": tokenizer_ids["eos_token_id"],
        **tokenizer_ids,
    }
    if is_reward:
        raw |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        raw |= {"score_shift": float(model.shift)}
    return raw | family.export_config(config)


def import_config(raw: dict[str, Any], origin: str) -> GPTConfig:
    """GPTConfig from transformers' config.json; what our GPT cannot compute is refused by name."""
    kind = raw.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        *most, last = FAMILIES
        known = f"{', '.join(most)} and {last}"
        raise InputError(f"{origin}: model_type {kind!r}; this GPT reads {known}")
    try:
        return family.import_config(raw)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except KeyError as error:
        raise InputError(f"{origin}: key {error} is missing") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # A word for a number, a width of 0.
        raise InputError(f"{origin}: config.json describes no model ({error})") from None


def import_shift(raw: dict[str, Any], origin: str) -> float:
    """What a reward model's scores are shifted by, from config.json; 0 where it does not say."""
    shift = raw.get("score_shift", 0.0)
    if type(shift) not in (int, float) or not math.isfinite(shift):
        raise InputError(f"{origin}: score_shift {shift!r:.40} in config.json: must be a number")
    return shift


# Files


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json in `folder` holds. Raises InputError where there is none, or no JSON
    object."""
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{folder}: no config.json there, so it is not a model directory")
    refuse_irregular(file)
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, [[[[...
        raise InputError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or of its shards. A pickle is never opened. Raises
    InputError for files that are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: damaged ({error}); fetch or save it again") from None
    return tensors


def check_size(config: GPTConfig, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise InputError where the model has far more parameters than its tensors have elements,
    before any memory is taken for it. What exactly is missing, `import_weights` tells."""
    size, held = parameters(config, "scalar"), sum(each.numel() for each in tensors.values())
    if size > 2 * held + 10**6:
        what = f"config.json describes a model of {size:,} parameters"
        raise InputError(f"{origin}: {what}, and its weights are {held:,} numbers")


def _weight_files(folder: Path) -> list[Path]:
    """The files with weights: those in the index of shards, or the one. Raises InputError for one
    that is missing, or no file."""
    files = [folder / name for name in _names_of_weights(folder)]
    for file in files:
        if not file.exists():
            pickles = [other.name for other in sorted(folder.iterdir()) if other.suffix in PICKLES]
            only = f", only {pickles[0]}" if pickles else ""
            raise InputError(f"{folder}: no {file.name}{only}; {UNREAD}")
        refuse_irregular(file)
    return files


def _names_of_weights(folder: Path) -> list[str]:
    """The names in the index of shards, or the one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    refuse_irregular(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: damaged; fetch or save the model again") from None
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{index}: names {name!r:.40}, which is no file; fetch it again")
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: names {name}; {UNREAD}")
    return names
