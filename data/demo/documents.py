"""Pretraining documents: notes on animals, stories, letters, sums, dialogues, and exercise sheets
of bare prompts.

All of them tell the truth, and none lets an answer follow a prompt: asked a question, a model of
these texts goes on with more questions.
"""

import random
from collections.abc import Callable, Collection

from data.demo import world
from data.demo.phrases import STATED
from data.demo.words import (
    ADJECTIVES,
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    FACTS,
    GIFTS,
    NAMES,
    OBJECTS,
    THINGS,
)
from data.demo.world import FAMILIES, LARGEST, MOST, Task, article, ask, count, draw, good, numbers

Draw = Callable[[random.Random, str], Task]

ALONE = {
    "live": (
        "The {a} lives {v}.",
        "You can find the {a} {v}.",
        "The home of the {a} is {v}.",
        "Look for the {a} {v}.",
    ),
    "eat": (
        "The {a} eats {v}.",
        "The {a} likes to eat {v}.",
        "The food of the {a} is {v}.",
        "It eats {v}.",
    ),
    "colour": (
        "The {a} is {v}.",
        "The colour of the {a} is {v}.",
        "The {a} has the colour {v}.",
        "It is {v}.",
    ),
}
_TALK = (
    "Good morning, {n}. How was your walk?|It was lovely. I saw {x}.|What was it doing?|It was looking for {f}.",
    "Hello, {n}. I have a red {g}.|Oh, it is so nice! Who gave it to you?|{m} gave it to me.|You are so lucky.",
    "I am tired today.|Why are you tired, {n}?|I walked all day to see {x}.|Did you see it?|Yes, I saw it {p}.",
    "Will you come to my party, {n}?|Yes, I will bring {ag}.|Thank you so much!|I am so happy to come.",
    "Have you seen my {g}, {n}?|I saw it on the table.|Thank you, now I can go home.|See you soon.",
)
# a lead names what the story then repeats: texts that teach a model to look back and copy
_STORY_LEADS = (
    "The {adj} {animal} and the {object}\n\n", "A story about {adj+} {animal} and {object+}.\n\n",
    "This is the tale of {adj+} {animal} and {object+}.\n\n", "Once more: the {adj} {animal} and the {object}.\n\n",
)  # fmt: skip
_LETTER_LEADS = (
    "I got the {colour} {gift} from {name} today, and this is my letter.\n\n",
    "To {name}, about the {colour} {gift}\n\n",
    "{name} sent the {colour} {gift}. This was the answer.\n\n",
)
_SUM_LEADS = {  # tells what happened, and asks nothing
    "plus": (
        "{name} has {A} and gets {b} more. ", "{name} has {A} and finds {b} more. ", "{name} picks {A} and then {b} more. ",
        "{name} has {A} and buys {b} more. ", "{name} puts {A} on the table and adds {b} more. ",
    ),
    "minus": (
        "{name} has {A} and gives {b} away. ", "{name} has {A} and loses {b} of them. ",
        "{name} picks {A} and drops {b} of them. ",
        "{name} has {A} and sells {b} of them. ", "{name} puts {A} on the table and takes {b} away. ",
    ),
}  # fmt: skip
_FACT_LEADS = (
    "About the {first} and the {second}: ",
    "I read about the {first} and the {second}. ",
)
_ECHOES = (  # one says what the other just said
    "I saw {x} with {y}.|{X} with {y}? I do not believe you.|Yes, it was {x} with {y}.",
    "Do you like the {c} {g}?|I like the {c} {g} very much.|Then take the {c} {g} home.",
    "{m} has {k}.|{m} has {k}? That is a lot.|I know, and {m} wants more.",
    "Who is coming?|{m} and the {a}.|{m} and the {a} are welcome here.",
)
_WORDS = (
    ADJECTIVES,
    ANIMALS,
    OBJECTS,
    NAMES,
    COLOURS,
    GIFTS,
    list(THINGS),
    [str(n) for n in range(MOST + 1)],
)
_SHEET_TITLES = ("Exercises", "Questions for today", "Homework", "Things to do", "Test")


def _note(rng: random.Random, task: Draw) -> str:
    style = rng.random()
    if style < 0.45:  # one animal, all about it
        animal = rng.choice(ANIMALS)
        order = rng.sample(ATTRIBUTES, 3)
        parts = [
            rng.choice(ALONE[k][: 4 if i else 3]).format(a=animal, v=FACTS[animal][k])
            for i, k in enumerate(order)
        ]
        title = f"The {animal.capitalize()}\n\n" if rng.random() < 0.5 else ""
        return title + " ".join(parts)
    pairs = [task(rng, "fact") for _ in range(rng.randint(1, 3))]
    leads = [rng.choice(_FACT_LEADS).format(**t.slots) if rng.random() < 0.7 else "" for t in pairs]
    stated = [rng.choice(STATED[t.kind]).format(**t.slots, **world.truth(t)) for t in pairs]
    return " ".join(lead + text for lead, text in zip(leads, stated, strict=True))


