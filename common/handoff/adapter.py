"""LoRA adapters in peft's format, under transformers' names."""

from pathlib import Path

from torch import Tensor

from common.handoff.hf import split, theirs
from common.model.families import family_of
from common.model.gpt import GPT, RewardModel
from common.model.lora import learned_rows
from common.program.files import dump, write_atomically, writing
from common.text.tokenizer import Tokenizer


def save_adapter(
    model: GPT | RewardModel,
    folder: Path,
    parent: str | None,
    r: int,
    alpha: float,
    tokenizer: Tokenizer,
) -> None:
    """Write `folder`/adapter_model.safetensors and adapter_config.json, which peft opens over the
    parent's directory. Raises Failure when they cannot be written.

    Rows that were learned are peft's trainable tokens. The parent may lack them, so the tokenizer
    goes with them: from it peft's AutoPeftModel classes see how many rows the parent must have.
    Over a parent that was opened by hand, `parent.resize_token_embeddings(len(tokenizer))` comes
    before `PeftModel.from_pretrained`, which else ends with an IndexError.
    """
    from safetensors.torch import save

    tensors, modules = adapter_weights(model)
    rows = {theirs(name, model.config)[0][0]: of for name, of in learned_rows(model).items()}
    if isinstance(model, GPT) and model.config.tie_embeddings:
        rows.pop("lm_head", None)  # peft ties it to the embedding as transformers does
    for name, of_one in rows.items():
        key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
        tensors[key] = of_one.rows.detach().cpu().clone()
    if parent and Path(parent).exists():
        parent = str(Path(parent).resolve())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, GPT) else "SEQ_CLS",
        "base_model_name_or_path": parent,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "modules_to_save": ["score"] if isinstance(model, RewardModel) else None,
        "fan_in_fan_out": bool(family_of(model.config).transposed),
        "trainable_token_indices": {
            name.rsplit(".", 1)[-1]: of_one.ids.tolist() for name, of_one in rows.items()
        }
        or None,
        "bias": "none",
        "inference_mode": True,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "adapter_config.json", dump(config))
    if rows:
        tokenizer.save(folder, model.config.max_length)


def adapter_weights(model: GPT | RewardModel) -> tuple[dict[str, Tensor], set[str]]:
    """(tensors of the adapters under peft's names, modules that have one under transformers').

    Our fused qkv and up share one A; transformers' separate matrices each get that A and their rows
    of B: the same map.
    """
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    words = 1 if model.config.family == "llama" else 2  # of a module's name: q_proj, attn.c_attn
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            continue
        module, side = name.removesuffix(".default.weight").rsplit(".", 1)
        names, _ = theirs(module, model.config)
        is_outer = side == "lora_B"
        parts = split(module, tensor, model.config) if is_outer else [tensor] * len(names)
        for their, part in zip(names, parts, strict=True):
            part = part.detach().cpu().clone().contiguous()
            tensors[f"base_model.model.{their}.{side}.weight"] = part
            modules.add(".".join(their.split(".")[-words:]))
    if isinstance(model, RewardModel):
        tensors["base_model.model.score.weight"] = model.score.weight.detach().cpu().clone()
    return tensors, modules
