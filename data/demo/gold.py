"""The hidden ground truth of the demo world. NO STAGE MAY IMPORT THIS; only the demo's labeller and
tools.compare do.

score = content (right, or the share of what was asked)
        x form (length, capital, ending, worked step, closing)
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
    """The true quality of an answer."""

    score: float  # 0..1
    correct: bool  # it says what was asked, and nothing against it
    family: str  # of the prompt


# The shortest and the longest answer that is no defect, in characters.
LENGTHS = {"story": (130, 300), "letter": (66, 190), "sum": (34, 120), "fact": (32, 110)}
# The most sentences that are no defect; greeting and closing of a letter count.
SENTENCES = {"story": 6, "letter": 5, "sum": 2, "fact": 2}
PARTIAL = 0.3  # an incorrect answer keeps at most this share of its score
UNFINISHED = 0.6  # never stopped by itself
DEFECT = 0.7  # each defect of form


def _classes() -> dict[str, str]:
    """Word -> its class, which stands for it in word pairs.

    Words that follow "an" are a class of their own, so that "a owl" is not attested.
    """
    classes = {}
    for label, words in (
        ("name", NAMES),
        ("animal", ANIMALS),
        ("object", OBJECTS),
        ("colour", COLOURS),
        ("adjective", ADJECTIVES),
        ("things", THINGS),
        ("object", THINGS.values()),
    ):
        for word in words:
            classes[word] = f"<{label}{' an' if word[0] in 'aeiou' else ''}>"
    return classes


_CLASS = _classes()
_TOKEN = re.compile(r"[A-Za-z'-]+|\d+|\n|[^\w\s]")
_WORD = re.compile(r"[A-Za-z'-]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_EQUATION = re.compile(r"(\d+) (plus|minus|and) (\d+) (?:is|makes|leaves|are) (\d+)")
_FIRST = re.compile(r"(?:starts with|has) (\d+) \w+(?: and|\.)")
_ENDING = re.compile(r"\b(?:happy|happily|smiled|glad)\b")
_CLOSING = re.compile(rf"\n(?i:{'|'.join(CLOSINGS)}), (\w+)$")
_ASKS = re.compile(  # a question, or the beginning of another prompt
    r"\?|(?:^|[.\n] ?)(?:Write |Tell me |Please (?:write|thank) |Say |Help me |If \w+ (?:has|had) )"
)
_CLAIM = {
    kind: re.compile(rf"\b(?:({'|'.join(ANIMALS)})|({'|'.join(values)}))\b", re.IGNORECASE)
    for kind, values in VALUES.items()
}


_ANIMAL_SET, _OBJECT_SET = frozenset(ANIMALS), frozenset(OBJECTS)
_ADJECTIVE_SET, _NAME_SET = frozenset(ADJECTIVES), frozenset(NAMES)
_GIFT_SET, _COLOUR_SET = frozenset(GIFTS), frozenset(COLOURS)
_THING_SET = frozenset(THINGS) | frozenset(THINGS.values())


def _pairs(text: str) -> list[tuple[str, str]]:
    """The text's pairs of neighbouring words, names and numbers put into classes."""
    tokens = [_CLASS.get(t) or ("<number>" if t[0].isdigit() else t) for t in _TOKEN.findall(text)]
    return list(zip(["<start>", *tokens], [*tokens, "<end>"], strict=True))


@cache
def _attested() -> dict[str, frozenset[tuple[str, str]]]:
    """Family -> the word pairs of its clean answers, as far as thousands of them show."""
    rng, found = random.Random(0), {}
    for family, number in (("story", 4000), ("letter", 4000), ("sum", 8000), ("fact", 5000)):
        texts = (world.good(world.draw(rng, family), rng) for _ in range(number))
        found[family] = frozenset(pair for text in texts for pair in _pairs(text))
    return found


class _Content(NamedTuple):
    """What the judge of a family says of an answer."""

    share: float  # 0..1, of what was asked
    correct: bool
    form: float  # 1, less DEFECT for each defect of form that the family alone has


def _story(task: Task, text: str) -> _Content:
    """Hero and object are those asked for, no others come up, and it ends well."""
    adj, animal, thing = (task.slots[slot] for slot in ("adj", "animal", "object"))
    words = _WORD.findall(text.lower())
    said, pairs = set(words), set(pairwise(words))
    heroes = {(a, b) for a, b in pairs if b in _ANIMAL_SET and a in _ADJECTIVE_SET}
    asked = ((adj, animal) in pairs, thing in said)
    strange = (
        (said & _ANIMAL_SET) - {animal}
        or (said & _OBJECT_SET) - {thing}
        or heroes - {(adj, animal)}
    )
    sentences = _SENTENCE.split(text)
    form = 1.0 if _ENDING.search(sentences[-1].replace(adj, "")) else DEFECT
    form *= 1.0 if len(sentences) >= 3 else DEFECT
    return _Content(sum(asked) / 2, all(asked) and not strange, form)


