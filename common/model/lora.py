"""LoRA (Hu 2021) through peft: inject adapters into a model, merge them into its weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model.gpt import GPT, RewardModel, predict
from common.program.errors import InputError


class LearnedRows(nn.Module):
    """A weight (V, C) that is frozen but for the rows of some ids, in place of a module of GPT.

    Both are parameters of this module, as ZeRO-3 gathers those of the module that runs.
    """

    def __init__(self, weight: nn.Parameter, ids: Sequence[int], rows: nn.Parameter) -> None:
        """rows: those of `ids`, perhaps shared by two modules as the weight is."""
        super().__init__()
        self.weight, self.rows = weight, rows
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def whole(self) -> Tensor:
        """The weight (V, C) with its rows as they are now."""
        return self.weight.index_copy(0, self.ids, self.rows)


class LearnedEmbedding(LearnedRows):
    """In place of an nn.Embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., C)."""
        return F.embedding(ids, self.whole())


class LearnedHead(LearnedRows):
    """In place of a Head."""

    def forward(self, hidden: Tensor, *how: Any, **named: Any) -> Any:
        """See Head."""
        return predict(hidden, self.whole(), *how, **named)


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
        parameter.requires_grad = "lora_" in name or name.endswith((".rows", "score.weight"))


def learn_rows(model: GPT | RewardModel, ids: Sequence[int]) -> None:
    """Let these rows of the embedding learn, and of the head: the same ones where it is tied."""

    def rows_of(weight: Tensor) -> nn.Parameter:
        """A copy of them."""
        return nn.Parameter(weight.detach()[ids].clone())

    weight = model.trunk.wte.weight
    rows = rows_of(weight)
    model.trunk.wte = LearnedEmbedding(weight, ids, rows)
    if isinstance(model, GPT):
        own = rows if model.config.tie_embeddings else rows_of(model.head.weight)
        model.head = LearnedHead(model.head.weight, ids, own)


def learned_rows(model: nn.Module) -> dict[str, LearnedRows]:
    """{name: module} of those of whose weights some rows learn."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LearnedRows)}


def merged_state(model: GPT | RewardModel) -> dict[str, Tensor]:
    """The model's weights under their plain names, adapters added in: what `publish` writes."""
    full = model.state_dict()
    names = [name for name in full if "lora_" not in name and not name.endswith(".rows")]
    plain = {name: full[name] for name in names}
    state = {name.replace(".base_layer", ""): tensor for name, tensor in plain.items()}
    if len(state) == len(full):
        return state
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LearnedRows):
            state[f"{name}.weight"] = module.whole().detach()
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + module.get_delta_weight("default").to(weight.dtype)
    return state
