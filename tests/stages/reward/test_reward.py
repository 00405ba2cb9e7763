"""The reward stage: the comparison loss against plain Python, formats, the origin of the scale, and
the hand-off."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.gpt import RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.rows.sources import Row
from common.text.chat import prompt_ids
from common.text.comparisons import ranked
from common.train import run as run_module
from stages.reward import train
from stages.reward.loss import accuracy_by_margin, comparison_loss, ranked_pairs
from stages.reward.train import (
    Comparison,
    Config,
    accuracy,
    blank,
    collate,
    main,
    paired,
    set_origin,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def tokenize(rows, tokenizer, max_length):
    return paired([row._replace(parsed=ranked(tokenizer, row.data)) for row in rows], max_length)


def surprise(gap: float) -> float:
    return math.log(1 + math.exp(-gap))


def test_ranked_pairs():
    assert ranked_pairs([0, 1]) == [(0, 1)]
    assert sorted(ranked_pairs([2, 0, 1])) == [(1, 0), (1, 2), (2, 0)]
    assert sorted(ranked_pairs([1, 0, 1, 0])) == [(1, 0), (1, 2), (3, 0), (3, 2)]  # two ties of six
    assert ranked_pairs([3, 3, 3]) == []


PROMPTS = [
    ([1.0, -0.5, 2.0, 0.25], [1, 2, 0, 1]),
    ([3.0, 1.0], [1, 0]),
]  # (scores, ranks); the second is misjudged


@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.01), (0.3, 0.1)])
def test_k_wise_loss_equals_brute_force(tokenizer, margin, centering):
    expected = 0.0
    for scores, ranks in PROMPTS:
        terms = []
        for a in range(len(scores)):
            for b in range(a):
                if ranks[a] != ranks[b]:
                    good, bad = (
                        (scores[a], scores[b]) if ranks[a] < ranks[b] else (scores[b], scores[a])
                    )
                    terms.append(surprise(good - bad - margin) + centering * (good + bad) ** 2)
        expected += sum(terms) / len(terms)  # every prompt counts once, however many answers it has
    answers = [[f"{n}" for n in range(len(scores))] for scores, _ in PROMPTS]
    rows = [
        Row({"prompt": "Hi", "answers": texts, "ranks": ranks}, "x")
        for texts, (_, ranks) in zip(answers, PROMPTS, strict=True)
    ]
    comparisons, counts = tokenize(rows, tokenizer, 50)
    assert (counts["comparisons"], counts["pairs"]) == (2, 6)
    batch = collate(comparisons, tokenizer.pad_id, torch.device("cpu"))
    scores = torch.tensor([score for scores, _ in PROMPTS for score in scores])
    found = comparison_loss(scores, batch.better, batch.worse, batch.weights, margin, centering)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(batch.weights.sum()) == pytest.approx(2)


def test_a_blank_comparison_counts_for_nothing():
    """A process that is short of rows gets one, alone in a micro-batch or beside others."""
    one = Comparison(rows=[[1, 2], [3]], pairs=[(0, 1)], policy=[])
    alone = collate([blank(one)], 0, torch.device("cpu"))
    scores = torch.tensor([0.5, -0.5], requires_grad=True)
    loss = comparison_loss(scores, alone.better, alone.worse, alone.weights)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]
    beside = collate([one, blank(one)], 0, torch.device("cpu"))
    assert len(beside.ids) == 4
    assert beside.weights.tolist() == [1.0]


def test_ties_and_identical_answers_are_no_pairs_and_nothing_is_lost_silently(tokenizer):
    long = "The red fox and the blue bird went to the old town. " * 3
    rows = [
        Row({"prompt": "Hi", "answers": ["a", "b", "c"], "ranks": [0, 0, 1]}, "x:1"),
        Row({"prompt": "Hi", "answers": ["a", "a", "c"], "ranks": [0, 1, 2]}, "x:2"),
        Row({"prompt": "Hi", "answers": ["a", "b"], "ranks": [1, 1]}, "x:3"),
        Row({"prompt": "Hi", "answers": ["a", long, "c"], "ranks": [0, 1, 2]}, "x:4"),
        Row({"prompt": "Hi", "chosen": long, "rejected": "b"}, "x:5"),
    ]
    comparisons, counts = tokenize(rows, tokenizer, 20)
    assert [sorted(comparison.pairs) for comparison in comparisons] == [
        [(0, 2), (1, 2)],
        [(0, 2), (1, 2)],
        [(0, 1)],
    ]
    assert counts["comparisons"] == 3
    assert counts["pairs"] == 5
    assert counts["identical"] == 1
    assert counts["too_long"] == 2
    assert counts["tied"] == 2  # x:3, and x:5 of which one answer is left
    with pytest.raises(InputError, match="max_length 20"):
        tokenize(rows[2:3], tokenizer, 20)


SYSTEM, HUMAN, GPT = (
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Yes?"},
)
FORMATS = {
    "texts": ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, [("user", "Hi")]),
    "messages": (
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        [("user", "Hi")],
    ),
    "implicit prompt": (
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "good"}],
            "rejected": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "bad"},
            ],
        },
        [("user", "Hi")],
    ),
    "null columns": (  # what a Parquet file with rows of several kinds gives
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
        | dict.fromkeys(("answers", "ranks", "sources", "stopped")),
        [("user", "Hi")],
    ),
    "null prompt": (
        {
            "prompt": None,
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": "good",
            "rejected": "bad",
        },
        [("user", "Hi")],
    ),
    "sharegpt": (
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [("user", "Hi")],
    ),
    "sharegpt turns": (
        {
            "conversations": [SYSTEM, HUMAN, GPT, {"from": "human", "value": "A river?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "A river?")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tokenizer):
    data, prompt = FORMATS[name]
    start = []
    for role, text in prompt:
        start += [
            tokenizer.role_ids[role],
            *tokenizer.encode(text),
            *([tokenizer.eot_id] if role == "assistant" else []),
        ]
    start.append(tokenizer.role_ids["assistant"])
    (comparison,), _ = tokenize([Row(data, "x:1")], tokenizer, 100)
    assert comparison.rows == [
        start + tokenizer.encode("good") + [tokenizer.eot_id],
        start + tokenizer.encode("bad") + [tokenizer.eot_id],
    ]
    assert comparison.pairs == [(0, 1)]


def test_the_answer_is_the_last_message_and_all_before_it_the_prompt(tokenizer):
    talk = [("user", "Hi"), ("assistant", "Yes?"), ("user", "A river?")]
    before = [{"role": role, "content": text} for role, text in talk]
    sides = {
        side: [*before, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "The Elbe."), ("rejected", "no"))
    }
    start = prompt_ids(tokenizer, before)
    assert ranked(tokenizer, sides).answers == [
        [*start, *tokenizer.encode(text), tokenizer.eot_id] for text in ("The Elbe.", "no")
    ]


def test_an_answer_that_was_cut_off_gets_no_end_token(tokenizer):
    row = {
        "prompt": "Hi",
        "answers": ["good", "bad", "ok"],
        "ranks": [0, 1, 2],
        "stopped": [True, False, True],
        "sources": ["reference", "policy", "policy"],
    }
    (comparison,), _ = tokenize([Row(row, "x:1")], tokenizer, 50)
    assert [answer[-1] == tokenizer.eot_id for answer in comparison.rows] == [True, False, True]
    assert comparison.policy == [1, 2]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "Hi", "chosen": "good"}, "rejected"),
        ({"prompt": "Hi", "answers": ["a", "b", "c"], "ranks": [0, 1]}, "3 answers, 2 ranks"),
        (
            {"prompt": "Hi", "answers": ["a", "b"], "ranks": [0, 1], "sources": ["policy"]},
            "sources",
        ),
        ({"prompt": "Hi", "answers": ["a", "b"], "ranks": ["best", 1]}, "ranks"),
        ({"chosen": "good", "rejected": "bad"}, "prompt"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "bad"}, "text"),
    ],
)
def test_bad_rows_are_named(row, complaint, tokenizer):
    with pytest.raises(InputError, match=complaint):
        ranked(tokenizer, row)


def test_accuracy_and_its_interval():
    # Two prompts of two pairs, one of one: right 1, 1; 0, 1/2 (tie); 1. Mean .7.
    gaps, groups = torch.tensor([1.0, 2.0, -1.0, 0.0, 0.5]), torch.tensor([0, 0, 1, 1, 2])
    mean, half = accuracy(gaps, groups)
    assert mean == pytest.approx(0.7)
    # Residuals summed by prompt: .6, -.9, .3; half = 1.96 sqrt(.36 + .81 + .09) / 5
    assert half == pytest.approx(1.96 * math.sqrt(1.26) / 5)
    # One pair a prompt: the binomial interval.
    mean, half = accuracy(torch.tensor([1.0, 1.0, 1.0, -1.0] * 25), torch.arange(100))
    assert (mean, half) == (pytest.approx(0.75), pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 100)))


def test_accuracy_by_margin():
    rows = accuracy_by_margin(torch.tensor([0.1, -0.1, 0.6, 3.0, -4.0, 5.0, 0.0]))
    assert [(bucket, pairs) for bucket, pairs, _, _ in rows] == [
        ("0-0.25", 3),
        ("0.5-1", 1),
        ("2-inf", 3),
    ]
    assert [right for _, _, right, _ in rows] == pytest.approx([0.5, 1.0, 2 / 3])
    claims = [[0.1, 0.1, 0.0], [0.6], [3, 4, 5]]
    expected = [sum(1 / (1 + math.exp(-gap)) for gap in part) / len(part) for part in claims]
    assert [claim for _, _, _, claim in rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_origin_is_the_mean_of_the_given_scores(tokenizer, tiny_reward, shift, normalize):
    model = tiny_reward(shift=shift)
    ids = torch.randint(0, 290, (9, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 3, 7, 1, 5, 12, 9, 2, 4])
    with torch.no_grad():
        before = model(ids, lengths)
        said = set_origin(model, before, normalize)
        after = model(ids, lengths)
    assert said == pytest.approx((float(before.mean()), float(before.std(correction=0))), rel=1e-5)
    assert float(after.mean()) == pytest.approx(0, abs=1e-5)
    std = 1.0 if normalize else float(before.std(correction=0))
    assert float(after.std(correction=0)) == pytest.approx(std, rel=1e-5)
    torch.testing.assert_close(
        after * float(before.std(correction=0)) / std, before - before.mean(), atol=1e-5, rtol=1e-4
    )


def test_score_is_read_at_the_last_real_token(tiny_reward, tokenizer):
    model = tiny_reward(shift=0.5)
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    comparisons = [train.Comparison(rows, [(0, 1)], [])]
    with torch.no_grad():
        alone = [float(model.score(model.trunk(torch.tensor([row])))[0, -1]) - 0.5 for row in rows]
        for pad_id in (tokenizer.pad_id, 0, 77):
            batch = collate(comparisons, pad_id, torch.device("cpu"))
            assert model(batch.ids, batch.lengths).tolist() == pytest.approx(alone, abs=1e-5)


def test_new_head_is_small():
    model = RewardModel(GPTConfig(vocab_size=4, max_length=4, n_layer=0, n_head=8, n_embd=4096))
    assert float(model.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert model.score.bias is None
    assert model.shift == 0


ANSWERS = [
    "The river is cold.",
    "It is a good day.",
    "no",
    "No fox is blue.",
]  # people like rivers, then good days


@pytest.fixture
def setting(tmp_path, tiny_gpt, stage_dir):
    def make(family="llama", prompts=24, **keys) -> Config:
        choices = [[(k + n) % 4 for k in range(3)] for n in range(prompts)]
        rows = [
            {
                "prompt": f"Hi {n}",
                "answers": [ANSWERS[k] for k in three],
                "ranks": three,
                "sources": ["reference", "policy", "policy"],
                "stopped": [True, True, n % 3 > 0],
            }
            for n, three in enumerate(choices)
        ]
        file = tmp_path / "comparisons.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {
            "parent": stage_dir(tiny_gpt(family, seed=1)),
            "train_data": str(file),
            "output_dir": str(tmp_path / "reward"),
            "mixed_precision": "no",
            "max_steps": 30,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "max_length": 60,
            "eval_fraction": 0.25,
            "logging_steps": 10,
        }
        return Config(**defaults | keys)

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_learns_the_ranking_and_what_was_saved_scores_the_same(
    family, setting, monkeypatch, capsys
):
    """Invariant 7, and that the SFT model's answers score 0 on average with a deviation of 1."""
    kept = {}
    real = run_module.publish
    monkeypatch.setattr(
        run_module,
        "publish",
        lambda folder, model, *rest, **kw: (
            kept.update(model=model),
            real(folder, model, *rest, **kw),
        )[1],
    )
    cfg = setting(family)
    main(cfg)
    assert "gate reward: PASS" in capsys.readouterr().out
    stage = json.loads(open(f"{cfg.output_dir}/stage.json").read())  # noqa: PTH123, SIM115
    assert stage["kind"] == "reward"
    assert stage["accuracy"]["mean"] > 0.9
    low, high = stage["accuracy"]["ci95"]
    assert low <= stage["accuracy"]["mean"] <= high
    assert stage["accuracy"]["n"] == stage["data"]["eval"]["pairs"] == 18
    assert (stage["data"]["train"]["comparisons"], stage["data"]["eval"]["comparisons"]) == (18, 6)

    tokenizer, loaded = load_tokenizer(cfg.output_dir), load_model(cfg.output_dir, "reward")
    with open(cfg.train_data) as file:  # noqa: PTH123
        rows = [Row(json.loads(line), "x") for line in file]
    comparisons, _ = tokenize(rows[:18], tokenizer, cfg.max_length)
    batch = collate(comparisons, tokenizer.pad_id, torch.device("cpu"))
    with torch.no_grad():
        scores, memory = (
            loaded(batch.ids, batch.lengths),
            kept["model"].eval()(batch.ids, batch.lengths),
        )
    assert torch.equal(scores, memory)
    assert loaded.shift != 0
    policy = scores.view(18, 3)[:, 1:]
    assert float(policy.mean()) == pytest.approx(0, abs=1e-4)
    assert float(policy.std(correction=0)) == pytest.approx(1, abs=1e-4)
    right = [
        scores[3 * n + i] > scores[3 * n + j] for n, c in enumerate(comparisons) for i, j in c.pairs
    ]
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize("micro", [24, 6])
def test_the_logged_loss_is_the_mean_over_prompts(setting, micro):
    """Nothing is learned, so training loss = held-out loss on the same rows, all of which have
    three pairs."""
    cfg = setting(
        learning_rate=0.0,
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=24 // micro,
    )
    main(setting(**cfg.__dict__ | {"eval_data": cfg.train_data}))
    with open(f"{cfg.output_dir}/metrics.jsonl") as file:  # noqa: PTH123
        first, second, _ = (json.loads(line) for line in file)
    assert first["loss"] == pytest.approx(second["eval_loss"], rel=1e-5)
    assert first["loss"] > 0.3


