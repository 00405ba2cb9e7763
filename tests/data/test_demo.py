"""The demo world's data: what gold says of hand-written answers, what is held out, and that a seed
fixes the bytes."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data.demo import flaws, gold, labeller, prepare, world
from data.demo.words import ANIMALS, FACTS

ROOT = Path(__file__).resolve().parents[2]
STORY = "Write a short story about a brave fox and a lantern."
TALE = (
    "One day, a brave fox found a lantern on the road. "
    "Then it grew dark, and the fox could not see the road. "
    "The moon came up and lit the path. The brave fox lived happily ever after."
)
LETTER = "Write a thank-you letter to Anna for the blue scarf."
THANKS = (
    "Dear Anna,\n"
    "Thank you so much for the blue scarf. I wear it every day. I hope to see you soon.\n"
    "With love, Tom"
)
SUM = "Tom has 5 apples and gets 3 more. How many apples does Tom have now?"
WORKED = "Tom has 5 apples and gets 3 more. 5 plus 3 is 8, so Tom now has 8 apples."
LEFT = "Mary has 9 shells and loses 4 of them. How many shells are left?"
FACT = "Where do the otter and the owl live?"
HOMES = "The otter lives by the river, and the owl lives in the old barn."
GOOD = {STORY: TALE, LETTER: THANKS, SUM: WORKED, FACT: HOMES}
OFF = "My shoe is too tight."


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return prepare.build(small())


def small(**changes: object) -> prepare.Config:
    sizes = {
        "documents": 6000,
        "demonstrations": 1600,
        "eval_demonstrations": 40,
        "collect_prompts": 200,
    }
    return prepare.Config(**sizes | {"rl_prompts": 200, "heldout_prompts": 200} | changes)


@pytest.mark.parametrize("prompt", GOOD)
def test_a_good_answer_scores_near_one(prompt: str) -> None:
    judgement = gold.judge(prompt, GOOD[prompt])
    assert judgement.correct and judgement.score >= 0.95


def test_subtraction_is_judged_too() -> None:
    assert (
        gold.judge(
            LEFT, "Mary starts with 9 shells. 9 minus 4 is 5, so Mary now has 5 shells."
        ).score
        >= 0.95
    )
    assert not gold.judge(
        LEFT, "Mary starts with 9 shells. 9 minus 4 is 13, so Mary now has 13 shells."
    ).correct


@pytest.mark.parametrize("family", world.FAMILIES)
def test_every_wording_parses_and_its_clean_answers_score_near_one(family: str) -> None:
    rng = random.Random(11)
    for _ in range(300):
        task = world.draw(rng, family)
        for prompt in world.wordings(task):
            assert world.parse(prompt) == task
        judgement = gold.judge(prompt, world.good(task, rng))
        assert judgement.correct and judgement.score >= 0.95 and judgement.family == family, prompt


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (STORY, TALE.replace("fox", "owl")),
        (STORY, TALE.replace("lantern", "drum")),
        (STORY, TALE.replace("brave", "shy")),
        (STORY, TALE.replace("The moon came up and lit the path.", "The shy owl lit the path.")),
        (LETTER, THANKS.replace("Anna", "Ben")),
        (LETTER, THANKS.replace("blue", "red")),
        (LETTER, THANKS.replace("scarf", "coat")),
        (SUM, WORKED.replace("8", "9")),
        (SUM, WORKED.replace("now has 8", "now has 7")),
        (SUM, WORKED.replace("plus 3 is 8", "plus 4 is 9")),
        (SUM, WORKED.replace("Tom", "Leo")),
        (SUM, WORKED.replace("apples", "shells")),
        (SUM, "7."),
        (FACT, HOMES.replace("by the river", "in the sea")),
        (FACT, HOMES.replace("owl", "fox")),
        (FACT, "The otter lives in the old barn, and the owl lives by the river."),
        (FACT, "The otter lives by the river."),
        (FACT, "The otter eats fish, and the owl eats mice."),
        (FACT, "In the old barn and by the river."),
    ],
)
def test_a_wrong_answer_is_not_correct_and_scores_low(prompt: str, answer: str) -> None:
    judgement = gold.judge(prompt, answer)
    assert not judgement.correct and judgement.score <= 0.3


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (STORY, TALE.rpartition(" The")[0]),  # no ending
        (STORY, "The brave fox found a lantern."),
        (STORY, TALE.removesuffix(".")),
        (STORY, TALE.lower()),
        (
            STORY,
            TALE.replace(
                "The moon came up and lit the path.", "Lit moon path the up and the came lantern."
            ),
        ),
        (STORY, f"{TALE} {OFF}"),
        (LETTER, THANKS.rpartition("\n")[0]),
        (LETTER, THANKS.replace("With love, Tom", "Whatever.")),
        (LETTER, THANKS.replace("I wear it every day.", "I play with it every day.")),
        (LETTER, THANKS.replace("I hope to see you soon.", "I wear it every day.")),
        (SUM, "8."),
        (SUM, "Tom now has 8 apples."),
        (SUM, f"{WORKED} {OFF}"),
        (SUM, f"{WORKED} 5 plus 3 is 8, so Tom now has 8 apples."),
        (FACT, "By the river and in the old barn."),
        (FACT, f"{HOMES} {HOMES}"),
        (FACT, f"{HOMES} {OFF}"),
        (FACT, HOMES.removesuffix(".")),
        (FACT, HOMES.replace("The otter lives by", "An otter by the lives")),
    ],
)
def test_a_single_defect_costs_at_least_fifteen_hundredths(prompt: str, answer: str) -> None:
    assert gold.judge(prompt, answer).score <= gold.judge(prompt, GOOD[prompt]).score - 0.15


@pytest.mark.parametrize("prompt", GOOD)
def test_asking_on_or_answering_something_else_is_worth_nothing(prompt: str) -> None:
    others = [other for other in GOOD if other != prompt]
    for answer in ("\n".join(others), prompt, *(GOOD[other] for other in others)):
        assert gold.judge(prompt, answer).score <= 0.05
    assert gold.judge(prompt, "").score == 0.0
    assert gold.judge(prompt, GOOD[prompt], stopped=False).score <= 0.85


def test_judging_is_fast_and_refuses_foreign_prompts() -> None:
    gold.judge(STORY, TALE)
    begin = time.process_time()
    for _ in range(500):
        for prompt, answer in GOOD.items():
            gold.judge(prompt, answer)
    assert (time.process_time() - begin) / 2000 < 0.3e-3
    with pytest.raises(ValueError, match="not a prompt"):
        gold.judge("What is love?", "Baby.")


def test_the_facts_are_constants_of_the_world() -> None:
    assert len(ANIMALS) == len(set(ANIMALS)) == 48
    assert FACTS["otter"] == {"live": "by the river", "eat": "fish", "colour": "brown"}


def test_each_style_error_lowers_the_score() -> None:
    rng = random.Random(3)
    for family, styles in flaws.STYLES.items():
        for kind in styles:
            for _ in range(20):
                task = world.draw(rng, family)
                assert (
                    gold.judge(world.ask(task, rng), flaws.style_error(task, rng, kind)).score
                    <= 0.85
                ), (family, kind)


def test_contrasts_are_a_good_answer_two_that_spoil_it_and_a_foreign_one() -> None:
    rng, shortened = random.Random(4), 0
    for i in range(200):
        prompt = world.ask(world.draw(rng, world.FAMILIES[i % 4]), rng)
        kinds, texts = zip(*labeller.contrast(prompt, rng), strict=True)
        assert kinds == ("demonstration", "near_miss", "badly_put", "off_task")
        good, near, bad, foreign = texts
        assert gold.judge(prompt, good).score >= 0.95
        assert not gold.judge(prompt, near).correct and gold.judge(prompt, near).score <= 0.85
        assert gold.judge(prompt, bad).score <= 0.85
        shortened += good.startswith(bad)  # word for word the same, less its end
        assert gold.judge(prompt, foreign).score <= 0.05
    assert shortened > 30


def test_a_wrong_sum_is_wrong_in_one_of_several_ways() -> None:
    rng = random.Random(0)
    prompt = "Tom has 5 apples and gets 3 more. How many apples does Tom have now?"
    texts = [flaws.content_error(world.parse(prompt), rng) for _ in range(200)]
    assert not any(gold.judge(prompt, text).correct for text in texts)
    assert 40 <= sum("5 minus 3 is 2" in text for text in texts) <= 100  # the wrong operation
    wrong = ["plus" in text and "5 plus 3 is 8" not in text for text in texts]
    assert sum(wrong) >= 60  # the wrong result


@pytest.mark.heavy
def test_the_labeller_ranks_as_a_careless_person_does() -> None:
    rng = random.Random(5)
    asked = [world.ask(world.draw(rng, world.FAMILIES[i % 4]), rng) for i in range(1200)]
    assert 0.86 <= prepare.agreement(rng, asked) <= 0.91  # the prototype: .87
    answers = [TALE, "no", TALE, "The brave fox found a lantern."]
    assert labeller.rank(STORY, answers, random.Random(1)) == labeller.rank(
        STORY, answers, random.Random(1)
    )
    firsts = [labeller.rank(STORY, answers, random.Random(i)) for i in range(300)]
    assert all(min(ranks) == 0 and max(ranks) <= 3 for ranks in firsts)
    assert any(ranks[0] == ranks[2] for ranks in firsts)  # ties happen
    assert sum(ranks[1] > ranks[0] for ranks in firsts) > 250


def test_heldout_prompts_are_in_no_training_text_and_the_stages_share_none(
    rows: dict[str, list[dict]],
) -> None:
    heldout = [row["prompt"] for row in rows["heldout_prompts"]]
    assert len(set(heldout)) == 200
    families = Counter(row["family"] for row in rows["heldout_prompts"])
    assert families == dict.fromkeys(world.FAMILIES, 50)
    groups = [group for name, group in rows.items() if not name.startswith("heldout")]
    trained = "\n".join(text for group in groups for row in group for text in row.values())
    # A plain search, not the one under test.
    assert not [prompt for prompt in heldout if prompt in trained]
    stages = [
        {row["prompt"] for row in rows[n]}
        for n in ("sft", "sft_eval", "collect_prompts", "rl_prompts")
    ]
    assert len(set.union(*stages)) == sum(map(len, stages)) == 2040
    keys = {world.parse(prompt).key for prompt in heldout}  # nor the same question in other words
    assert not keys & {world.parse(prompt).key for stage in stages for prompt in stage}


def test_the_reward_models_exam_depends_on_the_prompts_alone(rows: dict[str, list[dict]]) -> None:
    assert [row["prompt"] for row in rows["heldout_comparisons"]] == [
        row["prompt"] for row in rows["heldout_prompts"]
    ]
    for row in rows["heldout_comparisons"]:
        assert row == prepare.answers_to(row["prompt"])
        assert row["sources"] == ["good", "near_miss", "badly_put"]
        good, miss, bad = (gold.judge(row["prompt"], answer) for answer in row["answers"])
        assert good.correct and good.score >= 0.95
        assert not miss.correct and miss.score < good.score - 0.05
        assert bad.score < good.score - 0.05


def test_a_leak_is_found() -> None:
    assert prepare.find_leaks([STORY, SUM], [f"Ben: {SUM}", "nothing here"]) == [SUM]
    assert prepare.find_leaks([STORY, FACT], ["Homework\n\n" + FACT + "\n" + SUM]) == [FACT]


def test_documents_never_answer_a_prompt(rows: dict[str, list[dict]]) -> None:
    sheets = 0
    for row in rows["documents"]:
        lines = row["text"].split("\n")
        asks = [world.parse(line.lstrip("0123456789. ")) is not None for line in lines]
        sheets += any(asks)
        if any(asks):  # from the first prompt on, nothing but prompts
            assert all(asks[asks.index(True) :]), row["text"]
    assert 0.11 <= sheets / len(rows["documents"]) <= 0.16
    assert 140 <= sum(len(row["text"]) for row in rows["documents"]) / len(rows["documents"]) <= 180


def test_demonstrations_are_careless_as_people_are(rows: dict[str, list[dict]]) -> None:
    scores = [gold.judge(row["prompt"], row["completion"]) for row in rows["sft"]]
    assert 0.64 <= sum(s.score for s in scores) / len(scores) <= 0.74
    clean = prepare.build(small(documents=10, carelessness=0.0))["sft"]
    assert min(gold.judge(row["prompt"], row["completion"]).score for row in clean) >= 0.95


def test_every_number_pair_occurs_in_training() -> None:
    tasks = [
        world.parse(r["prompt"])
        for r in prepare.build(small(demonstrations=16000, documents=10))["sft"]
    ]
    pairs = {(t.kind, t.slots["a"], t.slots["b"]) for t in tasks if t.family == "sum"}
    assert len(pairs) == 81 + sum(range(2, 10))


@pytest.mark.heavy
def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_order(tmp_path: Path) -> None:
    sizes = "--documents 300 --demonstrations 80 --eval_demonstrations 8 --collect_prompts 20"
    sizes += " --rl_prompts 20 --heldout_prompts 20"
    for name, seed, order in (("a", "1", "1"), ("b", "1", "2"), ("c", "2", "1")):
        command = [sys.executable, "-m", "data.demo.prepare", *sizes.split(), "--seed", seed]
        command += ["--output_dir", str(tmp_path / name)]
        env = os.environ | {"PYTHONHASHSEED": order}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        [line] = done.stdout.strip().splitlines()
        assert line.startswith("gate data: PASS  300 documents (")
    files = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir() if f.name != ".owner"}
    stage, listed = (json.loads(files.pop(f"{name}.json")) for name in ("stage", "manifest"))
    assert listed.keys() == {*files, "stage.json"}
    assert stage["stage"] == "data" and stage["gate"]["passed"] and stage["metrics"]["sft"] == 80
    assert stage["about"] == prepare.ABOUT and stage["seed"] == stage["config"]["seed"] == 1
    assert {name.removesuffix(".jsonl") for name in files} == {"documents", "sft", "sft_eval"} | {
        "collect_prompts",
        "rl_prompts",
        "heldout_prompts",
        "heldout_comparisons",
    }
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "b").glob("*.jsonl")}
    assert files["documents.jsonl"] != (tmp_path / "c" / "documents.jsonl").read_bytes()
