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
)
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
)

FAMILIES = ("story", "letter", "sum", "fact")
# Operands of sums are 1..LARGEST, results 0..MOST: larger numbers would be two tokens.
LARGEST, MOST = 9, 18
# The slots of a task in the order of its key, whatever the order of a prompt's words.
_SLOTS = {
    "story": ("adj", "animal", "object"),
    "letter": ("name", "colour", "gift"),
    "sum": ("name", "things", "a", "b"),
    "fact": ("first", "second"),
}
_THINGS = list(THINGS)


class Task(NamedTuple):
    """What a prompt asks for, without its wording."""

    family: str  # one of FAMILIES
    kind: str  # "plus" or "minus" of a sum, the attribute of a fact, else ""
    slots: dict[str, str]  # the words and numbers asked for, by the names of _SLOTS

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
    """The number and the word for so many: "1 apple", "3 apples", "0 apples"."""
    return f"{number} {THINGS[things] if number == 1 else things}"


def _two(rng: random.Random, words: list[str]) -> tuple[str, str]:
    """Two different words."""
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
    pick, kind = rng.choice, ""
    words: tuple[str, ...]
    if family == "story":
        words = pick(ADJECTIVES), pick(ANIMALS), pick(OBJECTS)
    elif family == "letter":
        words = pick(NAMES), pick(COLOURS), pick(GIFTS)
    elif family == "sum":
        kind = pick(("plus", "minus"))
        a, b = numbers(rng, kind)
        words = pick(NAMES), pick(_THINGS), str(a), str(b)
    else:
        words = _two(rng, ANIMALS)
        kind = pick(ATTRIBUTES)
    return Task(family, kind, dict(zip(_SLOTS[family], words, strict=True)))


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


def _pattern(template: str) -> re.Pattern:
    """What matches a wording and captures its slots; a slot that ends in + has its article."""
    pattern, seen = "", set()
    for literal, slot in re.findall(r"([^{]*)(?:\{([a-z]+\+?)\})?", template):
        pattern += re.escape(literal)
        if slot:
            name = slot.rstrip("+")
            pattern += "an? " if slot.endswith("+") else ""
            pattern += f"(?P={name})" if name in seen else rf"(?P<{name}>\w+)"
            seen.add(name)
    return re.compile(pattern)


@cache
def _patterns() -> list[tuple[str, str, re.Pattern]]:
    """(family, kind, pattern) of each wording."""
    return [
        (family, kind, _pattern(template))
        for (family, kind), templates in PROMPTS.items()
        for template in templates
    ]


@lru_cache(maxsize=20_000)
def parse(prompt: str) -> Task | None:
    """The task that `prompt` asks for, or None where it is not a prompt of this world."""
    for family, kind, pattern in _patterns():
        if match := pattern.fullmatch(prompt.strip()):
            return Task(family, kind, {slot: match[slot] for slot in _SLOTS[family]})
    return None


def task_of(prompt: str) -> Task:
    """`parse` of a prompt that must be one of this world. ValueError where it is not."""
    task = parse(prompt)
    if task is None:
        raise ValueError(f"not a prompt of the demo world: {prompt!r}")
    return task


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
    adj, thing = article(task.slots["adj"]), article(task.slots["object"])
    slots = task.slots | {"adj+": adj, "Adj+": adj.capitalize(), "object+": thing}
    if rng.random() < 0.5:
        parts = [rng.choice(BEGIN_AND_FIND)]
    else:
        parts = [rng.choice(BEGIN), rng.choice(FIND)]
    turn, outcomes = rng.choice(TURNS)
    parts += [turn, rng.choice(outcomes), rng.choice(ENDINGS)]
    return [part.format_map(slots) for part in parts]


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
    """A clean answer; `stated` overrides what it claims (default: the truth)."""
    if task.family == "story":
        return " ".join(story_parts(task, rng))
    if task.family == "letter":
        return join_letter(letter_parts(task, rng))
    claim = stated or truth(task)
    if task.family == "fact":
        return rng.choice(STATED[task.kind]).format(**task.slots, **claim)
    things, r = task.slots["things"], claim["r"]
    counts = {"A": count(int(task.slots["a"]), things), "R": count(int(r), things)}
    return rng.choice(WORKED[task.kind]).format_map(task.slots | counts | {"r": r})
