"""The hidden ground truth of the demo world. NO STAGE MAY IMPORT THIS; only the demo's labeller and
tools.compare do.

score = content (right, or the share of what was asked) x form (length, capital, ending, worked step, closing)
        x no repeated sentence x (share of attested word pairs)^2 x finished
"""

import random
import re
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from data.demo import world
from data.demo.phrases import CLOSINGS, REASONS
from data.demo.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    GIFT_KIND,
    GIFTS,
    NAMES,
    OBJECTS,
    THINGS,
    VALUES,
)
from data.demo.world import Task


class Judgement(NamedTuple):
    """score: 0..1; correct: says what was asked and nothing against it; family: of the prompt."""

    score: float
    correct: bool
    family: str


LENGTHS = {
    "story": (130, 300),
    "letter": (66, 190),
    "sum": (34, 120),
    "fact": (32, 110),
}  # characters, inclusive
SENTENCES = {
    "story": 6,
    "letter": 5,
    "sum": 2,
    "fact": 2,
}  # at most; greeting and closing of a letter count
PARTIAL = 0.3  # an incorrect answer keeps at most this share of its score
UNFINISHED = 0.6  # never stopped by itself
DEFECT = 0.7  # each defect of form

_CLASS = {}
for _label, _words in (
    ("name", NAMES), ("animal", ANIMALS), ("object", OBJECTS), ("colour", COLOURS), ("adjective", ADJECTIVES),
    ("things", THINGS), ("object", THINGS.values()),
):  # fmt: skip
    for (
        _word
    ) in _words:  # words that follow "an" are a class of their own, so that "a owl" is not attested
        _CLASS[_word] = f"<{_label}{' an' if _word[0] in 'aeiou' else ''}>"

