"""The gate of a report: what must hold, and in one line whether it does."""

from collections.abc import Sequence
from typing import Any

from tools.compare.modes import modes

# Wanted of (base, sft, rl), the first three models of a comparison. Gold and accuracies are shares
# of 1.
BASE_AT_MOST = 0.15  # sampled gold: a base model goes on with the document instead of answering
SFT_AT_LEAST = 0.45  # sampled gold
RL_GAIN = 0.15  # sampled gold of rl over sft, with disjoint intervals; greedy: disjoint intervals
# most that rl may lose in correct answers of any family, sampled or greedy: a mean hides such
# losses
FAMILY_DROP = 0.03
REWARD_ACCURACY = 0.75  # of the reward model against gold on held-out pairs

Check = dict[str, Any]  # {"name", "value", "wanted", "passed"}


def want(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Check:
    """One check; name exactly one bound."""
    tiny = 1e-9  # .97 - 1 is a little less than -.03
    if above is not None:
        passed, wanted = value > above + tiny, f"> {above:g}"
    elif at_least is not None:
        passed, wanted = value >= at_least - tiny, f">= {at_least:g}"
    else:
        passed, wanted = value <= at_most + tiny, f"<= {at_most:g}"
    return {"name": name, "value": round(value, 6), "wanted": wanted, "passed": bool(passed)}


def failures(checks: Sequence[Check]) -> list[str]:
    return [
        f"{check['name']} is {check['value']:.3f}, not {check['wanted']}"
        for check in checks
        if not check["passed"]
    ]


def checks(result: dict[str, Any], names: Sequence[str]) -> list[Check]:
    """What a comparison (see tools.compare) of base, sft and rl must show; without gold only that
    the reward rose."""
    if len(names) < 3 or "sampled" not in result:
        return []
    base, sft, rl = names[:3]
    if "gold" not in result["sampled"][base]:
        rows = [result["sampled"][name].get("reward") for name in (sft, rl)]
        rise = rows[1]["mean"] - rows[0]["mean"] if all(rows) else 0.0
        return [want(f"sampled reward, {rl} - {sft}", rise, above=0)] if all(rows) else []
    gold = {
        mode: {name: result[mode][name]["gold"] for name in (base, sft, rl)}
        for mode in modes(result)
    }
    sampled = {name: row["mean"] for name, row in gold["sampled"].items()}
    found = [
        want(f"sampled gold of {base}", sampled[base], at_most=BASE_AT_MOST),
        want(f"sampled gold of {sft}", sampled[sft], at_least=SFT_AT_LEAST),
        want(f"sampled gold, {rl} - {sft}", sampled[rl] - sampled[sft], at_least=RL_GAIN),
    ]
    for mode, row in gold.items():
        apart = row[rl]["ci95"][0] - row[sft]["ci95"][1]
        found.append(want(f"{mode} gold, {rl}'s interval above {sft}'s", apart, above=0))
    for mode in gold:
        for kind, now in result[mode][rl]["families"].items():
            change = now["correct"] - result[mode][sft]["families"][kind]["correct"]
            found.append(
                want(f"{mode} correct {kind}, {rl} - {sft}", change, at_least=-FAMILY_DROP)
            )
    if "reward_model" in result:
        accuracy = result["reward_model"]["accuracy"] or 0.0  # null: not a single pair
        found.append(
            want("reward model's accuracy against gold", accuracy, at_least=REWARD_ACCURACY)
        )
    return found


def verdict(result: dict[str, Any], names: Sequence[str]) -> tuple[bool, str]:
    """(passed, one line) of a comparison: the figures, and each check that failed."""
    kind = next(
        (kind for kind in ("gold", "reward") if kind in result[modes(result)[0]][names[0]]), None
    )
    words = [
        f"{mode} {kind} "
        + ", ".join(f"{name} {row[kind]['mean']:.3f}" for name, row in result[mode].items())
        for mode in (modes(result) if kind else ())
    ]
    total, failed = len(result["checks"]), failures(result["checks"])
    words += [f"{total - len(failed)} of {total} checks hold"] if total else []
    return not failed, "; ".join(
        [*words, *failed]
    ) or f"{len(names)} models answered {result['prompts']} prompts"
