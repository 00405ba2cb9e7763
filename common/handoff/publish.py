"""The hand-off: publish a stage directory in transformers' own layout, load it.

A directory counts once its manifest.json (size and sha256 of every file) is there: it is written
last, and removed before anything it vouches for is touched.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from common.handoff.hf import (
    check_size,
    export_config,
    export_weights,
    import_config,
    import_shift,
    import_weights,
    read_config,
    read_weights,
)
from common.handoff.locate import locate, read_stage
from common.handoff.report import STAGE, vouch
from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.program.files import MANIFEST, check_room, dump, write_atomically, writing
from common.text.tokenizer import Tokenizer

Kind = Literal["lm", "reward"]
NAMES = {"lm": "language model", "reward": "reward model"}


def publish(
    folder: str | Path,
    model: GPT | RewardModel,
    tokenizer: Tokenizer,
    stage: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model, tokenizer and stage.json to `folder`, crash-safe. `weights`: the model's state
    where it is another than model.state_dict(), as with adapters merged. Raises Failure when the
    disk is full."""
    from safetensors.torch import save

    folder = Path(folder)
    end, padding = (tokenizer.eot_id, tokenizer.pad_id) if tokenizer.has_control else (None, None)
    config = export_config(model, {"eos_token_id": end, "pad_token_id": padding})
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        STAGE: dump(stage),  # first: with it and no manifest the directory counts as cut short
        "config.json": dump(config),
        "model.safetensors": save(export_weights(model, weights), metadata={"format": "pt"}),
    }
    if isinstance(model, GPT):
        # Plain sampling is what the model was trained for; greedy and truncation are the caller's
        # choice.
        files["generation_config.json"] = dump(
            {**tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, sum(map(len, files.values())))
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        tokenizer.save(folder, max_length=model.config.max_length)
        vouch(folder)


def load_config(path: str, kind: Kind | None = None) -> GPTConfig:
    """Shape of the model of a stage or transformers directory; no weights are read. A wrong kind is
    an InputError."""
    folder = locate(path, weights=False)
    raw = read_config(folder)
    found: Kind = "reward" if "SequenceClassification" in str(raw.get("architectures")) else "lm"
    if kind and found != kind:
        parent = read_stage(path).get("parent") if kind == "lm" else None
        hint = f"; did you mean its parent {parent}?" if parent else ""
        raise InputError(f"{path} holds a {NAMES[found]}, a {NAMES[kind]} is wanted here{hint}")
    return import_config(raw, str(folder))


def check_context(path: str, kind: Kind, length: int, key: str) -> None:
    """Raise InputError when the model there is not of this kind, or sees fewer than `length`
    tokens."""
    if length > (context := load_config(path, kind).max_length):
        raise InputError(f"{key} {length}: the model's context is {context} ({path})")


def load_model(path: str, kind: Kind = "lm", dropout: float = 0.0) -> GPT | RewardModel:
    """The model of a stage or transformers directory, fp32 on the CPU, in eval mode. A wrong kind
    is an InputError."""
    folder = locate(path)
    config = replace(load_config(path, kind), dropout=dropout)
    tensors = read_weights(folder)
    check_size(config, tensors, str(folder))
    model = GPT(config) if kind == "lm" else RewardModel(config)
    import_weights(model, tensors, str(folder))
    if isinstance(model, RewardModel):
        model.shift.fill_(import_shift(read_config(folder), str(folder)))
    return model.eval()