def test_answers_by_people_do_not_move_the_origin(setting, tmp_path):
    """0 is the average of the SFT model's own answers, also where people's pairs were merged in."""
    cfg = setting(normalize=False)
    with open(cfg.train_data) as file:  # noqa: PTH123
        machine = [json.loads(line) for line in file]
    people = [
        {"prompt": f"Ho {n}", "chosen": ANSWERS[0], "rejected": ANSWERS[1]} for n in range(12)
    ]
    merged = tmp_path / "merged.jsonl"
    merged.write_text("".join(json.dumps(row) + "\n" for row in machine + people))
    cfg = setting(normalize=False, train_data=str(merged), eval_data=cfg.train_data)
    main(cfg)
    tokenizer, model = load_tokenizer(cfg.output_dir), load_model(cfg.output_dir, "reward")
    comparisons, _ = tokenize([Row(row, "x") for row in machine], tokenizer, cfg.max_length)
    batch = collate(comparisons, tokenizer.pad_id, torch.device("cpu"))
    with torch.no_grad():
        own = model(batch.ids, batch.lengths).view(-1, 3)[:, 1:]
    assert float(own.mean()) == pytest.approx(0, abs=1e-4)


def test_the_critic_is_the_reward_model(setting, tokenizer):
    cfg = setting(max_steps=2)
    main(cfg)
    critic, scorer = load_model(cfg.output_dir, "reward"), load_model(cfg.output_dir, "reward")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        values = critic.values(ids)
        for length in (1, 2, 3, 4):
            scores = scorer(ids, torch.tensor([length, length]))
            # Products of other sizes add up in another order, in fp32.
            assert torch.allclose(values[:, length - 1], scores, rtol=0, atol=1e-6)


