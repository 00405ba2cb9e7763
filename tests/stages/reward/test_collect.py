"""Collecting comparisons: hooks, reference answers, people's pairs, and a held-out split by
prompt."""

import json
import random
import sys
import types

import numpy as np
import pytest
import torch

import stages.reward.collect
from common.handoff.locate import load_tokenizer
from common.handoff.publish import load_model
from common.model.sample import sample
from common.program.errors import InputError, Interrupted
from common.text.chat import prompt_ids
from stages.reward.collect import Config, main

QUESTIONS = [f"Name an animal. {n}" for n in range(10)]


@pytest.fixture
def hooks(monkeypatch):
    """A module "own_hooks" as a recipe would bring it: longest answer best; one off-task answer;
    calls are noted."""
    module = types.ModuleType("own_hooks")
    module.calls = []

    def rank(prompt: str, answers: list[str], rng: random.Random) -> list[int]:
        module.calls.append((prompt, list(answers)))
        assert isinstance(rng, random.Random)
        order = sorted({len(answer) for answer in answers}, reverse=True)
        return [order.index(len(answer)) for answer in answers]

    module.rank = rank
    module.contrast = lambda prompt, rng: [
        ("off_task", "no"),
        ("near_miss", f"{prompt} {rng.random():.3f}"),
    ]
    monkeypatch.setitem(sys.modules, "own_hooks", module)
    return module


@pytest.fixture
def setting(tmp_path, tiny_gpt, stage_dir):
    def make(rows=None, **keys) -> Config:
        rows = (
            [{"prompt": question, "completion": "The fox."} for question in QUESTIONS]
            if rows is None
            else rows
        )
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {
            "parent": stage_dir(tiny_gpt(seed=1)),
            "train_data": str(file),
            "output_dir": str(tmp_path / "collect"),
            "answers_per_prompt": 3,
            "max_new_tokens": 8,
            "max_prompt_length": 24,
            "eval_fraction": 0.2,
        }
        return Config(**defaults | keys)

    return make


def collected(cfg: Config) -> tuple[list[dict], list[dict], dict]:
    """(training rows, held-out rows, stage.json)."""
    main(cfg)
    texts = []
    for name in ("comparisons.jsonl", "eval.jsonl", "stage.json"):
        with open(f"{cfg.output_dir}/{name}") as file:  # noqa: PTH123
            texts.append(file.read())
    train, heldout = ([json.loads(line) for line in text.splitlines()] for text in texts[:2])
    return train, heldout, json.loads(texts[2])


def question(row: dict) -> str:
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def test_labeller_and_contrast(setting, hooks):
    train, heldout, stage = collected(
        setting(labeller="own_hooks:rank", contrast="own_hooks:contrast")
    )
    assert (len(train), len(heldout)) == (8, 2)
    assert sorted(map(question, train + heldout)) == sorted(QUESTIONS)
    assert [prompt for prompt, _ in hooks.calls] == QUESTIONS  # asked once each
    seen = dict(hooks.calls)
    for row in train + heldout:
        assert row["answers"] == seen[question(row)]
        assert row["sources"] == ["policy"] * 3 + ["off_task", "near_miss"]
        assert row["answers"][3] == "no"
        assert row["answers"][4].startswith(question(row))
        lengths = [len(answer) for answer in row["answers"]]
        for i in range(5):
            for j in range(5):
                assert (row["ranks"][i] < row["ranks"][j]) == (lengths[i] > lengths[j])
        assert len(row["stopped"]) == 5
        assert row["stopped"][3:] == [True, True]
    assert (
        len({answer for row in train for answer in row["answers"][:3]}) > 12
    )  # samples at temperature 1 differ
    assert stage["gate"]["passed"]
    assert stage["metrics"] == {"answers": 50, "prompts": 10, "pairs": 0, "too_long": 0}


