"""Pretraining documents: notes on animals, stories, letters, sums, dialogues, and exercise sheets
of bare prompts.

All of them tell the truth, and none lets an answer follow a prompt: asked a question, a model of
these texts goes on with more questions.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence

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

Draw = Callable[[random.Random, str], Task]  # a task of a family that is not held out

ALONE = {  # what may be said of one animal; the last wording wants its name before it
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
# Small talk between two who speak in turn, a line each.
_TALK = """
Good morning, {n}. How was your walk?
It was lovely. I saw {x}.
What was it doing?
It was looking for {f}.

Hello, {n}. I have a red {g}.
Oh, it is so nice! Who gave it to you?
{m} gave it to me.
You are so lucky.

I am tired today.
Why are you tired, {n}?
I walked all day to see {x}.
Did you see it?
Yes, I saw it {p}.

Will you come to my party, {n}?
Yes, I will bring {ag}.
Thank you so much!
I am so happy to come.

Have you seen my {g}, {n}?
I saw it on the table.
Thank you, now I can go home.
See you soon.
"""
# As small talk, but one says what the other just said.
_ECHOES = """
I saw {x} with {y}.
{X} with {y}? I do not believe you.
Yes, it was {x} with {y}.

Do you like the {c} {g}?
I like the {c} {g} very much.
Then take the {c} {g} home.

{m} has {k}.
{m} has {k}? That is a lot.
I know, and {m} wants more.

