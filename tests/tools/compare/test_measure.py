"""Scores, log-probs, intervals, best-of-n and reward accuracy against values found another way."""

import math
import types
from itertools import combinations

import numpy as np
import pytest
import torch

from common.model.gpt import GPT, RewardModel
from common.model.shape import GPTConfig
from common.program.errors import InputError
from common.rewards.scoring import by_length, logprobs_of, reward_scores
from common.rows.sources import Row
from common.text.tokenizer import Tokenizer, same_ids, translate
from tools.compare.measure import Answer as A
from tools.compare.measure import best_of_n, best_of_table, interval, read_prompts
from tools.compare.reward_accuracy import Exam, beside, order_statistics, reward_accuracy

CONFIG = GPTConfig(vocab_size=270, max_length=32, n_layer=1, n_head=2, n_embd=16)


def test_batches_by_length_hold_every_row_once():
    assert list(by_length([3, 1, 2, 1, 5], 2)) == [[1, 3], [2, 0], [4]]


def test_reward_scores_equal_single_rows():
    torch.manual_seed(0)
    model = RewardModel(CONFIG)
    model.shift.fill_(0.25)
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
    alone = [float(model(torch.tensor([row]), torch.tensor([len(row)])).detach()) for row in rows]
    assert reward_scores(model, rows, batch_size=3) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_equal_unpadded_rows(temperature):
    torch.manual_seed(1)
    model = GPT(CONFIG)
    prompts, responses = [[1, 2, 3], [4], [5, 6], [7]], [[9, 8], [1, 2, 3, 4, 5], [], [3]]
    found = logprobs_of(model, prompts, responses, temperature, batch_size=3)
    for prompt, response, values in zip(prompts, responses, found, strict=True):
        logits = model(torch.tensor([prompt + response])).detach()[0].double() / temperature
        wanted = [
            float(
                logits[len(prompt) - 1 + t, token] - logits[len(prompt) - 1 + t].exp().sum().log()
            )
            for t, token in enumerate(response)
        ]
        assert values == pytest.approx(wanted, abs=1e-5)


def test_translate_into_another_vocabulary():
    a, b = Tokenizer.train_bpe(["ab ab ab"], 262), Tokenizer.train_bpe(["cab cab cab"], 263)
    assert same_ids(a, a.with_chat()) and not same_ids(a, b)
    for ids in ([*a.encode("ab cab"), a.eot_id], a.encode("ab cab"), [a.eot_id], []):
        there = translate(ids, a, b)
        assert b.decode(there) == a.decode(ids)
        assert (there[-1:] == [b.eot_id]) == (ids[-1:] == [a.eot_id])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_against_every_choice(n):
    """The mean over all choices of n of the K answers of what the highest reward gets."""
    rng = np.random.default_rng(n)
    rewards, values = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    for row, estimate in enumerate(best_of_n(rewards, values, n)):
        chosen = [
            max(choice, key=lambda k: rewards[row, k]) for choice in combinations(range(5), n)
        ]
        assert estimate == pytest.approx(np.mean([values[row, k] for k in chosen]))


def test_best_of_table():
    answers = [
        A("", 1, True, 0.0, reward, gold, True)
        for reward, gold in ((1, 0.0), (2, 1.0), (3, 0.5), (0, 0.25))
    ]
    table = best_of_table(answers, 2)  # two prompts of two answers
    assert (
        table["1"]["reward"]["mean"] == 1.5
        and table["1"]["gold"]["mean"] == 0.4375
        and table["1"]["kl"] == 0
    )
    assert table["2"]["reward"]["mean"] == 2.5 and table["2"]["gold"]["mean"] == 0.75
    assert table["2"]["kl"] == pytest.approx(math.log(2) - 0.5, abs=1e-6)
    assert list(best_of_table(answers * 3, 6)) == ["1", "2", "4", "6"]


