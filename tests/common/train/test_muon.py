"""Muon beside AdamW in one optimizer: PyTorch's own two are the yardstick, to the bit. Under ZeRO:
test_placement.py."""

import copy

import pytest
import torch

from common.train.muon import muon, orthogonal
from common.train.optimizers import adamw, parameter_groups, set_learning_rate

LAYERS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")


def test_muon_gets_the_matrices_of_the_blocks(tiny_gpt, tiny_reward):
    for model, outer in (
        (
            tiny_gpt("llama", tie_embeddings=False),
            {"trunk.wte.weight", "trunk.norm.weight", "head.weight"},
        ),
        (
            tiny_reward("gpt2"),
            {
                "trunk.wte.weight",
                "trunk.wpe.weight",
                "trunk.norm.weight",
                "trunk.norm.bias",
                "score.weight",
            },
        ),
    ):
        names = {id(p): name for name, p in model.named_parameters()}
        matrices, rest = set(), set()
        for group in muon(model, 0.02, 0.01, 0.0).param_groups:
            (matrices if "shape" in group else rest).update(names[id(p)] for p in group["params"])
            assert group["lr"] == group["peak_lr"] == (0.02 if "shape" in group else 0.01)
        assert matrices == {f"trunk.blocks.{n}.{layer}.weight" for n in (0, 1) for layer in LAYERS}
        assert outer <= rest and matrices | rest == set(names.values()) and not matrices & rest


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_torch_s_muon_beside_torch_s_adamw(tiny_gpt, family):
    model = tiny_gpt(family)
    yardstick = copy.deepcopy(model)
    ours = muon(model, 0.02, 1e-3, 0.1, beta2=0.95)
    named = list(yardstick.named_parameters())
    matrices = [p for name, p in named if ".blocks." in name and p.dim() == 2]
    rest = [p for _, p in named if not any(p is matrix for matrix in matrices)]
    theirs = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        adamw(parameter_groups(rest, 1e-3, 0.1), beta2=0.95),
    ]
    for step in range(4):
        ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(step))
        for net in (model, yardstick):
            net.zero_grad()
            torch.nn.functional.cross_entropy(
                net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
            ).backward()
        for optimizer in (ours, *theirs):
            optimizer.step()
    moved = 0.0
    for (name, p), (_, q) in zip(model.named_parameters(), named, strict=True):
        assert torch.equal(p, q), name
        moved = max(moved, float((p - tiny_gpt(family).get_parameter(name)).detach().abs().max()))
    assert moved > 0.01


def test_a_state_that_was_saved_goes_on_to_the_bit(tiny_gpt):
    one, other = tiny_gpt("llama"), tiny_gpt("llama")
    first, second = muon(one, 0.02, 1e-3, 0.1), muon(other, 0.02, 1e-3, 0.1)

    def step(net, optimizer, seed):
        ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
        set_learning_rate(optimizer, 0.5)
        net.zero_grad()
        net(ids).square().sum().backward()
        optimizer.step()

    step(one, first, 0)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in ((one, first), (other, second)):
        step(net, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_the_iterations_bring_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    other = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(torch.stack([matrix, other]), torch.float32)[0]  # each matrix on its own
    assert torch.allclose(found, orthogonal(matrix[None], torch.float32)[0], atol=1e-6)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (u.T @ found @ v.T).diagonal().min() > 0.6  # the same singular vectors
