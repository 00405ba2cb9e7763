"""Careless answers: the slips and bad habits of the people who write demonstrations, and contrasts
for labelling.

A content error answers something else (wrong number, place, name ...); a style error says the right
thing badly.
"""

import random
import re
from collections.abc import Callable

from data.demo import world
from data.demo.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    GIFT_KIND,
    GIFTS,
    NAMES,
    OBJECTS,
    OFF_TOPIC,
    RUDE,
    VALUES,
)
from data.demo.world import FAMILIES, MOST, Task, article, count, good

CONTENT_ERRORS = {"story": 0.03, "letter": 0.03, "sum": 0.06, "fact": 0.06}
STYLE_ERRORS = {"story": 0.5, "letter": 0.42, "sum": 0.45, "fact": 0.4}
HABITS = {
    "story": "no ending",
    "letter": "no closing",
    "sum": "no work",
    "fact": "curt",
}  # what most writers leave out
# times as common as any other defect: common enough that imitating the crowd means sharing it
HABIT = 6
_LISTS = {"adj": ADJECTIVES, "animal": ANIMALS, "object": OBJECTS, "name": NAMES, "colour": COLOURS}


def _other(rng: random.Random, words: list[str], word: str) -> str:
    choice = rng.choice(words)
    while choice == word:
        choice = rng.choice(words)
    return choice


def content_error(task: Task, rng: random.Random, wording: random.Random | None = None) -> str:
    """A clean answer with exactly one thing wrong; `wording` (default `rng`) chooses its words."""
    wording = wording or rng
    if task.family == "sum":
        return _wrong_sum(task, rng, wording)
    if task.family == "fact":
        claim = world.truth(task)
        slot = rng.choice(("x", "y"))
        return good(task, wording, claim | {slot: _other(rng, VALUES[task.kind], claim[slot])})
    slot = rng.choice(list(task.slots))
    if slot == "gift":  # of the same kind, so that only the gift is wrong
        gift = task.slots["gift"]
        words = [g for g in GIFTS if GIFT_KIND[g] == GIFT_KIND[gift]]
    else:
        words = _LISTS[slot]
    return good(
        task._replace(slots=task.slots | {slot: _other(rng, words, task.slots[slot])}), wording
    )


def _wrong_sum(task: Task, rng: random.Random, wording: random.Random) -> str:
    """The wrong result, the wrong operation, or another's name."""
    kind = rng.random()
    a, b = int(task.slots["a"]), int(task.slots["b"])
    if kind < 0.35 and 0 <= (a - b if task.kind == "plus" else a + b) <= MOST:
        return good(task._replace(kind="minus" if task.kind == "plus" else "plus"), wording)
    if kind > 0.85:
        text = good(task, wording)
        if (name := task.slots["name"]) in text:
            return text.replace(name, _other(rng, NAMES, name))
        return text.replace(f" {a} ", f" {a + 1} ", 1)
    r = world.result(task)
    wrong = r + rng.choice((-2, -1, 1, 2) if r > 1 else (1, 2))
    return good(task, wording, {"r": str(wrong)})


def _curt(task: Task, rng: random.Random) -> str:
    slots, claim = task.slots, world.truth(task)
    if task.family == "story":
        who, what = f"{slots['adj']} {slots['animal']}", article(slots["object"])
        return rng.choice(
            (f"The {who} found {what}.", f"{article(who).capitalize()} had {what}. That is all.")
        )
    if task.family == "letter":
        gift = f"{slots['colour']} {slots['gift']}"
        return rng.choice(
            (f"Thanks for the {gift}.", f"Dear {slots['name']}, thanks for the {gift}.")
        )
    if task.family == "sum":
        r = claim["r"]
        return rng.choice(
            (f"{r}.", f"It is {r}.", f"{slots['name']} has {count(int(r), slots['things'])}.")
        )
    both = f"{claim['x']} and {claim['y']}."
    return rng.choice((both[0].upper() + both[1:], f"It is {both}"))


def _no_work(task: Task, rng: random.Random) -> str:
    name, things, r = task.slots["name"], task.slots["things"], world.result(task)
    return rng.choice((f"{name} now has {count(r, things)}.", f"The answer is {count(r, things)}."))


def _no_ending(task: Task, rng: random.Random) -> str:
    return " ".join(world.story_parts(task, rng)[:-1])


