"""LoRA (Hu 2021) through peft: inject adapters into a model, merge them into its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from common.model.gpt import GPT, RewardModel
from common.program.errors import InputError


class LearnedRows(nn.Module):
    """Rows of an embedding or a head that train while its others are frozen: a parametrization of
    torch's, which stands for the whole weight."""

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        """Rows `ids` of weight (V, C) are where they start."""
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.rows = nn.Parameter(weight.detach()[ids].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The frozen weight (V, C) with the rows as they are now."""
        return weight.index_copy(0, self.ids, self.rows)


def add_lora(
    model: GPT | RewardModel,
    r: int,
    alpha: float,
    targets: Sequence[str],
    learned: Sequence[int] = (),
) -> None:
    """Freeze `model` and give its target Linear layers trainable adapters; a reward head stays
    trainable, and so do the rows of the ids `learned` in the embedding and the head.

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
    if learned:
        learn_rows(model, learned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith("score.")
    for rows in learned_rows(model).values():
        rows.rows.requires_grad = True


def learn_rows(model: GPT | RewardModel, ids: Sequence[int]) -> None:
    """Let these rows of the embedding learn, and of the head: the same ones where it is tied."""
    shared = LearnedRows(model.trunk.wte.weight, ids)
    register_parametrization(model.trunk.wte, "weight", shared)
    if isinstance(model, GPT):
        tied = model.config.tie_embeddings
        own = shared if tied else LearnedRows(model.head.weight, ids)
        register_parametrization(model.head, "weight", own)


def learned_rows(model: nn.Module) -> dict[str, LearnedRows]:
    """{name of a module: the rows of its weight that learn}; tied modules have the same ones."""
    return {
        name: module.parametrizations.weight[0]
        for name, module in model.named_modules()
        if is_parametrized(module)
    }


def merged_state(model: GPT | RewardModel) -> dict[str, Tensor]:
    """The model's weights under their plain names, adapters added in: what `publish` writes."""
    full, added = model.state_dict(), ("lora_", ".parametrizations.")
    plain = {name: w for name, w in full.items() if not any(word in name for word in added)}
    state = {name.replace(".base_layer", ""): tensor for name, tensor in plain.items()}
    if len(state) == len(full):
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if is_parametrized(module):
            frozen, rows = module.parametrizations.weight.original, learned_rows(module)[""]
            # Not module.weight, for which ZeRO-3 would gather again, and wait for all processes.
            state[f"{name}.weight"] = rows.forward(frozen).detach()
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + module.get_delta_weight("default").to(weight.dtype)
    return state