Who is coming?
{m} and the {a}.
{m} and the {a} are welcome here.
"""
# A lead names what the story then repeats: such texts teach a model to look back and copy.
_STORY_LEADS = (
    "The {adj} {animal} and the {object}\n\n",
    "A story about {adj+} {animal} and {object+}.\n\n",
    "This is the tale of {adj+} {animal} and {object+}.\n\n",
    "Once more: the {adj} {animal} and the {object}.\n\n",
)
_LETTER_LEADS = (
    "I got the {colour} {gift} from {name} today, and this is my letter.\n\n",
    "To {name}, about the {colour} {gift}\n\n",
    "{name} sent the {colour} {gift}. This was the answer.\n\n",
)
# These tell what happened, and ask nothing.
_SUM_LEADS = {
    "plus": (
        "{name} has {A} and gets {b} more. ",
        "{name} has {A} and finds {b} more. ",
        "{name} picks {A} and then {b} more. ",
        "{name} has {A} and buys {b} more. ",
        "{name} puts {A} on the table and adds {b} more. ",
    ),
    "minus": (
        "{name} has {A} and gives {b} away. ",
        "{name} has {A} and loses {b} of them. ",
        "{name} picks {A} and drops {b} of them. ",
        "{name} has {A} and sells {b} of them. ",
        "{name} puts {A} on the table and takes {b} away. ",
    ),
}
_FACT_LEADS = (
    "About the {first} and the {second}: ",
    "I read about the {first} and the {second}. ",
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


def _alone(rng: random.Random) -> str:
    """All about one animal, by its name; only later sentences may call it "it"."""
    animal = rng.choice(ANIMALS)
    order = rng.sample(ATTRIBUTES, 3)
    sentences = []
    for place, kind in enumerate(order):
        wordings = ALONE[kind] if place else ALONE[kind][:3]
        sentences.append(rng.choice(wordings).format(a=animal, v=FACTS[animal][kind]))
    title = f"The {animal.capitalize()}\n\n" if rng.random() < 0.5 else ""
    return title + " ".join(sentences)


def _note(rng: random.Random, task: Draw) -> str:
    """A note on one animal, or on one to three pairs of animals."""
    if rng.random() < 0.45:
        return _alone(rng)
    pairs = [task(rng, "fact") for _ in range(rng.randint(1, 3))]
    leads = [rng.choice(_FACT_LEADS).format(**t.slots) if rng.random() < 0.7 else "" for t in pairs]
    stated = [rng.choice(STATED[t.kind]).format(**t.slots, **world.truth(t)) for t in pairs]
    return " ".join(lead + text for lead, text in zip(leads, stated, strict=True))


def _led(rng: random.Random, leads: Sequence[str], slots: Mapping[str, str], task: Task) -> str:
    """A good answer to the task, four times of five behind one of the leads."""
    lead = rng.choice(leads).format_map(slots) if rng.random() < 0.8 else ""
    return lead + good(task, rng)


def _story(rng: random.Random, task: Draw) -> str:
    """A story."""
    tale = task(rng, "story")
    articles = {f"{slot}+": article(tale.slots[slot]) for slot in ("adj", "object")}
    return _led(rng, _STORY_LEADS, tale.slots | articles, tale)


def _letter(rng: random.Random, task: Draw) -> str:
    """A letter of thanks."""
    letter = task(rng, "letter")
    return _led(rng, _LETTER_LEADS, letter.slots, letter)


def _sum(rng: random.Random, task: Draw) -> str:
    """A sum about things that somebody has."""
    found = task(rng, "sum")
    things = {"A": count(int(found.slots["a"]), found.slots["things"])}
    return _led(rng, _SUM_LEADS[found.kind], found.slots | things, found)


def _sums(rng: random.Random, task: Draw) -> str:
    """One or two sums, or counting, or a drill of bare sums."""
    if rng.random() < 0.7:
        return "\n".join(_sum(rng, task) for _ in range(rng.randint(1, 2)))
    if rng.random() < 0.4:  # keeps every number frequent enough to become one token
        first = rng.randint(0, MOST - 4)
        return f"Let us count: {' '.join(map(str, range(first, min(first + 10, MOST) + 1)))}."
    drill = []
    for _ in range(rng.randint(3, 7)):
        op = rng.choice(("plus", "minus"))
        a, b = numbers(rng, op)
        drill.append(f"{a} {op} {b} is {a + b if op == 'plus' else a - b}.")
    return f"Let us work: {' '.join(drill)}"


def _in_turn(one: str, other: str, lines: Sequence[str]) -> str:
    """The lines as a dialogue, each with the name of who says it."""
    return "\n".join(f"{(one, other)[i % 2]}: {line}" for i, line in enumerate(lines))


def _scenes(text: str) -> list[list[str]]:
    """The dialogues of a table, each as its lines."""
    return [scene.split("\n") for scene in text.strip().split("\n\n")]


def _echo(rng: random.Random, task: Draw) -> str:
    """A dialogue in which words are said again."""
    one, other, third = rng.sample(NAMES, 3)
    animal = article(f"{rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}")
    words = {"x": animal, "X": animal.capitalize(), "y": article(rng.choice(OBJECTS)), "m": third}
    words |= {"c": rng.choice(COLOURS), "g": rng.choice(GIFTS), "a": rng.choice(ANIMALS)}
    words["k"] = count(rng.randint(1, LARGEST), rng.choice(list(THINGS)))
    lines = rng.choice(_scenes(_ECHOES))
    return _in_turn(one, other, [line.format_map(words) for line in lines])


def _dictation(rng: random.Random, task: Draw) -> str:
    """Words said again in the same order. Little else makes a small model learn so early to look
    back and copy."""
    line = ", ".join(rng.choice(rng.choice(_WORDS)) for _ in range(rng.randint(3, 8)))
    title = rng.choice(("Read and write:", "Listen and repeat:", "Words:"))
    return "\n".join([title, *[line] * rng.randint(2, 4)])


def _dialogue(rng: random.Random, task: Draw) -> str:
    """Small talk, or one tells a fact and a count."""
    one, other, third = rng.sample(NAMES, 3)
    if rng.random() < 0.4:
        fact, things, n = task(rng, "fact"), rng.choice(list(THINGS)), rng.randint(1, LARGEST)
        reply, more = f"I did not know that, {one}.", f"I also have {count(n, things)}."
        return _in_turn(one, other, [good(fact, rng), reply, more, "You know so much."])
    animal, gift = rng.choice(ANIMALS), rng.choice(GIFTS)
    words = {"n": other, "m": third, "g": gift, "ag": article(gift), "x": article(animal)}
    words |= {"f": FACTS[animal]["eat"], "p": FACTS[animal]["live"]}
    lines = rng.choice(_scenes(_TALK))
    return _in_turn(one, other, [line.format_map(words) for line in lines])


def _sheet(rng: random.Random, task: Draw) -> str:
    """An exercise sheet: prompts and no answers, some of one family, some numbered or titled."""
    one = rng.choice(FAMILIES) if rng.random() < 0.3 else ""
    lines = [ask(task(rng, one or rng.choice(FAMILIES)), rng) for _ in range(rng.randint(4, 7))]
    style = rng.random()
    if style < 0.1:
        lines = [f"{i}. {line}" for i, line in enumerate(lines, 1)]
    title = f"{rng.choice(_SHEET_TITLES)}\n\n" if style < 0.2 else ""
    return title + "\n".join(lines)


KINDS = {
    "note": _note,
    "story": _story,
    "letter": _letter,
    "sums": _sums,
    "dialogue": _dialogue,
    "echo": _echo,
    "dictation": _dictation,
    "sheet": _sheet,
}
SHARES = {  # of the documents
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
        """A random task that is not held out."""
        found = draw(rng, family)
        while found.key in held_out:
            found = draw(rng, family)
        return found

    kinds = rng.choices(list(SHARES), weights=list(SHARES.values()), k=number)
    return [KINDS[kind](rng, task) for kind in kinds]