def _letter(task: Task, text: str) -> _Content:
    """Name and gift are those asked for, no others come up; greeting, fitting reason, closing."""
    name, colour, gift = (task.slots[slot] for slot in ("name", "colour", "gift"))
    closing = _CLOSING.search(text)
    body = text[: closing.start()] if closing else text
    said = set(_WORD.findall(body))
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
    return _Content(sum(asked) / 2, all(asked) and not strange, form)


def _sum(task: Task, text: str) -> _Content:
    """The last number is the result, every number and equation is the task's; a worked step."""
    name, things, a, b = (task.slots[slot] for slot in ("name", "things", "a", "b"))
    r, own_things = str(world.result(task)), {things, THINGS[things]}
    words = set(_WORD.findall(text))
    said_once = " ".join(dict.fromkeys(_SENTENCE.split(text)))  # said twice is no new claim
    numbers = re.findall(r"\d+", said_once)
    equations = _EQUATION.findall(text)
    start = _FIRST.search(text)
    strange = (words & _NAME_SET) - {name} or (words & _THING_SET) - own_things
    right = (
        bool(numbers)
        and numbers[-1] == r
        and set(numbers) <= {a, b, r}
        and not strange
        and all(equation == (a, task.kind, b, r) for equation in equations)
        and not (start and start[1] != a and "starts" in start[0])
    )
    topic = bool(numbers) and bool(words & {name, *own_things, "plus", "minus"})
    return _Content(0.5 * topic, right, 1.0 if equations else DEFECT)


def _fact(task: Task, text: str) -> _Content:
    """Each of the two animals has its own value, and no other animal has one."""
    animals, values = (task.slots["first"], task.slots["second"]), world.truth(task).values()
    wanted = dict(zip(animals, values, strict=True))
    claims: dict[str, set[str]] = {}
    bare, animal = [], ""  # values said before any animal; the animal spoken of
    for name, value in _CLAIM[task.kind].findall(text):
        if name:
            animal = name.lower()
            claims.setdefault(animal, set())
        elif animal:
            claims[animal].add(value.lower())
        else:
            bare.append(value.lower())
    if not claims:  # "In the sea and in the garden." answers in the order asked
        share = 0.5 * any(value in wanted.values() for value in bare)
        return _Content(share, bare == list(wanted.values()), DEFECT)
    right = [claims.get(animal) == {value} for animal, value in wanted.items()]
    correct = all(right) and set(claims) == set(wanted) and not bare
    return _Content(sum(right) / 2, correct, 1.0)


_JUDGES = {"story": _story, "letter": _letter, "sum": _sum, "fact": _fact}


def _defects(family: str, text: str) -> int:
    """How many defects of form all families know: length, capital, full stop, many sentences."""
    low, high = LENGTHS[family]
    closed = family == "letter" and bool(_CLOSING.search(text))
    defects = (
        not low <= len(text) <= high,
        len(text) < low / 2 or len(text) > 2 * high,
        not text[0].isupper(),
        not closed and text[-1] not in ".!",
        len(_SENTENCE.split(text)) > SENTENCES[family],
    )
    return sum(defects)


def judge(prompt: str, answer: str, stopped: bool = True) -> Judgement:
    """The true quality of `answer`; `stopped`: it ended by itself.

    Raises ValueError where the prompt is not of this world.
    """
    task = world.task_of(prompt)
    text = answer.strip()
    if not text:
        return Judgement(0.0, False, task.family)
    share, correct, form = _JUDGES[task.family](task, text)
    content = 1.0 if correct else PARTIAL * share
    if _ASKS.search(text):
        content, correct = 0.05 * content, False  # goes on asking instead of answering
    sentences = [s.rstrip(".!,") for s in _SENTENCE.split(text)]
    repeated = len(sentences) - len(set(sentences))
    pairs = _pairs(text)
    attested = _attested()[task.family]
    fluent = (sum(pair in attested for pair in pairs) / len(pairs)) ** 2
    for _ in range(_defects(task.family, text)):
        form *= DEFECT
    score = content * form * 0.5 ** min(repeated, 3) * fluent * (1.0 if stopped else UNFINISHED)
    return Judgement(score, correct, task.family)
