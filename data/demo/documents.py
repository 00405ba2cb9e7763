"""Pretraining documents: notes on animals, stories, letters, sums, dialogues, and exercise sheets of bare prompts.

All of them tell the truth, and none lets an answer follow a prompt: asked a question, a model of these texts goes on
with more questions.
"""

import random
from collections.abc import Callable, Collection

from data.demo import world
from data.demo.phrases import STATED
from data.demo.words import ANIMALS, ATTRIBUTES, FACTS, GIFTS, NAMES, THINGS
from data.demo.world import FAMILIES, LARGEST, Task, article, ask, count, draw, good

Draw = Callable[[random.Random, str], Task]

ALONE = {
    "live": ("The {a} lives {v}.", "You can find the {a} {v}.", "The home of the {a} is {v}.", "Look for the {a} {v}."),
    "eat": ("The {a} eats {v}.", "The {a} likes to eat {v}.", "The food of the {a} is {v}.", "It eats {v}."),
    "colour": ("The {a} is {v}.", "The colour of the {a} is {v}.", "The {a} has the colour {v}.", "It is {v}."),
}
_TALK = (
    "Good morning, {n}. How was your walk?|It was lovely. I saw {x}.|What was it doing?|It was looking for {f}.",
    "Hello, {n}. I have a new {g}.|Oh, it is so nice! Who gave it to you?|{m} gave it to me.|You are so lucky.",
    "I am tired today.|Why are you tired, {n}?|I walked all day to see {x}.|Did you see it?|Yes, I saw it {p}.",
    "Will you come to my party, {n}?|Yes, I will bring a {g}.|Thank you so much!|I am so happy to come.",
    "Have you seen my {g}, {n}?|I saw it on the table.|Thank you, now I can go home.|See you soon.",
)
_SHEET_TITLES = ("Exercises", "Questions for today", "Homework", "Things to do", "Test")


def _note(rng: random.Random, task: Draw) -> str:
    style = rng.random()
    if style < 0.45:  # one animal, all about it
        animal = rng.choice(ANIMALS)
        order = rng.sample(ATTRIBUTES, 3)
        parts = [rng.choice(ALONE[k][: 4 if i else 3]).format(a=animal, v=FACTS[animal][k]) for i, k in enumerate(order)]
        title = f"The {animal.capitalize()}\n\n" if rng.random() < 0.5 else ""
        return title + " ".join(parts)
    pairs = [task(rng, "fact") for _ in range(rng.randint(1, 3))]
    return " ".join(rng.choice(STATED[t.kind]).format(**t.slots, **world.truth(t)) for t in pairs)


def _story(rng: random.Random, task: Draw) -> str:
    tale = task(rng, "story")
    adj, animal, thing = (tale.slots[k] for k in ("adj", "animal", "object"))
    title = f"The {adj.capitalize()} {animal.capitalize()} and the {thing.capitalize()}\n\n"
    return (title if rng.random() < 0.6 else "") + good(tale, rng)


def _letter(rng: random.Random, task: Draw) -> str:
    return good(task(rng, "letter"), rng)


def _sums(rng: random.Random, task: Draw) -> str:
    if rng.random() < 0.7:
        return " ".join(good(task(rng, "sum"), rng) for _ in range(rng.randint(1, 2)))
    drill = []
    for _ in range(rng.randint(3, 7)):
        a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        if rng.random() < 0.6:
            drill.append(f"{a} plus {b} is {a + b}.")
        else:
            drill.append(f"{max(a, b)} minus {min(a, b)} is {max(a, b) - min(a, b)}.")
    return f"Let us count. {' '.join(drill)}"


def _dialogue(rng: random.Random, task: Draw) -> str:
    one, other, third = rng.sample(NAMES, 3)
    if rng.random() < 0.4:  # a told fact or count
        fact, things, n = task(rng, "fact"), rng.choice(list(THINGS)), rng.randint(1, LARGEST)
        lines = [good(fact, rng), f"I did not know that, {one}.", f"I also have {count(n, things)}.", "You know so much."]
    else:
        animal = rng.choice(ANIMALS)
        words = {"n": other, "m": third, "g": rng.choice(GIFTS), "x": article(animal)}
        words |= {"f": FACTS[animal]["eat"], "p": FACTS[animal]["live"]}
        lines = rng.choice(_TALK).format(**words).split("|")
    return "\n".join(f"{(one, other)[i % 2]}: {line}" for i, line in enumerate(lines))


def _sheet(rng: random.Random, task: Draw) -> str:
    one = rng.choice(FAMILIES) if rng.random() < 0.3 else ""
    lines = [ask(task(rng, one or rng.choice(FAMILIES)), rng) for _ in range(rng.randint(4, 7))]
    style = rng.random()
    if style < 0.1:
        lines = [f"{i}. {line}" for i, line in enumerate(lines, 1)]
    title = f"{rng.choice(_SHEET_TITLES)}\n\n" if style < 0.2 else ""
    return title + "\n".join(lines)


KINDS = {"note": _note, "story": _story, "letter": _letter, "sums": _sums, "dialogue": _dialogue, "sheet": _sheet}
SHARES = {"note": 0.25, "story": 0.2, "letter": 0.13, "sums": 0.2, "dialogue": 0.08, "sheet": 0.14}


def documents(rng: random.Random, number: int, held_out: Collection[tuple[str, ...]]) -> list[str]:
    """`number` documents, none of which is about a task whose key is in `held_out`."""

    def task(rng: random.Random, family: str) -> Task:
        found = draw(rng, family)
        while found.key in held_out:
            found = draw(rng, family)
        return found

    kinds = rng.choices(list(SHARES), weights=list(SHARES.values()), k=number)
    return [KINDS[kind](rng, task) for kind in kinds]