def test_accumulation_changes_nothing_but_memory(setting, tmp_path):
    runs = [
        setting(
            output_dir=str(tmp_path / f"{micro}"),
            per_device_train_batch_size=micro,
            max_steps=2,
            normalize=False,
            gradient_accumulation_steps=6 // micro,
        )
        for micro in (6, 2)
    ]
    for cfg in runs:
        main(cfg)
    whole, parts = (load_file(f"{cfg.output_dir}/model.safetensors") for cfg in runs)
    start = load_file(f"{runs[0].parent}/model.safetensors")
    assert (
        max(float((whole[name] - start[name]).abs().max()) for name in start if name in whole)
        > 5e-3
    )
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-4


def test_a_prompt_is_never_on_both_sides_of_the_split(setting, tmp_path, monkeypatch):
    """A file of people's pairs has several rows for a prompt; held-out accuracy must not be
    measured on known ones."""
    cfg = setting(max_steps=1)
    rows = [{"prompt": f"Hi {n // 3}", "chosen": "good", "rejected": f"bad {n}"} for n in range(24)]
    file = tmp_path / "people.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = []
    real = train.paired
    monkeypatch.setattr(
        train,
        "paired",
        lambda rows, *rest: (sides.append({row.data["prompt"] for row in rows}), real(rows, *rest))[
            1
        ],
    )
    main(setting(max_steps=1, train_data=str(file), eval_fraction=0.2))
    assert len(sides) == 2
    assert sides[1]
    assert not sides[0] & sides[1], cfg.train_data


def test_lora_through_main(setting):
    cfg = setting(lora_r=2, lora_targets=["qkv", "down"], max_steps=20, learning_rate=1e-2)
    main(cfg)
    start, end = (
        load_file(f"{cfg.parent}/model.safetensors"),
        load_file(f"{cfg.output_dir}/model.safetensors"),
    )
    changed = {
        name.split(".")[-2]
        for name in end
        if name in start and not torch.equal(start[name], end[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert load_model(cfg.output_dir, "reward").score.weight.shape == (1, 32)
    adapter = load_file(f"{cfg.output_dir}/adapter/adapter_model.safetensors")
    assert torch.equal(adapter["base_model.model.score.weight"], end["score.weight"])
    stage = json.loads(open(f"{cfg.output_dir}/stage.json").read())  # noqa: PTH123, SIM115
    assert stage["accuracy"]["mean"] > 0.7
