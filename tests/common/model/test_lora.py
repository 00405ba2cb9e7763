"""Adapters: start as nothing, train alone, merge into the same function, and peft opens them over
transformers' parent."""

import json

import pytest
import torch
import transformers

from common.handoff.adapter import save_adapter
from common.handoff.hf import theirs
from common.handoff.publish import load_model, publish
from common.model.lora import add_lora, learned_rows, merged_state
from common.program.errors import InputError
from common.text.tokenizer import Tokenizer

ALL = ["qkv", "out", "up", "down"]
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
IDS = torch.randint(0, 290, (3, 25), generator=torch.Generator().manual_seed(4))
LENGTHS = torch.tensor([25, 9, 1])


def with_adapters(model, targets, r=3, alpha=12.0, seed=1):
    """`model` with adapters whose B is not zero."""
    add_lora(model, r, alpha, targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@families
@torch.no_grad()
def test_new_adapters_change_nothing(tiny_gpt, family):
    model = tiny_gpt(family)
    before = model(IDS)
    add_lora(model, 4, 8.0, ALL)
    assert torch.equal(model(IDS), before)


@families
@torch.no_grad()
def test_injected_model_is_the_formula(tiny_gpt, family):
    """Each target's weight is W + alpha / r * B A, written out by hand into a plain model."""
    model, plain = with_adapters(tiny_gpt(family), ALL), tiny_gpt(family)
    parts = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(parts) == 2 * 4 * 2  # layers x targets x (A, B)
    for name, weight in plain.named_parameters():
        a = parts.get(name.removesuffix("weight") + "lora_A.default.weight")
        b = parts.get(name.removesuffix("weight") + "lora_B.default.weight")
        if a is not None:
            assert a.shape[0] == b.shape[1] == 3
            weight += 12.0 / 3 * b @ a
    assert (model(IDS) - tiny_gpt(family)(IDS)).abs().max() > 0.1
    assert (model(IDS) - plain(IDS)).abs().max() < 1e-3
    trained = model.train()(IDS)  # adapters have no dropout of their own
    assert (trained - plain(IDS)).abs().max() < 1e-3


@families
@pytest.mark.parametrize("targets", [ALL, ["qkv"], ["down", "up"]], ids=str)
@torch.no_grad()
def test_merged_equals_injected(tiny_gpt, tiny_reward, tokenizer, tmp_path, family, targets):
    model, plain = with_adapters(tiny_gpt(family), targets), tiny_gpt(family, seed=7)
    expected = model(IDS)
    assert merged_state(model).keys() == plain.state_dict().keys()
    plain.load_state_dict(merged_state(model))
    assert (plain(IDS) - expected).abs().max() < 1e-3 * expected.abs().max()
    publish(tmp_path, model, tokenizer, {}, weights=merged_state(model))
    assert torch.equal(load_model(str(tmp_path))(IDS), plain(IDS))
    assert torch.equal(model(IDS), expected)  # the model itself was not touched
    reward = with_adapters(tiny_reward(family, shift=0.5), targets)
    again = tiny_reward(family, seed=7)
    again.load_state_dict(merged_state(reward))
    assert (again(IDS, LENGTHS) - reward(IDS, LENGTHS)).abs().max() < 1e-3


@families
def test_only_adapters_and_the_reward_head_learn(tiny_gpt, tiny_reward, family):
    for make, extra in ((tiny_gpt, set()), (tiny_reward, {"score.weight"})):
        model = make(family)
        add_lora(model, 2, 4.0, ["qkv", "down"])
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in learning if "lora_" not in name} == extra
        assert len(learning - extra) == 2 * 2 * 2
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):  # A only gets a gradient once B has left zero
            out = model(IDS) if not extra else model(IDS, LENGTHS)
            out.square().mean().backward()
            optimizer.step()
        changed = {
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, before[name])
        }
        assert changed == learning


@pytest.mark.parametrize("target", ["head", "score", "q_proj", "wte", "norm1", "mlp.up", ""])
def test_unknown_target_is_refused(tiny_gpt, tiny_reward, target):
    for make in (tiny_gpt, tiny_reward):
        with pytest.raises(InputError) as error:
            add_lora(make("llama"), 2, 4.0, ["qkv", target])
        assert repr(target) in str(error.value) and "down, out, qkv, up" in str(error.value)


def test_no_target_is_refused(tiny_gpt):
    with pytest.raises(InputError, match="lora_targets"):
        add_lora(tiny_gpt("llama"), 2, 4.0, [])


