"""The SFT stage: exactly the assistant's text and its end token are learned, and no row is lost in
silence."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.sample import sample
from common.program.errors import InputError
from common.rows.sources import BadRows, Row, read_rows
from common.text.chat import prompt_ids, render, rows_to_messages
from common.text.tokenizer import _BYTE_OF, Tokenizer
from common.train.run import Run
from stages.sft.train import (
    Config,
    Example,
    Heldout,
    cut,
    evaluate,
    gate_of,
    loss,
    main,
    parse,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


PAIRS = [
    ("Name an animal.", "The fox is an animal."),
    ("What is two plus three?", "Five."),
    ("Where is the bird?", "In the old town, by the river."),
    ("Say <|user|>.", "<|endoftext|> is text."),
]


@pytest.fixture
def demonstrations(tmp_path):
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    return str(file)


@pytest.fixture
def setting(tmp_path, tiny_gpt, stage_dir, demonstrations):
    def make(family="llama", **keys) -> Config:
        defaults = {
            "parent": stage_dir(tiny_gpt(family, seed=1)),
            "train_data": demonstrations,
            "eval_data": demonstrations,
            "output_dir": str(tmp_path / "sft"),
            "mixed_precision": "no",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 60,
            "learning_rate": 1e-2,
            "samples": 2,
            "sample_tokens": 12,
        }
        return Config(**defaults | keys)

    return make


def tokenize(rows, tokenizer, max_length):
    return cut([row._replace(parsed=parse(tokenizer, row.data)) for row in rows], max_length)


def supervised(example: Example) -> list[int]:
    return [token for token, kept in zip(example.ids, example.mask, strict=True) if kept]


def test_supervised_ids_are_the_answer_and_its_end_token(tokenizer):
    rows = [Row({"prompt": p, "completion": c}, f"x:{n}") for n, (p, c) in enumerate(PAIRS)]
    examples, counts = tokenize(rows, tokenizer, 200)
    for (prompt, answer), example in zip(PAIRS, examples, strict=True):
        assert supervised(example) == [*tokenizer.encode(answer), tokenizer.eot_id]
        start = [
            tokenizer.role_ids["user"],
            *tokenizer.encode(prompt),
            tokenizer.role_ids["assistant"],
        ]
        assert example.ids == start + supervised(example)
        assert example.ids.count(tokenizer.eot_id) == 1  # the one that the renderer wrote
    total = sum(len(tokenizer.encode(answer)) + 1 for _, answer in PAIRS)
    assert counts == {"rows": 4, "truncated": 0, "dropped": 0, "supervised_tokens": total}


def test_every_answer_of_a_conversation_and_alpaca_columns(tokenizer):
    talk = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "A river?"),
        ("assistant", "The wide one."),
    ]
    rows = [
        Row({"messages": [{"role": role, "content": text} for role, text in talk]}, "a:1"),
        Row({"instruction": "Add them.", "input": "two, three", "output": "five"}, "a:2"),
        Row({"instruction": "Go on", "input": "", "output": "ok"}, "a:3"),
    ]
    (first, second, third), _ = tokenize(rows, tokenizer, 200)
    eot = [tokenizer.eot_id]
    assert (
        supervised(first)
        == tokenizer.encode("Yes?") + eot + tokenizer.encode("The wide one.") + eot
    )
    assert supervised(second) == tokenizer.encode("five") + eot
    assert tokenizer.decode(second.ids) == "Add them.\n\ntwo, threefive"
    assert tokenizer.decode(third.ids) == "Go onok"


def test_truncated_and_dropped_rows_are_counted(tokenizer):
    long = "The red fox and the blue bird went to the old town. " * 3
    rows = [
        Row({"prompt": "Hi", "completion": "Yes"}, "a:1"),
        Row({"prompt": "Hi", "completion": long}, "a:2"),
        Row({"prompt": long, "completion": "Yes"}, "a:3"),  # nothing of the answer is left
    ]
    examples, counts = tokenize(rows, tokenizer, 20)
    assert len(examples) == 2
    assert (counts["rows"], counts["truncated"], counts["dropped"]) == (2, 2, 1)
    assert len(examples[1].ids) == len(examples[1].mask) == 20
    front = 2 + len(tokenizer.encode("Hi"))
    assert (
        supervised(examples[1]) == tokenizer.encode(long)[: 20 - front]
    )  # cut: no end token is made up
    assert counts["supervised_tokens"] == len(tokenizer.encode("Yes")) + 1 + 20 - front
    with pytest.raises(InputError, match="max_length"):
        tokenize(rows[2:], tokenizer, 20)


def test_a_bad_row_is_named_by_file_and_line(tokenizer, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(
        json.dumps({"prompt": "Hi", "completion": "Yes"})
        + "\n\n"
        + json.dumps({"prompt": "Hi", "answer": "x"})
        + "\n"
    )
    with pytest.raises(InputError, match=r"bad\.jsonl:3: .*answer, prompt"):
        read_rows(str(file), partial(parse, tokenizer))


def test_answers_that_people_call_bad_are_not_imitated(tokenizer, tmp_path):
    rows = [{"prompt": "Hi", "completion": "Yes", "label": label} for label in (True, False, None)]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, bad = str(tmp_path / "kto.jsonl"), BadRows("skip")
    assert len(read_rows(source, partial(parse, tokenizer), bad)) == 2
    assert bad.counts == {"label false": 1}
    with pytest.raises(InputError, match=r"kto\.jsonl:2: label false"):
        read_rows(source, partial(parse, tokenizer))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_equals_brute_force_on_ragged_rows(family, tokenizer, tiny_gpt):
    model = tiny_gpt(family)
    examples = [
        Example([7, 8, 9, 10], [0, 0, 1, 1]),
        Example([5, 6], [0, 1]),
        Example([1, 2, 3, 4, 5, 6], [0, 1, 1, 0, 0, 1]),
    ]
    expected, count = 0.0, 0
    with torch.no_grad():
        for ids, mask in examples:
            for t in range(1, len(ids)):
                if mask[t]:
                    expected -= float(
                        torch.log_softmax(model(torch.tensor([ids[:t]]))[0, -1].double(), -1)[
                            ids[t]
                        ]
                    )
                    count += 1
        found, tokens = loss(model, examples, tokenizer.pad_id, torch.device("cpu"))
        shown, _ = loss(model, examples, 0, torch.device("cpu"))
    assert tokens == count == 6
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(found) == pytest.approx(float(shown), rel=1e-6)  # whatever pads


def test_evaluation_is_a_mean_over_tokens_whatever_the_batch(tokenizer, tiny_gpt, setting):
    model = tiny_gpt()
    examples = [
        Example(list(range(n)), [0] * (n // 2) + [1] * (n - n // 2)) for n in (4, 30, 5, 12, 6)
    ]
    cfg = setting()
    run = Run(cfg, "sft", "lm")
    found = [evaluate(run, model, examples, size, tokenizer).loss for size in (1, 2, 5)]
    summed, count = loss(model, examples, tokenizer.pad_id, torch.device("cpu"))
    assert found == pytest.approx([float(summed.detach()) / count] * 3, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_learns_the_answers_and_where_they_stop(family, setting, capsys):
    cfg = setting(family, max_steps=60, lr_scheduler_type="linear", max_grad_norm=10.0)
    main(cfg)
    said = capsys.readouterr().out
    assert "gate sft: PASS" in said
    assert "The fox is an animal." in said or "Five." in said  # the first example is printed
    model, tokenizer = load_model(cfg.output_dir), load_tokenizer(cfg.output_dir)
    assert tokenizer.chat
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt, _ in PAIRS]
    answers = sample(model, prompts, max_new_tokens=40, temperature=0, stop_ids=[tokenizer.eot_id])
    assert [tokenizer.decode(answer.ids) for answer in answers] == [answer for _, answer in PAIRS]
    assert all(answer.stopped for answer in answers)
    with open(f"{cfg.output_dir}/samples.jsonl") as file:  # noqa: PTH123
        samples = [json.loads(line) for line in file]
    assert [row["prompt"] for row in samples] == [prompt for prompt, _ in PAIRS[:2]]
    assert {"sample", "stopped", "step"} <= samples[0].keys()


def log(cfg: Config, name: str = "metrics.jsonl") -> list[dict]:
    with open(f"{cfg.output_dir}/{name}") as file:  # noqa: PTH123
        return [json.loads(line) for line in file]


def weights(cfg: Config) -> dict[str, torch.Tensor]:
    return load_file(f"{cfg.output_dir}/model.safetensors")


def test_accumulation_changes_nothing_but_memory(setting, tmp_path):
    runs = [
        setting(
            output_dir=str(tmp_path / f"{micro}"),
            per_device_train_batch_size=micro,
            logging_steps=1,
            gradient_accumulation_steps=4 // micro,
        )
        for micro in (4, 1)
    ]
    for cfg in runs:
        main(cfg)
        before, first, *_ = log(cfg)
        assert first["loss"] == pytest.approx(
            before["eval_loss"], rel=1e-5
        )  # the same rows, and nothing learned yet
    assert log(runs[0])[1]["grad_norm"] == pytest.approx(log(runs[1])[1]["grad_norm"], rel=1e-4)
    whole, parts = map(weights, runs)
    start = load_file(f"{runs[0].parent}/model.safetensors")
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-2
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-4


def test_held_out_tail_is_not_trained_on(setting, demonstrations, monkeypatch):
    from stages.sft import train

    seen = []
    real = train.answer_logprobs  # what training and evaluation both go through
    monkeypatch.setattr(
        train,
        "answer_logprobs",
        lambda model, rows, *rest: (
            seen.append((torch.is_grad_enabled(), rows)),
            real(model, rows, *rest),
        )[1],
    )
    cfg = setting(eval_data=None, eval_fraction=0.25, per_device_train_batch_size=3, max_steps=1)
    main(cfg)
    trained = {tuple(example.ids) for learning, rows in seen if learning for example in rows}
    tested = {tuple(example.ids) for learning, rows in seen if not learning for example in rows}
    assert (len(trained), len(tested)) == (3, 1)
    assert not trained & tested
    stage = json.loads(open(f"{cfg.output_dir}/stage.json").read())  # noqa: PTH123, SIM115
    assert (stage["data"]["train"]["rows"], stage["data"]["eval"]["rows"]) == (3, 1)
    assert stage["parent"] == cfg.parent


def test_lora_is_published_merged_with_the_adapter_beside(setting):
    cfg = setting(lora_r=2, lora_targets=["qkv"], max_steps=3)
    main(cfg)
    start, end = load_file(f"{cfg.parent}/model.safetensors"), weights(cfg)
    changed = {name.split(".")[-2] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}
    adapter = load_file(f"{cfg.output_dir}/adapter/adapter_model.safetensors")
    assert adapter["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (
        2,
        32,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_lora_learns_the_rows_that_a_foreign_base_lacks(tied, setting, tiny_gpt, stage_dir):
    """A base of bytes alone: all five control tokens are new."""
    model = {"type": "BPE", "vocab": {char: i for i, char in enumerate(_BYTE_OF)}, "merges": []}
    own_regex = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    foreign = Tokenizer(model, own_regex, control=False)
    base = stage_dir(tiny_gpt("gpt2", vocab_size=256, tie_embeddings=tied), foreign)
    cfg = setting(parent=base, lora_r=8, max_steps=80, learning_rate=3e-2, max_grad_norm=10.0)
    main(cfg)
    tokenizer, trained = load_tokenizer(cfg.output_dir), load_model(cfg.output_dir)
    parent = load_model(base)
    for ours, theirs in ((trained.trunk.wte, parent.trunk.wte), (trained.head, parent.head)):
        assert torch.equal(ours.weight[:256], theirs.weight)  # the others are frozen
        assert len(ours.weight[256:].unique(dim=0)) == 5
    rows = [render(tokenizer, rows_to_messages({"prompt": p, "completion": c})) for p, c in PAIRS]
    with torch.no_grad():
        logits = [trained(torch.tensor([ids[:-1]]))[0, -1] for ids, _ in rows]
    stops = [float(at_end.softmax(-1)[tokenizer.eot_id]) for at_end in logits]
    assert sum(stops) / len(stops) > 0.5
    stage = json.loads(open(f"{cfg.output_dir}/stage.json").read())  # noqa: PTH123, SIM115
    assert stage["gate"]["passed"]
    assert stage["metrics"]["eval_stop"] == pytest.approx(sum(stops) / len(stops), abs=1e-3)


def test_the_gate_fails_where_the_end_was_not_learned():
    learned, unlearned = Heldout(1.0, 0.3), Heldout(1.0, 0.2)
    assert gate_of(2.0, learned, 0, None, 9).passed
    assert not gate_of(1.0, learned, 0, None, 9).passed
    gate = gate_of(2.0, unlearned, 0, None, 9)
    assert not gate.passed and "end token 20% likely" in gate.text


def test_lora_wants_a_parent(setting, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="lora_r 2: a new model has no weights worth freezing"):
        main(setting(parent=None, tokenizer=str(tmp_path / "tokenizer"), lora_r=2))


def test_a_new_model_learns_to_answer_exactly(setting, tmp_path, tokenizer, capsys):
    """The rows are answered to the letter; one row whose answer nobody can guess is the one mistake
    that is listed."""
    tokenizer.save(tmp_path / "tokenizer")
    rows = [{"prompt": f"{n}?", "completion": "xyz"[n % 3] * 2} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "8?", "completion": "no"}])
    )
    keys = {
        "train_data": str(tmp_path / "rows.jsonl"),
        "eval_data": str(tmp_path / "eval.jsonl"),
        "eval_exact_match": True,
    }
    cfg = setting(
        parent=None,
        tokenizer=str(tmp_path / "tokenizer"),
        preset="gpt-nano",
        n_layer=1,
        max_steps=150,
        eval_steps=75,
        per_device_train_batch_size=9,
        **keys,
    )
    main(cfg)
    rows = log(cfg)
    assert [row["exact_match"] for row in rows if "exact_match" in row][-1] == pytest.approx(0.9)
    mistakes = log(cfg, "mistakes.jsonl")
    assert mistakes == [{"prompt": "8?", "wanted": "no", "answer": "zz", "stopped": True}]
    said = capsys.readouterr().out
    assert "1 of 10 held-out answers are not exact" in said
    assert "90.00% of 10 held-out answers exact" in said
    model = load_model(cfg.output_dir)
    assert (model.config.family, model.config.n_layer, model.config.n_embd) == ("gpt2", 1, 48)
    with pytest.raises(InputError, match="a new model needs a tokenizer"):
        main(setting(parent=None))


def test_mistakes_are_told(setting):
    with pytest.raises(InputError, match="context is 64"):
        main(setting(max_length=100))
    with pytest.raises(ValueError, match="max_steps and num_train_epochs are both null"):
        setting(max_steps=None)


def test_max_steps_wins_over_epochs(setting):
    cfg = setting(max_steps=3, num_train_epochs=50.0)
    main(cfg)
    assert log(cfg)[-1]["step"] == 3


def test_mistakes_of_rows_are_told(setting):
    with pytest.raises(InputError, match="max_length"):
        main(setting(max_length=3))