_TOKEN = re.compile(r"[A-Za-z'-]+|\d+|\n|[^\w\s]")
_WORD = re.compile(r"[A-Za-z'-]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_EQUATION = re.compile(r"(\d+) (plus|minus|and) (\d+) (?:is|makes|leaves|are) (\d+)")
_FIRST = re.compile(r"(?:starts with|has) (\d+) \w+(?: and|\.)")
_ENDING = re.compile(r"\b(?:happy|happily|smiled|glad)\b")
_CLOSING = re.compile(rf"\n(?i:{'|'.join(CLOSINGS)}), (\w+)$")
_ASKS = re.compile(
    r"\?|(?:^|[.\n] ?)(?:Write |Tell me |Please (?:write|thank) |Say |Help me |If \w+ (?:has|had) )"
)
_CLAIM = {
    kind: re.compile(rf"\b(?:({'|'.join(ANIMALS)})|({'|'.join(values)}))\b", re.IGNORECASE)
    for kind, values in VALUES.items()
}


def _pairs(text: str) -> list[tuple[str, str]]:
    tokens = [_CLASS.get(t) or ("<number>" if t[0].isdigit() else t) for t in _TOKEN.findall(text)]
    return list(zip(["<start>", *tokens], [*tokens, "<end>"], strict=True))


@cache
def _attested() -> dict[str, frozenset[tuple[str, str]]]:
    rng, found = random.Random(0), {}
    for family, number in (("story", 4000), ("letter", 4000), ("sum", 8000), ("fact", 5000)):
        texts = (world.good(world.draw(rng, family), rng) for _ in range(number))
        found[family] = frozenset(pair for text in texts for pair in _pairs(text))
    return found


def _story(task: Task, text: str) -> tuple[float, bool, float]:
    adj, animal, thing = (task.slots[k] for k in ("adj", "animal", "object"))
    words = _WORD.findall(text.lower())
    pairs = set(pairwise(words))
    heroes = {(a, b) for a, b in pairs if b in _ANIMAL_SET and a in _ADJECTIVE_SET}
    said = set(words)
    asked = ((adj, animal) in pairs, thing in said)
    strange = (
        (said & _ANIMAL_SET) - {animal}
        or (said & _OBJECT_SET) - {thing}
        or heroes - {(adj, animal)}
    )
    sentences = _SENTENCE.split(text)
    form = 1.0 if _ENDING.search(sentences[-1].replace(adj, "")) else DEFECT
    return (
        sum(asked) / 2,
        all(asked) and not strange,
        form * (1.0 if len(sentences) >= 3 else DEFECT),
    )


def _letter(task: Task, text: str) -> tuple[float, bool, float]:
    name, colour, gift = (task.slots[k] for k in ("name", "colour", "gift"))
    closing = _CLOSING.search(text)
    body = text[: closing.start()] if closing else text
    words = _WORD.findall(body)
    said = set(words)
    asked = (name in said, f"{colour} {gift}" in body)
    strange = (
        (said & _GIFT_SET) - {gift}
        or (said & _COLOUR_SET) - {colour}
        or (said & _NAME_SET) - {name}
    )
    form = 1.0 if closing and closing[1] in _NAME_SET and closing[1] != name else DEFECT
    form *= 1.0 if body.startswith(f"Dear {name},\n") or name not in said else DEFECT
    own = REASONS[GIFT_KIND[gift]]
    if any(r in body and r not in own for reasons in REASONS.values() for r in reasons):
        form *= DEFECT  # says of a drum that it fits
    return sum(asked) / 2, all(asked) and not strange, form


def _sum(task: Task, text: str) -> tuple[float, bool, float]:
    a, b, r = task.slots["a"], task.slots["b"], str(world.result(task))
    words = set(_WORD.findall(text))
    numbers = re.findall(
        r"\d+", " ".join(dict.fromkeys(_SENTENCE.split(text)))
    )  # said twice is no new claim
    equations = _EQUATION.findall(text)
    things = task.slots["things"]
    strange = (words & _NAME_SET) - {task.slots["name"]} or (words & _THING_SET) - {
        things,
        THINGS[things],
    }
    right = bool(numbers) and numbers[-1] == r and set(numbers) <= {a, b, r} and not strange
    right = right and all(e == (a, task.kind, b, r) for e in equations)
    start = _FIRST.search(text)
    right = right and not (start and start[1] != a and "starts" in start[0])
    topic = bool(numbers) and bool(
        words & {task.slots["name"], things, THINGS[things], "plus", "minus"}
    )
    return 0.5 * topic, right, 1.0 if equations else DEFECT


def _fact(task: Task, text: str) -> tuple[float, bool, float]:
    wanted = dict(
        zip((task.slots["first"], task.slots["second"]), world.truth(task).values(), strict=True)
    )
    claims: dict[str, set[str]] = {}
    bare, animal = [], ""
    for name, value in _CLAIM[task.kind].findall(text):
        if name:
            animal = name.lower()
            claims.setdefault(animal, set())
        elif animal:
            claims[animal].add(value.lower())
        else:
            bare.append(value.lower())
    if not claims:  # "In the sea and in the garden." answers in the order asked
        return 0.5 * any(v in wanted.values() for v in bare), bare == list(wanted.values()), DEFECT
    right = [claims.get(a) == {v} for a, v in wanted.items()]
    return sum(right) / 2, all(right) and set(claims) == set(wanted) and not bare, 1.0


_ANIMAL_SET, _OBJECT_SET, _ADJECTIVE_SET = (
    frozenset(ANIMALS),
    frozenset(OBJECTS),
    frozenset(ADJECTIVES),
)
_GIFT_SET, _COLOUR_SET, _NAME_SET = frozenset(GIFTS), frozenset(COLOURS), frozenset(NAMES)
_THING_SET = frozenset(THINGS) | frozenset(THINGS.values())
_JUDGES = {"story": _story, "letter": _letter, "sum": _sum, "fact": _fact}


def judge(prompt: str, answer: str, stopped: bool = True) -> Judgement:
    """The true quality of `answer`. `stopped`: it ended by itself. ValueError where the prompt is
    not of this world."""
    task = world.parse(prompt)
    if task is None:
        raise ValueError(f"not a prompt of the demo world: {prompt!r}")
    text = answer.strip()
    if not text:
        return Judgement(0.0, False, task.family)
    share, correct, form = _JUDGES[task.family](task, text)
    content = 1.0 if correct else PARTIAL * share
    low, high = LENGTHS[task.family]
    if not low <= len(text) <= high:
        form *= DEFECT
    if len(text) < low / 2 or len(text) > 2 * high:
        form *= DEFECT
    form *= 1.0 if text[0].isupper() else DEFECT
    if task.family != "letter" or not _CLOSING.search(text):
        form *= 1.0 if text[-1] in ".!" else DEFECT
    if _ASKS.search(text):
        content, correct = 0.05 * content, False  # goes on asking instead of answering
    sentences = [s.rstrip(".!,") for s in _SENTENCE.split(text)]
    repeated = len(sentences) - len(set(sentences))
    if len(sentences) > SENTENCES[task.family]:
        form *= DEFECT
    pairs = _pairs(text)
    attested = _attested()[task.family]
    fluent = (sum(pair in attested for pair in pairs) / len(pairs)) ** 2
    score = content * form * 0.5 ** min(repeated, 3) * fluent * (1.0 if stopped else UNFINISHED)
    return Judgement(score, correct, task.family)
