"""LoRA (Hu 2021) through peft: inject adapters, merge them into the weights, save them beside under
transformers' names."""

from torch import Tensor, nn

from common.model.gpt import GPT, RewardModel
from common.program.errors import InputError


def add_lora(model: GPT | RewardModel, r: int, alpha: float, targets: list[str]) -> None:
    """Freeze `model` and give its target Linear layers trainable adapters; a reward head stays
    trainable.

    Raises InputError for a target that names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 3 s to import: only who needs it pays

    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not targets:
        raise InputError(
            f"lora_targets is empty; there are {', '.join(sorted(layers - {'head', 'score'}))}"
        )
    if unknown := sorted(set(targets) - (layers - {"head", "score"})):
        raise InputError(
            f"lora_targets {unknown[0]!r}: no such layer; there are {', '.join(sorted(layers - {'head', 'score'}))}"
        )
    inject_adapter_in_model(
        LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith("score.")


def merged_state(model: GPT | RewardModel) -> dict[str, Tensor]:
    """The model's weights under their plain names, adapters added in: what `publish` writes."""
    full = model.state_dict()
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in full.items()
        if "lora_" not in name
    }
    if len(state) == len(full):
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            state[f"{name}.weight"] = state[f"{name}.weight"] + delta.to(
                state[f"{name}.weight"].dtype
            )
    return state
