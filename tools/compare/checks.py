"""The gate of a report: what must hold, and in one line whether it does."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from common.config.schema import stage_config
from common.handoff.report import Gate
from tools.compare.modes import modes

Check = dict[str, Any]  # {"name", "value", "wanted", "passed"}, of a family also "interval"
Share = Annotated[float, Field(ge=0, le=1)]


@stage_config
class Bars:
    """What gold must say of base, sft and rl, the first three models; null = no such check."""

    base_gold_at_most: Share | None = None
    """Sampled gold of the base model."""
    sft_gold_at_least: Share | None = None
    """Sampled gold of the SFT model."""
    rl_gold_gain: Share | None = None
    """Sampled gold of rl over sft; the intervals must be disjoint, sampled and greedy."""
    family_drop_at_most: Share | None = None
    """Most that rl may lose in correct sampled answers of any family: a mean hides such losses. It
    may lose more where the interval of the loss reaches 0, so that it may be chance."""
    reward_accuracy_at_least: Share | None = None
    """The reward model's accuracy against gold on held-out pairs."""


def want(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Check:
    """One check; name exactly one bound. Raises ValueError without any."""
    tiny = 1e-9  # .97 - 1 is a little less than -.03
    if above is not None:
        passed, wanted = value > above + tiny, f"> {above:g}"
    elif at_least is not None:
        passed, wanted = value >= at_least - tiny, f">= {at_least:g}"
    elif at_most is not None:
        passed, wanted = value <= at_most + tiny, f"<= {at_most:g}"
    else:
        raise ValueError(f"{name}: no bound is named")
    return {"name": name, "value": round(value, 6), "wanted": wanted, "passed": bool(passed)}


def value_of(check: Check) -> str:
    """The value of a check, for people, with its interval where it has one."""
    ends = check.get("interval")
    return f"{check['value']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def failures(checks: Sequence[Check]) -> list[str]:
    """A line for each check that does not hold."""
    return [
        f"{check['name']} is {value_of(check)}, not {check['wanted']}"
        for check in checks
        if not check["passed"]
    ]


def check_comparison(
    result: dict[str, Any], names: Sequence[str], bars: Bars | None
) -> list[Check]:
    """The checks of a comparison (compare.json) of base, sft and rl: without gold that the reward
    rose, with gold what `bars` ask for."""
    if len(names) < 3 or "sampled" not in result:
        return []
    base, sft, rl = names[:3]
    if "gold" not in result["sampled"][base]:
        rows = [result["sampled"][name].get("reward") for name in (sft, rl)]
        if not all(rows):
            return []
        rise = rows[1]["mean"] - rows[0]["mean"]
        return [want(f"sampled reward, {rl} - {sft}", rise, above=0)]
    if bars is None:
        return []
    found = check_gold(result, (base, sft, rl), bars)
    if bars.family_drop_at_most is not None:
        found += check_families(result["changes"], bars.family_drop_at_most)
    if bars.reward_accuracy_at_least is not None and "reward_model" in result:
        accuracy = result["reward_model"]["accuracy"] or 0.0  # null: not a single pair
        name, least = "reward model's accuracy against gold", bars.reward_accuracy_at_least
        found.append(want(name, accuracy, at_least=least))
    return found


def check_gold(result: dict[str, Any], names: tuple[str, str, str], bars: Bars) -> list[Check]:
    """The checks of mean gold, and that the intervals of sft and rl are disjoint."""
    base, sft, rl = names
    sampled = {name: result["sampled"][name]["gold"]["mean"] for name in names}
    found = []
    if bars.base_gold_at_most is not None:
        most = bars.base_gold_at_most
        found.append(want(f"sampled gold of {base}", sampled[base], at_most=most))
    if bars.sft_gold_at_least is not None:
        least = bars.sft_gold_at_least
        found.append(want(f"sampled gold of {sft}", sampled[sft], at_least=least))
    if bars.rl_gold_gain is not None:
        gain = sampled[rl] - sampled[sft]
        found.append(want(f"sampled gold, {rl} - {sft}", gain, at_least=bars.rl_gold_gain))
        for mode in modes(result):
            ends = [result[mode][name]["gold"]["ci95"] for name in (sft, rl)]
            apart = ends[1][0] - ends[0][1]
            found.append(want(f"{mode} gold, {rl}'s interval above {sft}'s", apart, above=0))
    return found


def check_families(changes: dict[str, Any], most: float) -> list[Check]:
    """That no family loses more of its correct sampled answers, unless that may be chance.

    Of greedy answers there is one a prompt, and a small change of the weights may flip many: they
    are shown, not judged.
    """
    found = []
    for kind, change in changes["sampled"]["families"].items():
        name = f"sampled correct {kind}, {changes['after']} - {changes['before']}"
        check = want(name, change["mean"], at_least=-most)
        check["wanted"] += ", or with 0 in the interval"
        check["passed"] = check["passed"] or not change["worse"]
        found.append(check | {"interval": change["interval"]})
    return found


def verdict(result: dict[str, Any], names: Sequence[str]) -> Gate:
    """The gate of a comparison: its figures in one line, and each check that failed."""
    first = result[modes(result)[0]][names[0]]
    kind = next((kind for kind in ("gold", "reward") if kind in first), None)
    words = []
    for mode in modes(result) if kind else ():
        means = (f"{name} {row[kind]['mean']:.3f}" for name, row in result[mode].items())
        words.append(f"{mode} {kind} " + ", ".join(means))
    total, failed = len(result["checks"]), failures(result["checks"])
    if total:
        words.append(f"{total - len(failed)} of {total} checks hold")
    text = "; ".join([*words, *failed])
    return Gate(not failed, text or f"{len(names)} models answered {result['prompts']} prompts")