@families
@pytest.mark.parametrize("targets", [ALL, ["qkv"], ["out"], ["up", "down"]], ids=str)
@torch.no_grad()
def test_peft_opens_the_adapter_over_transformers_parent(
    peft, tiny_gpt, tokenizer, stage_dir, tmp_path, family, targets
):
    parent = stage_dir(tiny_gpt(family))
    model = with_adapters(load_model(parent), targets, r=4, alpha=6.0)
    save_adapter(model, tmp_path / "adapter", parent, 4, 6.0, tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(parent)
    assert (base(IDS).logits - model(IDS)).abs().max() > 0.1
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (opened(IDS).logits - model(IDS)).abs().max() < 1e-4 * model(IDS).abs().max()
    merged = opened.merge_and_unload()
    assert (merged(IDS).logits - model(IDS)).abs().max() < 1e-3 * model(IDS).abs().max()
    names = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert names["base_model_name_or_path"] == parent and names["task_type"] == "CAUSAL_LM"


@families
@torch.no_grad()
def test_peft_opens_a_reward_model_s_adapter(
    peft, tiny_reward, tokenizer, stage_dir, tmp_path, family
):
    parent = stage_dir(tiny_reward(family, shift=0.25))
    model = with_adapters(load_model(parent, "reward"), ALL)
    model.score.weight.mul_(-1.5)  # the head was trained too
    save_adapter(model, tmp_path / "adapter", parent, 3, 12.0, tokenizer)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(parent)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = IDS.clone()
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = 296  # <|pad|>
    expected = opened(ids).logits[:, 0] - 0.25
    assert (model(ids, LENGTHS) - expected).abs().max() < 1e-3


@families
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_peft_opens_learned_rows_over_a_parent_without_them(
    peft, tiny_gpt, tokenizer, stage_dir, tmp_path, family, tied
):
    """The parent has 297 ids, the tokenizer 300; one of the rows that learn is the parent's."""
    foreign = Tokenizer.characters(["abc"], control=False)
    parent = stage_dir(tiny_gpt(family, vocab_size=297, tie_embeddings=tied), foreign)
    model = load_model(parent)
    new = model.resize_vocabulary(300)
    learned = [295, *new]
    add_lora(model, 4, 6.0, ALL, learned)
    before = model(IDS)
    for rows in learned_rows(model).values():
        rows.rows.add_(torch.randn(rows.rows.shape))
    ids = torch.cat([IDS, torch.tensor([learned] * 3)], dim=1)
    expected = model(ids)
    assert (model(IDS)[..., 295:] - before[..., 295:]).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter", parent, 4, 6.0, tokenizer)
    plain = tiny_gpt(family, seed=7, tie_embeddings=tied)
    plain.load_state_dict(merged_state(model))
    assert torch.equal(plain(ids), expected)

    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(parent)
    with pytest.raises(IndexError):  # forgotten, it does not pass unnoticed
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids)
    base = transformers.AutoModelForCausalLM.from_pretrained(parent)
    base.resize_token_embeddings(300)
    by_hand = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for one in (opened, by_hand, by_hand.merge_and_unload()):
        assert (one(ids).logits - expected).abs().max() < 1e-3 * expected.abs().max()


@families
@pytest.mark.parametrize("tied", [True, False])
def test_only_the_rows_named_learn(tiny_gpt, family, tied):
    model = tiny_gpt(family, tie_embeddings=tied)
    before = {name: weight.clone() for name, weight in merged_state(model).items()}
    add_lora(model, 2, 4.0, ["qkv"], [3, 299])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name in learning if "lora_" not in name}
    assert len(others) == (1 if tied else 2) and all(name.endswith(".rows") for name in others)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.1)
    model(IDS, targets=IDS).sum().backward()
    optimizer.step()
    after = merged_state(model)
    for name in ("trunk.wte.weight", "head.weight"):
        changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert changed == [3, 299] or (name == "trunk.wte.weight" and changed == [3])
    tied_now = torch.equal(after["trunk.wte.weight"], after["head.weight"])
    assert tied_now == tied


@families
def test_targets_stand_for_transformers_layers(tiny_gpt, family):
    """Literal names: what their documentation calls these matrices."""
    config = tiny_gpt(family).config
    names = {
        part: theirs(f"trunk.blocks.1.{part}", config)[0]
        for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    if family == "gpt2":
        expected = {
            "attn.qkv": ["attn.c_attn"],
            "attn.out": ["attn.c_proj"],
            "mlp.up": ["mlp.c_fc"],
            "mlp.down": ["mlp.c_proj"],
        }
        assert names == {
            part: [f"transformer.h.1.{name}" for name in found] for part, found in expected.items()
        }
    else:
        q, k, v, o = (f"model.layers.1.self_attn.{letter}_proj" for letter in "qkvo")
        gate, up, down = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
        assert names == {
            "attn.qkv": [q, k, v],
            "attn.out": [o],
            "mlp.up": [gate, up],
            "mlp.down": [down],
        }
