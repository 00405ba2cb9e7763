"""The grammar of the demo world: four families of prompts, how to parse them, and good answers to
them.

A `Task` is what a prompt asks for, without its wording. `good(task, rng)` writes a clean answer;
giving it a task with one slot changed writes a clean answer to something else, which is how wrong
answers are made (flaws.py).
"""

import random
import re
from functools import cache, lru_cache
from typing import NamedTuple

from data.demo.phrases import (
    BEGIN,
    BEGIN_AND_FIND,
    CLOSINGS,
    ENDINGS,
    FIND,
    PROMPTS,
    REASONS,
    STATED,
    THANKS,
    TURNS,
    WARM,
    WORKED,
)  # fmt: skip
from data.demo.words import (
    ADJECTIVES,
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    FACTS,
    GIFT_KIND,
    GIFTS,
    NAMES,
    OBJECTS,
    THINGS,
)  # fmt: skip

FAMILIES = ("story", "letter", "sum", "fact")
LARGEST, MOST = (
    9,
    18,
)  # sums: operands are 1..LARGEST, results 0..MOST (larger numbers would be two tokens)


class Task(NamedTuple):
    """family: one of FAMILIES; kind: "plus"/"minus" or an attribute or ""; slots: the words and
    numbers asked for."""

    family: str
    kind: str
    slots: dict[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two prompts the same question, whatever their wording (and the order of two
        animals)."""
        values = list(self.slots.values())
        return (self.family, self.kind, *(sorted(values) if self.family == "fact" else values))


def article(word: str) -> str:
    """`word` with "a" or "an" before it."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def count(number: int, things: str) -> str:
    """ "1 apple", "3 apples", "0 apples"."""
    return f"{number} {THINGS[things] if number == 1 else things}"


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    i, j = rng.randrange(len(words)), rng.randrange(len(words) - 1)
    return words[i], words[j + (j >= i)]


def numbers(rng: random.Random, op: str) -> tuple[int, int]:
    """Operands of a sum whose result is 0..MOST."""
    if op == "minus":
        a = rng.randint(2, LARGEST)
        return a, rng.randint(1, a)
    a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    while a + b > MOST:
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    return a, b


def draw(rng: random.Random, family: str) -> Task:
    """A random task of the family, even over its slots."""
    pick = rng.choice
    if family == "story":
        return Task(
            family, "", {"adj": pick(ADJECTIVES), "animal": pick(ANIMALS), "object": pick(OBJECTS)}
        )
    if family == "letter":
        return Task(family, "", {"name": pick(NAMES), "colour": pick(COLOURS), "gift": pick(GIFTS)})
    if family == "sum":
        op = pick(("plus", "minus"))
        a, b = numbers(rng, op)
        return Task(
            family, op, {"name": pick(NAMES), "things": pick(_THINGS), "a": str(a), "b": str(b)}
        )
    first, second = _two(rng, ANIMALS)
    return Task(family, pick(ATTRIBUTES), {"first": first, "second": second})


_THINGS = list(THINGS)


def ask(task: Task, rng: random.Random) -> str:
    """One of the family's wordings of the task."""
    return wordings(task)[rng.randrange(5)]


def wordings(task: Task) -> list[str]:
    """All wordings of the task: always five."""
    slots = dict(task.slots)
    if task.family == "story":
        slots |= {"adj+": article(slots["adj"]), "object+": article(slots["object"])}
    if task.family == "sum":
        slots["thing"] = THINGS[slots["things"]] if slots["a"] == "1" else slots["things"]
    return [template.format_map(slots) for template in PROMPTS[task.family, task.kind]]


@cache
def _patterns() -> list[tuple[str, str, re.Pattern]]:
    found = []
    for (family, kind), templates in PROMPTS.items():
        for template in templates:
            pattern, seen = "", set()
            for literal, slot in re.findall(r"([^{]*)(?:\{([a-z]+\+?)\})?", template):
                name = slot.rstrip("+")
                group = f"(?P={name})" if name in seen else rf"(?P<{name}>\w+)"
                pattern += (
                    re.escape(literal)
                    + ("an? " if slot.endswith("+") else "")
                    + (group if slot else "")
                )
                seen.add(name)
            found.append((family, kind, re.compile(pattern)))
    return found


@lru_cache(maxsize=20_000)
def parse(prompt: str) -> Task | None:
    """The task that `prompt` asks for, or None where it is not a prompt of this world."""
    for family, kind, pattern in _patterns():
        if match := pattern.fullmatch(prompt.strip()):
            slots = match.groupdict()
            slots.pop("thing", None)
            order = {"sum": ("name", "things", "a", "b"), "fact": ("first", "second")}.get(
                family, tuple(slots)
            )
            return Task(
                family,
                kind,
                {name: slots[name] for name in (_LETTER if family == "letter" else order)},
            )
    return None


_LETTER = ("name", "colour", "gift")


def result(task: Task) -> int:
    """The right number of a sum."""
    a, b = int(task.slots["a"]), int(task.slots["b"])
    return a + b if task.kind == "plus" else a - b


def truth(task: Task) -> dict[str, str]:
    """What a good answer states beyond the prompt's own words: the sum's number, the two facts
    (slots x and y)."""
    if task.family == "sum":
        return {"r": str(result(task))}
    if task.family == "fact":
        return {
            "x": FACTS[task.slots["first"]][task.kind],
            "y": FACTS[task.slots["second"]][task.kind],
        }
    return {}


def story_parts(task: Task, rng: random.Random) -> list[str]:
    """Four or five sentences: beginning, turn, outcome, happy ending."""
    adj, animal, thing = (task.slots[k] for k in ("adj", "animal", "object"))
    slots = {
        "adj": adj,
        "animal": animal,
        "object": thing,
        "adj+": article(adj),
        "object+": article(thing),
    }
    slots["Adj+"] = slots["adj+"].capitalize()
    opening = (
        [rng.choice(BEGIN_AND_FIND)]
        if rng.random() < 0.5
        else [rng.choice(BEGIN), rng.choice(FIND)]
    )
    turn, outcomes = rng.choice(TURNS)
    return [
        part.format_map(slots)
        for part in (*opening, turn, rng.choice(outcomes), rng.choice(ENDINGS))
    ]


def letter_parts(task: Task, rng: random.Random) -> list[str]:
    """Greeting, thanks, one or two sentences of reason, closing."""
    name, colour, gift = (task.slots[k] for k in ("name", "colour", "gift"))
    body = [
        rng.choice(THANKS).format(colour=colour, gift=gift),
        rng.choice(REASONS[GIFT_KIND[gift]]),
    ]
    if rng.random() < 0.6:
        body.append(rng.choice(WARM))
    signer = rng.choice(NAMES)
    while signer == name:
        signer = rng.choice(NAMES)
    return [f"Dear {name},", *body, f"{rng.choice(CLOSINGS)}, {signer}"]


def join_letter(parts: list[str]) -> str:
    """The letter as three lines: greeting, body, closing."""
    return "\n".join((parts[0], " ".join(parts[1:-1]), parts[-1]))


def good(task: Task, rng: random.Random, stated: dict[str, str] | None = None) -> str:
    """A clean answer. `stated` overrides what is claimed (default: the truth)."""
    if task.family == "story":
        return " ".join(story_parts(task, rng))
    if task.family == "letter":
        return join_letter(letter_parts(task, rng))
    claim = stated or truth(task)
    if task.family == "fact":
        return rng.choice(STATED[task.kind]).format(**task.slots, **claim)
    name, things, a, b = (task.slots[k] for k in ("name", "things", "a", "b"))
    r = claim["r"]
    template = rng.choice(WORKED[task.kind])
    return template.format(
        name=name, a=a, b=b, r=r, A=count(int(a), things), R=count(int(r), things)
    )
