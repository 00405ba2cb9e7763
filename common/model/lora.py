"""LoRA (Hu 2021) through peft: inject adapters into a model, merge them into its weights."""

from collections.abc import Sequence

from torch import Tensor, nn

from common.model.gpt import GPT, RewardModel
from common.program.errors import InputError


def add_lora(model: GPT | RewardModel, r: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze `model` and give its target Linear layers trainable adapters; a reward head stays
    trainable.

    Raises InputError for a target that names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # 3 s to import: only who needs it pays

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = {name.rsplit(".", 1)[-1] for name in linear} - {"head", "score"}
    known = f"there are {', '.join(sorted(layers))}"
    if not targets:
        raise InputError(f"lora_targets is empty; {known}")
    if unknown := sorted(set(targets) - layers):
        raise InputError(f"lora_targets {unknown[0]!r}: no such layer; {known}")
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith("score.")


def merged_state(model: GPT | RewardModel) -> dict[str, Tensor]:
    """The model's weights under their plain names, adapters added in: what `publish` writes."""
    full = model.state_dict()
    plain = {name: tensor for name, tensor in full.items() if "lora_" not in name}
    state = {name.replace(".base_layer", ""): tensor for name, tensor in plain.items()}
    if len(state) == len(full):
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + module.get_delta_weight("default").to(weight.dtype)
    return state
