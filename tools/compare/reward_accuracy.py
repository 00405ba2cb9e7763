"""How often a reward model orders answers as the ground truth does, and on which answers."""

from collections.abc import Sequence
from typing import Any

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
    ids: list[list[int]] = []
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not (texts := row.data.get("answers")):
            continue
        stopped = row.data.get("stopped") or [True] * len(texts)
        try:
            messages = rows_to_prompt({"prompt": row.data.get("prompt")})
            prompt = prompt_ids(tokenizer, messages)
            verdicts = [
                gold(question(messages), text, end)
                for text, end in zip(texts, stopped, strict=True)
            ]
        except (InputError, ValueError) as error:
            raise InputError(f"{row.origin}: {error}") from None
        new = [
            [*prompt, *tokenizer.encode(t), *[tokenizer.eot_id] * end]
            for t, end in zip(texts, stopped, strict=True)
        ]
        if (longest := max(map(len, new))) > model.config.max_length:
            raise InputError(
                f"{row.origin}: {longest} tokens, the reward model's context is {model.config.max_length}"
            )
        sources = row.data.get("sources") or ["answer"] * len(texts)
        kept.append(
            {"gold": [v.score for v in verdicts], "family": verdicts[0].family, "sources": sources}
        )
        ids += new
    if not kept:
        raise InputError(
            "comparisons: no row has `answers`, so there is nothing to measure the reward model on"
        )
    scores = iter(reward_scores(model, ids))
    return order_statistics([(row, [next(scores) for _ in row["gold"]]) for row in kept])


def order_statistics(judged: Sequence[tuple[dict[str, Any], Sequence[float]]]) -> dict[str, Any]:
    """`reward_accuracy` from (gold, sources and family of a prompt's answers; their rewards)."""
    groups: dict[
        str, dict[int, list[float]]
    ] = {}  # name of a subset: prompt: 1 right, 0 wrong, 1/2 equal
    for prompt, (row, rewards) in enumerate(judged):
        for i in range(len(rewards)):
            for j in range(i):
                gap = row["gold"][i] - row["gold"][j]
                if abs(gap) < MINIMUM_GAP:
                    continue
                hit = (
                    0.5
                    if rewards[i] == rewards[j]
                    else float((rewards[i] > rewards[j]) == (gap > 0))
                )
                pair = " / ".join(sorted((row["sources"][i], row["sources"][j])))
                for name in ("all", f"source {pair}", f"family {row['family']}"):
                    groups.setdefault(name, {}).setdefault(prompt, []).append(hit)

    def accuracy(name: str) -> dict[str, Any]:
        hits = list(groups.get(name, {}).values())
        found = interval([sum(prompt) for prompt in hits], [len(prompt) for prompt in hits])
        return {"accuracy": found["mean"], "ci95": found["ci95"], "n": found["n"]}

    def part(prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): accuracy(name)
            for name in sorted(groups)
            if name.startswith(prefix)
        }

    everything, own = accuracy("all"), accuracy("source policy / policy")
    return {
        **(own if own["n"] else everything),
        "pairs": "the policy's own answers" if own["n"] else "all answers",
        "prompts": len(judged),
        "minimum_gap": MINIMUM_GAP,
        "all": everything,
        "by_source": part("source "),
        "by_family": part("family "),
    }