def test_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(2, 1, size=400)
    found = interval(values)
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-6) and found["n"] == 400
    half = 1.96 * values.std() / 20
    assert found["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.015)
    assert interval(values) == found  # seeded
    assert interval([0.5])["ci95"] == [0.5, 0.5]
    assert interval([]) == {"mean": None, "ci95": [None, None], "n": 0}


def test_interval_of_groups_is_wider_than_of_independent_items():
    hits = [10.0, 0.0] * 20  # whole prompts right or wrong
    grouped, single = interval(hits, [10] * 40), interval([1.0] * 200 + [0.0] * 200)
    assert grouped["mean"] == single["mean"] == 0.5 and grouped["n"] == 400
    assert grouped["ci95"][1] - grouped["ci95"][0] > 2.5 * (single["ci95"][1] - single["ci95"][0])


def test_accuracy_by_hand():
    sources = ["policy", "policy", "near_miss", "policy"]
    row = Exam([0.9, 0.5, 0.48, 0.1], "sum", sources, [])
    # pairs: 0>1 right, 0>2 right, 0>3 right, 1>2 (gap .02) left out, 1>3 equal, 2>3 wrong
    even = row._replace(gold=[0.3, 0.3, 0.3, 0.3])
    found = order_statistics([(row, [2.0, 1.0, 0.5, 1.0]), (even, [1.0, 2.0, 3.0, 4.0])])
    # the headline is over the policy's own answers
    assert found["accuracy"] == pytest.approx(2.5 / 3, abs=1e-6) and found["n"] == 3
    everything = (1 + 1 + 1 + 0.5 + 0) / 5
    assert found["all"]["accuracy"] == pytest.approx(everything, abs=1e-6)
    assert found["all"]["n"] == 5
    others = order_statistics([(row._replace(sources=["answer"] * 4), [2.0, 1.0, 0.5, 1.0])])
    assert {key: others[key] for key in ("accuracy", "ci95", "n")} == others["all"]
    assert others["n"] == 5
    assert {name: kind["n"] for name, kind in found["by_source"].items()} == {
        "near_miss / policy": 2,
        "policy / policy": 3,
    }
    assert found["by_family"]["sum"]["n"] == 5


def test_accuracy_of_a_model_uses_prompt_answer_and_end_token():
    """Rewards computed row by row from the ids that the reward model was trained on."""
    tokenizer = Tokenizer.train_bpe(["ab ab ab"], 262).with_chat()
    torch.manual_seed(3)
    model = RewardModel(CONFIG)

    def gold(prompt: str, answer: str, stopped: bool):
        return types.SimpleNamespace(score=len(answer) / 9, family=prompt)

    rows = [
        Row(
            {"prompt": "ab", "answers": ["a", "abab", "abababa"], "stopped": [True, False, True]},
            "f:1",
        )
    ]
    user, assistant = (tokenizer.role_ids[role] for role in ("user", "assistant"))
    ids = [
        [user, *tokenizer.encode("ab"), assistant, *tokenizer.encode(text)]
        for text in ("a", "abab", "abababa")
    ]
    ids[0].append(tokenizer.eot_id)
    ids[2].append(tokenizer.eot_id)
    r = [float(model(torch.tensor([row]), torch.tensor([len(row)])).detach()) for row in ids]
    wanted = [r[1] > r[0], r[2] > r[0], r[2] > r[1]]
    assert reward_accuracy((model, tokenizer), gold, rows)["accuracy"] == pytest.approx(
        sum(wanted) / 3, abs=1e-6
    )
    with pytest.raises(InputError, match="no row has `answers`"):
        reward_accuracy(
            (model, tokenizer), gold, [Row({"prompt": "ab", "chosen": "a", "rejected": "b"}, "f:1")]
        )
    with pytest.raises(InputError, match=r"f:7: .* context is 32"):
        reward_accuracy(
            (model, tokenizer), gold, [Row({"prompt": "ab", "answers": ["b" * 40]}, "f:7")]
        )


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert [m[0]["content"] for m in read_prompts(str(tmp_path / "p.txt"))] == ["one", " two "]
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"question": "two"}\n')
    assert read_prompts(str(tmp_path / "p.jsonl"), 1) == [[{"role": "user", "content": "one"}]]
    with pytest.raises(InputError, match=r"p.jsonl:2: columns found: question"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_held_out_rows_get_the_first_answers_of_their_own_prompt():
    def drawn(text):
        return A(text, 1, text != "cut", None, None, None, None)

    prompts = [[{"role": "user", "content": name}] for name in ("p", "q")]
    answers = [drawn(f"{name}{n}") for name in "pq" for n in range(9)]
    answers[1] = drawn("cut")
    rows = [
        Row({"prompt": "q", "answers": ["good"], "sources": ["good"]}, "f:1"),
        Row({"prompt": "p", "answers": ["good", "bad"]}, "f:2"),
        Row({"prompt": "not asked", "answers": ["good"]}, "f:3"),
        Row({"prompt": "p", "chosen": "a", "rejected": "b"}, "f:4"),
    ]
    q, p = beside(rows, prompts, answers)
    assert (q.origin, p.origin) == ("f:1", "f:2")
    assert q.data["answers"] == [*(f"q{n}" for n in range(8)), "good"]
    assert q.data["sources"] == ["policy"] * 8 + ["good"]
    assert p.data["answers"] == ["p0", "cut", *(f"p{n}" for n in range(2, 8)), "good", "bad"]
    assert p.data["stopped"] == [True, False, *[True] * 8]
    assert p.data["sources"] == ["policy"] * 8 + ["answer"] * 2
    with pytest.raises(InputError, match="no row is about a prompt that best_of answered"):
        beside(rows[2:], prompts, answers)