def test_the_same_seed_collects_the_same(setting, hooks, tmp_path):
    keys = {"labeller": "own_hooks:rank", "contrast": "own_hooks:contrast"}
    one, two, other = (
        collected(setting(output_dir=str(tmp_path / name), seed=seed, **keys))[:2]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two
    assert one != other


def test_without_a_labeller_the_reference_wins(setting):
    train, heldout, _ = collected(setting())
    for row in train + heldout:
        assert row["answers"][0] == "The fox."
        assert row["ranks"] == [0, 1, 1, 1]
        assert row["sources"] == ["reference", "policy", "policy", "policy"]
        assert row["stopped"][0] is True
    rows = [{"prompt": "Hi", "completion": "Yes"}, {"prompt": "Hi"}]
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: without a labeller"):
        main(setting(rows))


def test_stopped_says_whether_the_end_token_came(setting, tiny_gpt, stage_dir, tokenizer):
    import torch

    stops, never = tiny_gpt(seed=1, tie_embeddings=False), tiny_gpt(seed=1, tie_embeddings=False)
    with torch.no_grad():
        stops.head.weight[tokenizer.eot_id] *= 30
        never.head.weight[tokenizer.eot_id] *= 0
    found = {}
    for name, model in (("stops", stops), ("never", never)):
        train, heldout, _ = collected(setting(parent=stage_dir(model), max_new_tokens=2))
        found[name] = [flag for row in train + heldout for flag in row["stopped"][1:]]
    assert any(found["stops"])
    assert not any(found["never"])


def test_answers_are_the_model_s_own_with_the_keys_of_the_config(setting, tokenizer):
    """K a prompt, sampled at the temperature, from the seed, so long; so large a share held out."""
    keys = {"temperature": 0.4, "seed": 7, "max_new_tokens": 5, "answers_per_prompt": 2}
    cfg = setting(eval_fraction=0.5, **keys)
    train, heldout, _ = collected(cfg)
    assert (len(train), len(heldout)) == (5, 5)
    asked = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    expected = sample(
        load_model(cfg.parent),
        [ids for ids in asked for _ in range(2)],
        max_new_tokens=5,
        temperature=0.4,
        seed=7,
        stop_ids=[tokenizer.eot_id],
    )
    texts = [tokenizer.decode(answer.ids) for answer in expected]
    found = {question(row): row["answers"][1:] for row in train + heldout}
    assert found == {text: texts[2 * n : 2 * n + 2] for n, text in enumerate(QUESTIONS)}


def test_people_s_pairs_are_merged_into_both_files(setting, hooks, tmp_path):
    people = [
        {"prompt": f"Who is it? {n}", "chosen": "me", "rejected": f"you {n}"} for n in range(10)
    ]
    file = tmp_path / "people.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in people))
    train, heldout, stage = collected(setting(labeller="own_hooks:rank", pairs=[str(file)]))
    assert (len(train), len(heldout)) == (16, 4)
    found = [row for row in train + heldout if "chosen" in row]
    assert sorted(found, key=question) == people
    assert sum("chosen" in row for row in heldout) == 2
    assert stage["metrics"]["pairs"] == 10


def test_held_out_prompts_are_in_no_training_row(setting, hooks, tmp_path):
    """Also where a prompt comes twice, among people's pairs, or in both kinds."""
    rows = [{"prompt": QUESTIONS[n // 2]} for n in range(20)]
    people = [
        {"prompt": QUESTIONS[n // 3], "chosen": "me", "rejected": f"you {n}"} for n in range(30)
    ]
    file = tmp_path / "people.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in people))
    for seed in range(3):
        train, heldout, _ = collected(
            setting(rows, labeller="own_hooks:rank", pairs=[str(file)], seed=seed)
        )
        assert len(train) + len(heldout) == 50
        assert heldout
        assert not {question(row) for row in train} & {question(row) for row in heldout}


def test_long_prompts_are_counted_and_max_prompts_holds(setting, hooks):
    rows = [
        {"prompt": "Hi"},
        {"prompt": "The red fox and the blue bird. " * 4},
        *({"prompt": f"Go on {n}"} for n in range(5)),
    ]
    train, heldout, stage = collected(setting(rows, labeller="own_hooks:rank", max_prompts=4))
    assert sorted(map(question, train + heldout)) == ["Go on 0", "Go on 1", "Hi"]
    assert stage["metrics"]["too_long"] == 1
    assert "1 prompts too long" in stage["gate"]["text"]


def test_the_model_samples_on_the_gpu(setting, monkeypatch):
    class Moved(Exception):
        """The place that the model was moved to."""

    def to(model, device):
        raise Moved(device.type)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("common.model.gpt.GPT.to", to)
    with pytest.raises(Moved, match="cuda"):
        main(setting())


@pytest.mark.parametrize("name", ["own_hooks:nothing", "no_such_module:rank", "own_hooks"])
def test_a_wrong_hook_is_named(setting, hooks, name):
    with pytest.raises(InputError, match=name):
        main(setting(labeller=name))


def test_rows_of_the_sft_formats_are_prompts_too(setting, tokenizer):
    rows = [
        {"instruction": "Add them.", "input": "two, three", "output": "five"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    ]
    cfg = setting(rows)
    train, heldout, _ = collected(cfg)
    found = {question(row): row["answers"][0] for row in train + heldout}
    assert found == {"Add them.\n\ntwo, three": "five", "Hi": "Yes?"}
    assert load_tokenizer(cfg.parent).vocab_size == tokenizer.vocab_size


RANKS = [
    (None, r"ranks None: a list of numbers"),
    ("best", r"ranks 'best'"),
    (["best", 1, 2], r"ranks \['best', 1, 2\]"),
    ([float("nan"), 1, 2], r"ranks \[nan, 1, 2\]"),
    ([10**400, 1, 2], r"ranks \[1000"),
    ([[0], [1], [2]], r"ranks \[\[0\]"),
    ([0, 1], r"2 ranks for 3 answers"),
]


@pytest.mark.parametrize(("ranks", "told"), RANKS)
def test_ranks_that_are_none_are_refused(setting, hooks, ranks, told):
    hooks.rank = lambda prompt, answers, rng: ranks
    with pytest.raises(InputError, match=rf"labeller own_hooks:rank, prompt 'Name an.*0': {told}"):
        main(setting(labeller="own_hooks:rank"))


@pytest.mark.parametrize(
    "kind", [np.array, lambda ranks: [np.int64(r) for r in ranks], torch.tensor]
)
def test_ranks_may_be_of_numpy_or_torch(setting, hooks, kind):
    hooks.rank = lambda prompt, answers, rng: kind(list(range(len(answers))))
    train, heldout, _ = collected(setting(labeller="own_hooks:rank"))
    assert {tuple(row["ranks"]) for row in train + heldout} == {(0, 1, 2)}


@pytest.mark.parametrize("more", [None, ["text"], [("kind", 1)], "ab"])
def test_a_contrast_that_is_none_is_refused(setting, hooks, more):
    hooks.contrast = lambda prompt, rng: more
    with pytest.raises(InputError, match=r"contrast own_hooks:contrast, prompt 'Name an.*answer"):
        main(setting(labeller="own_hooks:rank", contrast="own_hooks:contrast"))


def test_the_answers_outlive_a_labeller_that_fails(setting, hooks, monkeypatch, tmp_path):
    """The same command goes on with them, and to the same end; other settings sample anew."""
    whole = collected(setting(labeller="own_hooks:rank", output_dir=str(tmp_path / "whole")))[:2]
    good, hooks.rank = hooks.rank, lambda prompt, answers, rng: 1 / 0
    cfg, again = setting(labeller="own_hooks:rank"), setting(labeller="own_hooks:rank", seed=5)
    with pytest.raises(
        InputError, match=r"prompt 'Name an animal\. 0': division by zero \(Zero.*py"
    ):
        main(cfg)
    hooks.rank, calls = good, []
    real = stages.reward.collect.sample
    counted = lambda *args, **keys: calls.append(1) or real(*args, **keys)  # noqa: E731
    monkeypatch.setattr("stages.reward.collect.sample", counted)
    assert collected(cfg)[:2] == whole and not calls
    hooks.rank = lambda prompt, answers, rng: None
    with pytest.raises(InputError):
        main(again)
    assert calls == [1]
    hooks.rank = good
    assert collected(cfg)[:2] == whole and calls == [1, 1]  # of another seed they are no use
    assert not (tmp_path / "collect" / "sampled.json").exists()


def test_a_date_of_a_parquet_file_is_kept_as_text(setting, hooks, tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    day = datetime.datetime(2024, 5, 1, 12)
    rows = [
        {"prompt": f"Who? {n}", "chosen": "me", "rejected": "you", "at": day} for n in range(10)
    ]
    file = tmp_path / "people.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    train, heldout, _ = collected(setting(labeller="own_hooks:rank", pairs=[str(file)]))
    assert {row["at"] for row in train + heldout if "at" in row} == {"2024-05-01 12:00:00"}


def test_a_labeller_that_leaves_or_swallows_errors(setting, hooks):
    """Leaving is an error like any other; a signal passes through `except Exception`."""
    hooks.rank = lambda prompt, answers, rng: sys.exit(0)
    with pytest.raises(InputError, match="SystemExit at"):
        main(setting(labeller="own_hooks:rank"))

    def rank(prompt, answers, rng):
        try:
            raise Interrupted("told to stop")
        except Exception:
            return [0] * len(answers)

    hooks.rank = rank
    with pytest.raises(Interrupted):
        main(setting(labeller="own_hooks:rank"))
