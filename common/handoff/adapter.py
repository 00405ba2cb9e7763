"""LoRA adapters in peft's format, under transformers' names."""

from pathlib import Path

from torch import Tensor

from common.handoff.hf import split, theirs
from common.model.families import family_of
from common.model.gpt import GPT, RewardModel
from common.program.files import dump, write_atomically, writing


def save_adapter(
    model: GPT | RewardModel, folder: Path, parent: str | None, r: int, alpha: float
) -> None:
    """`folder`/adapter_model.safetensors and adapter_config.json, which peft opens over the
    parent's directory.

    Our fused qkv and up share one A; transformers' separate matrices each get that A and their rows
    of B: the same map.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            continue
        module, side = name.removesuffix(".default.weight").rsplit(".", 1)
        names, _ = theirs(module, model.config)
        is_outer = side == "lora_B"
        parts = split(module, tensor, model.config) if is_outer else [tensor] * len(names)
        for their, part in zip(names, parts, strict=True):
            tensors[f"base_model.model.{their}.{side}.weight"] = (
                part.detach().cpu().clone().contiguous()
            )
            modules.add(
                their.rsplit(".", 1)[-1]
                if model.config.family == "llama"
                else ".".join(their.split(".")[-2:])
            )
    if isinstance(model, RewardModel):
        tensors["base_model.model.score.weight"] = model.score.weight.detach().cpu().clone()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, GPT) else "SEQ_CLS",
        "base_model_name_or_path": str(Path(parent).resolve())
        if parent and Path(parent).exists()
        else parent,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "modules_to_save": ["score"] if isinstance(model, RewardModel) else None,
        "fan_in_fan_out": bool(family_of(model.config).transposed),
        "bias": "none",
        "inference_mode": True,
    }
    write_atomically(folder / "adapter_config.json", dump(config))
