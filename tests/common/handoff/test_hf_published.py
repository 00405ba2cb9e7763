"""Our directories opened by transformers with no code of ours: equal logits, scores, ids and text;
bit-exact round trips."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.handoff.hf import export_weights
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.sample import sample
from common.rewards.scoring import reward_scores
from common.text.chat import prompt_ids, render

pytestmark = pytest.mark.heavy  # transformers' models take long to import

LOCAL = {"attention_pattern": ("full", "local"), "window": 5}
families = pytest.mark.parametrize("family", ["gpt2", "llama"])


def some_ids(rows: int, length: int, vocab: int) -> torch.Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "more",
    [{}, LOCAL, {"attention_bias": False, "mlp_bias": False}],
    ids=["full", "local", "no biases"],
)
@families
@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_of_our_directory_is_bit_exact(
    tiny_gpt, tiny_reward, stage_dir, family, tie, more
):
    more = more | {
        "n_head": 2
    }  # gpt_neo's queries are stored divided by the root of the head width: exact for 16, 64, 256
    for model, kind in (
        (tiny_gpt(family, tie_embeddings=tie, **more), "lm"),
        (tiny_reward(family, shift=1.3, tie_embeddings=tie, **more), "reward"),
    ):
        again = load_model(stage_dir(model), kind)
        assert again.config == model.config
        before, after = model.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family, kind", [("gpt2", "gpt_neo"), ("llama", "ministral")])
@torch.no_grad()
def test_local_layers_are_handed_on_in_a_family_that_has_them(
    tiny_gpt, tiny_reward, stage_dir, tokenizer, family, kind
):
    model = tiny_gpt(family, tie_embeddings=False, **LOCAL)
    folder = stage_dir(model)
    theirs, auto = (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    assert theirs.config.model_type == kind
    messages = [{"role": "user", "content": "What is two plus three?"}]
    ids = auto.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = theirs.generate(**ids, do_sample=False, max_new_tokens=15)[0, ids["input_ids"].shape[1] :]
    prompt = prompt_ids(tokenizer, messages)
    assert (
        sample(model, [prompt], max_new_tokens=15, temperature=0, stop_ids=[tokenizer.eot_id])[
            0
        ].ids
        == out.tolist()
    )
    judge = tiny_reward(family, **LOCAL)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(stage_dir(judge))
    rows, lengths = some_ids(2, 30, 290), torch.tensor([30, 30])
    assert (theirs(rows).logits[:, 0] - judge(rows, lengths)).abs().max() < 1e-4


@families
def test_tied_weights_are_stored_once(tiny_gpt, stage_dir, family):
    for tie in (True, False):
        model = tiny_gpt(family, tie_embeddings=tie)
        stored = load_file(Path(stage_dir(model)) / "model.safetensors")
        assert ("lm_head.weight" in stored) == (not tie)
        assert sum(tensor.numel() for tensor in stored.values()) == sum(
            p.numel() for p in model.parameters()
        )
        assert stored.keys() == export_weights(model).keys()
        again = load_model(stage_dir(model))
        assert (again.head.weight is again.trunk.wte.weight) == tie


@pytest.mark.parametrize(
    "settings",
    [
        {"family": "gpt2"},
        {"family": "gpt2", "tie_embeddings": False, "n_inner": 48},
        {"family": "llama"},
        {
            "family": "llama",
            "tie_embeddings": False,
            "n_kv_head": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_theta": 77.0,
        },
        {"family": "gpt2", "attention_bias": False},
        {"family": "gpt2", "attention_bias": False, "mlp_bias": False, "tie_embeddings": False},
        {"family": "gpt2", "n_head": 2, **LOCAL},
        {
            "family": "gpt2",
            "mlp_bias": False,
            "tie_embeddings": False,
            "attention_pattern": ("local",),
            "window": 9,
        },
        {"family": "llama", **LOCAL},
        {"family": "llama", "n_kv_head": 1, "tie_embeddings": False, "n_layer": 3, **LOCAL},
    ],
    ids=str,
)
@torch.no_grad()
def test_automodel_opens_a_language_model(tiny_gpt, stage_dir, tokenizer, settings):
    model = tiny_gpt(**settings)
    folder = stage_dir(model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = some_ids(3, 64, 300)
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (
        tokenizer.eot_id,
        tokenizer.pad_id,
    )
    assert (auto.eos_token_id, auto.pad_token_id, auto.model_max_length) == (
        tokenizer.eot_id,
        tokenizer.pad_id,
        64,
    )
    assert theirs.generation_config.eos_token_id == tokenizer.eot_id


@families
def test_greedy_generate_gives_our_text(tiny_gpt, stage_dir, tokenizer, family):
    model = tiny_gpt(family, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight[tokenizer.eot_id] *= 2.5  # so that some answers end
    folder = stage_dir(model)
    theirs, auto = (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    stopped = set()
    for text in (
        "What is two plus three?",
        "Name an animal.",
        "the river",
        "x",
        "17 + 4",
        "Yes!",
        "good day",
        "old town",
    ):
        messages = [{"role": "user", "content": text}]
        ids = auto.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert ids["input_ids"][0].tolist() == prompt_ids(tokenizer, messages)
        out = theirs.generate(**ids, do_sample=False, max_new_tokens=15)[
            0, ids["input_ids"].shape[1] :
        ]
        ours = sample(
            model,
            [prompt_ids(tokenizer, messages)],
            max_new_tokens=15,
            temperature=0,
            stop_ids=[tokenizer.eot_id],
        )[0]
        assert ours.ids == out.tolist()
        assert tokenizer.decode(ours.ids) == auto.decode(out, skip_special_tokens=True)
        stopped.add(ours.stopped)
    assert stopped == {True, False}


def test_apply_chat_template_gives_our_ids_and_mask(tiny_gpt, stage_dir, tokenizer):
    auto = transformers.AutoTokenizer.from_pretrained(stage_dir(tiny_gpt("llama")))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 2+3?\n"},
        {"role": "assistant", "content": "Five."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": " Yes.\n"},
    ]
    got = auto.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    rendered = render(tokenizer, messages)
    assert (got["input_ids"], got["assistant_masks"]) == (rendered.ids, rendered.mask)
    supervised = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    assert (
        tokenizer.decode(supervised, skip_control=False) == "Five.<|endoftext|> Yes.\n<|endoftext|>"
    )


@families
@pytest.mark.parametrize("shift", [0.0, -1.625])
@torch.no_grad()
def test_automodel_opens_a_reward_model(tiny_reward, stage_dir, tokenizer, family, shift):
    model = tiny_reward(family, shift=shift)
    folder = stage_dir(model)
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == 1 and theirs.config.score_shift == shift
    texts = ["What is two plus three? Five.", "river", "It's a good day, isn't it? Yes, it is"]
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    batch = auto(texts, padding=True, return_tensors="pt")
    rows = [tokenizer.encode(text) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    assert [ids[:n].tolist() for ids, n in zip(batch["input_ids"], lengths, strict=True)] == rows
    expected = theirs(**batch).logits[:, 0] - shift
    assert expected.std() > 0.1
    assert (model(batch["input_ids"], lengths) - expected).abs().max() < 1e-4
    assert reward_scores(load_model(folder, "reward"), rows, batch_size=2) == pytest.approx(
        expected.tolist(), abs=1e-4
    )


def test_only_ours_carry_a_chat_template_when_chat(tiny_gpt, stage_dir, tokenizer, tmp_path):
    base = type(tokenizer).train_bpe(["a plain base model's text, a plain text"] * 3, 265)
    folder = stage_dir(tiny_gpt("llama", vocab_size=265), base)
    assert not load_tokenizer(folder).chat
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None


@families
def test_published_model_trains_on_in_transformers(tiny_gpt, stage_dir, tmp_path, family):
    """There and back: theirs loads ours, changes it, saves it; we read that."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stage_dir(tiny_gpt(family)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path)
    ids = some_ids(2, 20, 300)
    with torch.no_grad():
        assert (load_model(str(tmp_path))(ids) - theirs(ids).logits).abs().max() < 1e-4