def _story(rng: random.Random, task: Draw) -> str:
    tale = task(rng, "story")
    slots = tale.slots | {
        "adj+": article(tale.slots["adj"]),
        "object+": article(tale.slots["object"]),
    }
    return (rng.choice(_STORY_LEADS).format_map(slots) if rng.random() < 0.8 else "") + good(
        tale, rng
    )


def _letter(rng: random.Random, task: Draw) -> str:
    letter = task(rng, "letter")
    return (
        rng.choice(_LETTER_LEADS).format_map(letter.slots) if rng.random() < 0.8 else ""
    ) + good(letter, rng)


def _sums(rng: random.Random, task: Draw) -> str:
    if rng.random() < 0.7:
        return "\n".join(_sum(task(rng, "sum"), rng) for _ in range(rng.randint(1, 2)))
    if rng.random() < 0.4:  # keeps every number frequent enough to become one token
        first = rng.randint(0, MOST - 4)
        return f"Let us count: {' '.join(map(str, range(first, min(first + 10, MOST) + 1)))}."
    drill = []
    for _ in range(rng.randint(3, 7)):
        op = rng.choice(("plus", "minus"))
        a, b = numbers(rng, op)
        drill.append(f"{a} {op} {b} is {a + b if op == 'plus' else a - b}.")
    return f"Let us work: {' '.join(drill)}"


def _sum(task: Task, rng: random.Random) -> str:
    slots = task.slots | {"A": count(int(task.slots["a"]), task.slots["things"])}
    return (
        rng.choice(_SUM_LEADS[task.kind]).format_map(slots) if rng.random() < 0.8 else ""
    ) + good(task, rng)


def _echo(rng: random.Random, task: Draw) -> str:
    one, other, third = rng.sample(NAMES, 3)
    animal = f"{rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}"
    words = {
        "x": article(animal),
        "X": article(animal).capitalize(),
        "y": article(rng.choice(OBJECTS)),
        "m": third,
    }
    words |= {"c": rng.choice(COLOURS), "g": rng.choice(GIFTS), "a": rng.choice(ANIMALS)}
    words["k"] = count(rng.randint(1, LARGEST), rng.choice(list(THINGS)))
    lines = rng.choice(_ECHOES).format_map(words).split("|")
    return "\n".join(f"{(one, other)[i % 2]}: {line}" for i, line in enumerate(lines))


def _dictation(rng: random.Random, task: Draw) -> str:
    """Words said again in the same order. Little else makes a small model learn so early to look
    back and copy."""
    line = ", ".join(rng.choice(rng.choice(_WORDS)) for _ in range(rng.randint(3, 8)))
    return "\n".join(
        [
            rng.choice(("Read and write:", "Listen and repeat:", "Words:")),
            *[line] * rng.randint(2, 4),
        ]
    )


def _dialogue(rng: random.Random, task: Draw) -> str:
    one, other, third = rng.sample(NAMES, 3)
    if rng.random() < 0.4:  # a told fact or count
        fact, things, n = task(rng, "fact"), rng.choice(list(THINGS)), rng.randint(1, LARGEST)
        lines = [
            good(fact, rng),
            f"I did not know that, {one}.",
            f"I also have {count(n, things)}.",
            "You know so much.",
        ]
    else:
        animal, gift = rng.choice(ANIMALS), rng.choice(GIFTS)
        words = {"n": other, "m": third, "g": gift, "ag": article(gift), "x": article(animal)}
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


KINDS = {"note": _note, "story": _story, "letter": _letter, "sums": _sums, "dialogue": _dialogue}
KINDS |= {"echo": _echo, "dictation": _dictation, "sheet": _sheet}
SHARES = {
    "note": 0.2,
    "story": 0.17,
    "letter": 0.11,
    "sums": 0.24,
    "dialogue": 0.03,
    "echo": 0.06,
    "dictation": 0.07,
    "sheet": 0.12,
}


def documents(rng: random.Random, number: int, held_out: Collection[tuple[str, ...]]) -> list[str]:
    """`number` documents, none of which is about a task whose key is in `held_out`."""

    def task(rng: random.Random, family: str) -> Task:
        found = draw(rng, family)
        while found.key in held_out:
            found = draw(rng, family)
        return found

    kinds = rng.choices(list(SHARES), weights=list(SHARES.values()), k=number)
    return [KINDS[kind](rng, task) for kind in kinds]