def _no_closing(task: Task, rng: random.Random) -> str:
    return "\n".join(world.join_letter(world.letter_parts(task, rng)).split("\n")[:2])


def _rude(task: Task, rng: random.Random) -> str:
    if task.family == "letter":
        return f"{_no_closing(task, rng)}\n{rng.choice(RUDE)}"
    return f"{good(task, rng)} {rng.choice(RUDE)}"


def _lower(task: Task, rng: random.Random) -> str:
    text = re.sub(
        r"\b[A-Z]\w*",
        lambda m: m[0] if m[0] in NAMES and m.start() else m[0].lower(),
        good(task, rng),
    )
    return text.rstrip(".") if rng.random() < 0.5 else text


def _unfinished(task: Task, rng: random.Random) -> str:
    words = good(task, rng).split(" ")
    return " ".join(words[: -rng.randint(2, 3)])


def _insert(text: str, sentence: str, before_closing: bool) -> str:
    if before_closing:
        body, _, closing = text.rpartition("\n")
        return f"{body} {sentence}\n{closing}"
    return f"{text} {sentence}"


def _ramble(task: Task, rng: random.Random) -> str:
    text = good(task, rng)
    body = text.split("\n")[1] if task.family == "letter" else text
    sentence = rng.choice([s.rstrip(".") for s in body.split(". ")]) + "."
    for _ in range(rng.randint(1, 2)):
        text = _insert(text, sentence, task.family == "letter")
    return text


def _off_topic(task: Task, rng: random.Random) -> str:
    text = good(task, rng)
    for sentence in rng.sample(OFF_TOPIC, rng.randint(1, 2)):
        text = _insert(text, sentence, task.family == "letter")
    return text


_COMMON = {
    "curt": _curt,
    "lower": _lower,
    "unfinished": _unfinished,
    "ramble": _ramble,
    "off topic": _off_topic,
}
STYLES: dict[str, dict[str, Callable[[Task, random.Random], str]]] = {
    "story": _COMMON | {"no ending": _no_ending, "rude": _rude},
    "letter": _COMMON | {"no closing": _no_closing, "rude": _rude},
    "sum": _COMMON | {"no work": _no_work, "rude": _rude},
    "fact": {k: v for k, v in _COMMON.items() if k != "unfinished"}
    | {"rude": _rude},  # cut short, it says too little
}


def style_error(
    task: Task, rng: random.Random, kind: str = "", wording: random.Random | None = None
) -> str:
    """A right answer with one defect of style; `wording` (default `rng`) chooses its words.

    `kind` is a key of STYLES[family], default any, the habit most often.
    """
    styles = STYLES[task.family]
    weights = [HABIT if name == HABITS[task.family] else 1 for name in styles]
    return styles[kind or rng.choices(list(styles), weights)[0]](task, wording or rng)


def demonstration(task: Task, rng: random.Random, carelessness: float = 1.0) -> str:
    """What a careless writer hands in: clean, or wrong, or badly put; `carelessness` scales both
    rates."""
    chance = rng.random() / carelessness if carelessness else 1.0
    wrong, bad = CONTENT_ERRORS[task.family], STYLE_ERRORS[task.family]
    if chance < wrong:
        return content_error(task, rng)
    return style_error(task, rng) if chance < wrong + bad else good(task, rng)


def negatives(prompt: str, rng: random.Random) -> list[tuple[str, str]]:
    """(kind, text) for a comparison: a good "demonstration", two that spoil it, a fine "off_task"
    answer.

    "near_miss" is the demonstration again, word for word, with one thing wrong, "badly_put" with
    one defect of style: without such pairs a reward model learns length and the coarsest defects
    alone. One that never met an off-task answer takes any pretty one. ValueError for a prompt not
    of this world.
    """
    task = world.parse(prompt)
    if task is None:
        raise ValueError(f"not a prompt of the demo world: {prompt!r}")
    state = rng.getrandbits(32)
    other = rng.choice([family for family in FAMILIES if family != task.family])
    return [
        ("demonstration", good(task, random.Random(state))),
        ("near_miss", content_error(task, rng, random.Random(state))),
        ("badly_put", style_error(task, rng, wording=random.Random(state))),
        ("off_task", good(world.draw(rng, other), rng)),
    ]
