"""How often a reward model orders answers as the ground truth does, and on which answers."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.model.gpt import RewardModel
from common.program.errors import InputError
from common.rewards.scoring import reward_scores
from common.rows.sources import Row
from common.text.chat import Message, comparison_prompt, prompt_ids, rows_to_prompt
from common.text.tokenizer import Tokenizer
from tools.compare.measure import Answer, Gold, interval, question

MINIMUM_GAP = 0.05  # answers whose gold scores are closer are equally good to a reader
POLICY_ANSWERS = 8  # of the reference, beside the answers of each held-out row


def beside(
    rows: Sequence[Row], prompts: Sequence[list[Message]], drawn: Sequence[Answer]
) -> list[Row]:
    """The rows of these prompts, with the first POLICY_ANSWERS of the equally many answers drawn to
    each as `policy`.

    A set that does not move with the comparisons that the reward model was trained on. InputError
    when no row is left.
    """
    each = len(drawn) // len(prompts)
    own = {
        str(messages): drawn[i * each :][: min(each, POLICY_ANSWERS)]
        for i, messages in enumerate(prompts)
    }
    found = []
    for row in rows:
        answers = own.get(str(comparison_prompt(row.data)))
        if not answers or not row.data.get("answers"):
            continue
        new = {
            "answers": [answer.text for answer in answers],
            "stopped": [answer.stopped for answer in answers],
        }
        new["sources"] = ["policy"] * len(answers)
        old = {
            "stopped": [True] * len(row.data["answers"]),
            "sources": ["answer"] * len(row.data["answers"]),
            **row.data,
        }
        found.append(Row(row.data | {key: new[key] + old[key] for key in new}, row.origin))
    if not found:
        raise InputError("comparisons: no row is about a prompt that best_of answered")
    return found


class Exam(NamedTuple):
    """A prompt's answers, as the ground truth and the reward model see them."""

    gold: list[float]  # score of each answer
    family: str
    sources: list[str]  # who wrote each answer
    ids: list[list[int]]  # prompt and answer, of the reward model


def reward_accuracy(
    reward: tuple[RewardModel, Tokenizer], gold: Gold, rows: Sequence[Row]
) -> dict[str, Any]:
    """How often the reward model orders two answers to a prompt as the ground truth does; equal
    scores count one half.

    Rows of comparisons with `prompt`, `answers` and, if known, `sources` and `stopped`; rows
    without `answers` (people's pairs) are left out. The headline is over pairs of the policy's own
    answers, which best-of-n and PPO choose among (over all pairs where no source is `policy`).
    Pairs count from a gold difference of MINIMUM_GAP on. Intervals by bootstrap over prompts.
    Raises InputError naming file and line.
    """
    model, tokenizer = reward
    room = model.config.max_length
    exams = [read_exam(row, tokenizer, gold, room) for row in rows if row.data.get("answers")]
    if not exams:
        raise InputError(
            "comparisons: no row has `answers`, so there is nothing to measure the reward model on"
        )
    scores = iter(reward_scores(model, [ids for exam in exams for ids in exam.ids]))
    return order_statistics([(exam, [next(scores) for _ in exam.ids]) for exam in exams])


def read_exam(row: Row, tokenizer: Tokenizer, gold: Gold, room: int) -> Exam:
    """A row of comparisons, judged by the ground truth; `room`: the reward model's context."""
    texts = row.data["answers"]
    ends = row.data.get("stopped") or [True] * len(texts)
    try:
        messages = rows_to_prompt({"prompt": row.data.get("prompt")})
        prompt = prompt_ids(tokenizer, messages)
        answers = list(zip(texts, ends, strict=True))
        verdicts = [gold(question(messages), text, end) for text, end in answers]
    except (InputError, ValueError) as error:
        raise InputError(f"{row.origin}: {error}") from None
    ids = [
        [*prompt, *tokenizer.encode(text), *([tokenizer.eot_id] if end else [])]
        for text, end in answers
    ]
    if (longest := max(map(len, ids))) > room:
        tokens = f"{row.origin}: {longest} tokens"
        raise InputError(f"{tokens}, the reward model's context is {room}")
    sources = row.data.get("sources") or ["answer"] * len(texts)
    return Exam([verdict.score for verdict in verdicts], verdicts[0].family, sources, ids)


Groups = dict[str, dict[int, list[float]]]  # subset: prompt: 1 right, 0 wrong, 1/2 equal


def order_statistics(judged: Sequence[tuple[Exam, Sequence[float]]]) -> dict[str, Any]:
    """`reward_accuracy` from the answers to each prompt and their rewards."""
    groups: Groups = {}
    for prompt, (exam, rewards) in enumerate(judged):
        for i, j in itertools.combinations(range(len(rewards)), 2):
            gap = exam.gold[i] - exam.gold[j]
            if abs(gap) < MINIMUM_GAP:
                continue
            right = (rewards[i] > rewards[j]) == (gap > 0)
            hit = 0.5 if rewards[i] == rewards[j] else float(right)
            pair = " / ".join(sorted((exam.sources[i], exam.sources[j])))
            for name in ("all", f"source {pair}", f"family {exam.family}"):
                groups.setdefault(name, {}).setdefault(prompt, []).append(hit)
    everything, own = accuracy(groups, "all"), accuracy(groups, "source policy / policy")
    return {
        **(own if own["n"] else everything),
        "pairs": "the policy's own answers" if own["n"] else "all answers",
        "prompts": len(judged),
        "minimum_gap": MINIMUM_GAP,
        "all": everything,
        "by_source": parts(groups, "source "),
        "by_family": parts(groups, "family "),
    }


def accuracy(groups: Groups, name: str) -> dict[str, Any]:
    """Share of pairs of a subset that are ordered right, with its interval."""
    hits = list(groups.get(name, {}).values())
    found = interval([sum(prompt) for prompt in hits], [len(prompt) for prompt in hits])
    return {"accuracy": found["mean"], "ci95": found["ci95"], "n": found["n"]}


def parts(groups: Groups, prefix: str) -> dict[str, Any]:
    """The accuracy on every subset whose name starts so."""
    names = [name for name in sorted(groups) if name.startswith(prefix)]
    return {name.removeprefix(prefix): accuracy(groups, name) for name in names}
