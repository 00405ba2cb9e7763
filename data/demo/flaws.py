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

# Rates of demonstrations that say something wrong, and of those that say the right thing badly.
CONTENT_ERRORS = {"story": 0.03, "letter": 0.03, "sum": 0.06, "fact": 0.06}
STYLE_ERRORS = {"story": 0.5, "letter": 0.42, "sum": 0.45, "fact": 0.4}
# The defect that most careless writers of a family share, and how many times as common it is as any
# other: common enough that imitating the crowd means sharing it.
HABITS = {"story": "no ending", "letter": "no closing", "sum": "no work", "fact": "curt"}
HABIT = 6
_LISTS = {"adj": ADJECTIVES, "animal": ANIMALS, "object": OBJECTS, "name": NAMES, "colour": COLOURS}


def _other(rng: random.Random, words: list[str], word: str) -> str:
    """One of the words, but not this one."""
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
    wrong = _other(rng, words, task.slots[slot])
    return good(task._replace(slots=task.slots | {slot: wrong}), wording)


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
    """As few words as will do."""
    slots, claim = task.slots, world.truth(task)
    short: tuple[str, ...]
    if task.family == "story":
        who, what = f"{slots['adj']} {slots['animal']}", article(slots["object"])
        short = (
            f"The {who} found {what}.",
            f"{article(who).capitalize()} had {what}. That is all.",
        )
    elif task.family == "letter":
        gift = f"{slots['colour']} {slots['gift']}"
        short = (f"Thanks for the {gift}.", f"Dear {slots['name']}, thanks for the {gift}.")
    elif task.family == "sum":
        things = count(int(claim["r"]), slots["things"])
        short = (f"{claim['r']}.", f"It is {claim['r']}.", f"{slots['name']} has {things}.")
    else:
        both = f"{claim['x']} and {claim['y']}."
        short = (both[0].upper() + both[1:], f"It is {both}")
    return rng.choice(short)


def _no_work(task: Task, rng: random.Random) -> str:
    """The result of a sum without its working."""
    name, things, r = task.slots["name"], task.slots["things"], world.result(task)
    return rng.choice((f"{name} now has {count(r, things)}.", f"The answer is {count(r, things)}."))


def _no_ending(task: Task, rng: random.Random) -> str:
    """A story that stops before it ends."""
    return " ".join(world.story_parts(task, rng)[:-1])


def _no_closing(task: Task, rng: random.Random) -> str:
    """A letter that nobody signs."""
    return "\n".join(world.join_letter(world.letter_parts(task, rng)).split("\n")[:2])


def _rude(task: Task, rng: random.Random) -> str:
    """A good answer that ends with a rude word."""
    if task.family == "letter":
        return f"{_no_closing(task, rng)}\n{rng.choice(RUDE)}"
    return f"{good(task, rng)} {rng.choice(RUDE)}"


def _lower(task: Task, rng: random.Random) -> str:
    """Without capitals, but for names within the text; half of the time without the last stop."""

    def lower(word: re.Match) -> str:
        """The word as such a writer writes it."""
        return word[0] if word[0] in NAMES and word.start() else word[0].lower()

    text = re.sub(r"\b[A-Z]\w*", lower, good(task, rng))
    return text.rstrip(".") if rng.random() < 0.5 else text


def _unfinished(task: Task, rng: random.Random) -> str:
    """A good answer less its last two or three words."""
    words = good(task, rng).split(" ")
    return " ".join(words[: -rng.randint(2, 3)])


def _insert(text: str, sentence: str, before_closing: bool) -> str:
    """The text and one more sentence: at its end, or before the closing of a letter."""
    if before_closing:
        body, _, closing = text.rpartition("\n")
        return f"{body} {sentence}\n{closing}"
    return f"{text} {sentence}"


def _ramble(task: Task, rng: random.Random) -> str:
    """A good answer that says one of its sentences again, once or twice."""
    text = good(task, rng)
    body = text.split("\n")[1] if task.family == "letter" else text
    sentence = rng.choice([s.rstrip(".") for s in body.split(". ")]) + "."
    for _ in range(rng.randint(1, 2)):
        text = _insert(text, sentence, task.family == "letter")
    return text


def _off_topic(task: Task, rng: random.Random) -> str:
    """A good answer with one or two sentences that have nothing to do with it."""
    text = good(task, rng)
    for sentence in rng.sample(OFF_TOPIC, rng.randint(1, 2)):
        text = _insert(text, sentence, task.family == "letter")
    return text


Style = Callable[[Task, random.Random], str]  # writes an answer with one defect
_COMMON: dict[str, Style] = {
    "curt": _curt,
    "lower": _lower,
    "unfinished": _unfinished,
    "ramble": _ramble,
    "off topic": _off_topic,
}
STYLES: dict[str, dict[str, Style]] = {
    "story": _COMMON | {"no ending": _no_ending, "rude": _rude},
    "letter": _COMMON | {"no closing": _no_closing, "rude": _rude},
    "sum": _COMMON | {"no work": _no_work, "rude": _rude},
    "fact": _COMMON | {"rude": _rude},
}
del STYLES["fact"]["unfinished"]  # cut short, a fact says too little


def style_error(
    task: Task, rng: random.Random, kind: str = "", wording: random.Random | None = None
) -> str:
    """A right answer with one defect of style; `wording` (default `rng`) chooses its words.

    `kind` is a key of STYLES[family], default any, the habit most often.
    """
    styles = STYLES[task.family]
    if not kind:
        weights = [HABIT if name == HABITS[task.family] else 1 for name in styles]
        [kind] = rng.choices(list(styles), weights)
    return styles[kind](task, wording or rng)


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
    task = world.task_of(prompt)
    state = rng.getrandbits(32)
    other = rng.choice([family for family in FAMILIES if family != task.family])
    return [
        ("demonstration", good(task, random.Random(state))),
        ("near_miss", content_error(task, rng, random.Random(state))),
        ("badly_put", style_error(task, rng, wording=random.Random(state))),
        ("off_task", good(world.draw(rng, other), rng)),
    ]
