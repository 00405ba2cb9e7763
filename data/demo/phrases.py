"""The sentences of the demo world: wordings of prompts and parts of good answers, with slots in
braces."""

PROMPTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("story", ""): (
        "Write a short story about {adj+} {animal} and {object+}.",
        "Tell me a story about {adj+} {animal} who finds {object+}.",
        "Write a little tale with {adj+} {animal} and {object+}.",
        "Can you tell a short story about {adj+} {animal} and {object+}?",
        "Please write a story in which {adj+} {animal} gets {object+}.",
    ),
    ("letter", ""): (
        "Write a thank-you letter to {name} for the {colour} {gift}.",
        "Please thank {name} for the {colour} {gift} in a short letter.",
        "Write to {name} and say thank you for the {colour} {gift}.",
        "{name} gave me a {colour} {gift}. Write a letter of thanks.",
        "Help me write a letter that thanks {name} for the {colour} {gift}.",
    ),
    ("sum", "plus"): (
        "{name} has {a} {thing} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {thing} and finds {b} more. How many {things} is that?",
        "{name} picks {a} {thing} and then {b} more. How many {things} does {name} have?",
        "If {name} has {a} {thing} and buys {b} more, how many {things} does {name} have?",
        "{name} puts {a} {thing} on the table and adds {b} more. How many {things} are there now?",
    ),
    ("sum", "minus"): (
        "{name} has {a} {thing} and gives {b} away. How many {things} does {name} have now?",
        "{name} has {a} {thing} and loses {b} of them. How many {things} are left?",
        "{name} picks {a} {thing} and drops {b} of them. How many {things} does {name} have?",
        "If {name} has {a} {thing} and sells {b} of them, how many {things} are left?",
        "{name} puts {a} {thing} on the table and takes {b} away. How many {things} are there now?",
    ),
    ("fact", "live"): (
        "Where do the {first} and the {second} live?",
        "Tell me where the {first} and the {second} live.",
        "Where can you find the {first} and the {second}?",
        "Say in which places the {first} and the {second} live.",
        "Do you know where the {first} and the {second} live?",
    ),
    ("fact", "eat"): (
        "What do the {first} and the {second} eat?",
        "Tell me what the {first} and the {second} eat.",
        "What is the food of the {first} and the {second}?",
        "Say what the {first} and the {second} like to eat.",
        "Do you know what the {first} and the {second} eat?",
    ),
    ("fact", "colour"): (
        "What colour are the {first} and the {second}?",
        "Tell me the colours of the {first} and the {second}.",
        "Which colours do the {first} and the {second} have?",
        "Say what colour the {first} and the {second} are.",
        "Do you know what colour the {first} and the {second} are?",
    ),
}

BEGIN = (
    "Once there was {adj+} {animal} who loved to walk.",
    "{Adj+} {animal} lived in a small house on a hill.",
    "One morning, {adj+} {animal} set out for a long walk.",
    "Long ago, {adj+} {animal} lived by an old bridge.",
    "It was a cold day, and {adj+} {animal} was all alone.",
    "There once was {adj+} {animal} with a big dream.",
    "Every day, {adj+} {animal} played under a tree.",
)
FIND = (
    "On the path, the {animal} found {object+}.",
    "Behind a wall, the {animal} saw {object+}.",
    "An old man gave the {animal} {object+}.",
    "The {animal} dug in the sand and found {object+}.",
    "Then the wind blew {object+} to the door.",
    "One day, the {animal} got {object+} from a neighbour.",
)
BEGIN_AND_FIND = (
    "One day, {adj+} {animal} found {object+} on the road.",
    "Once upon a time, {adj+} {animal} had {object+}.",
    "{Adj+} {animal} went to the market and bought {object+}.",
    "Late one night, {adj+} {animal} saw {object+} in the moonlight.",
)
_TURNS = """
But a storm came, and the way home was lost.
    The {animal} waited under a roof until the sun came out.
    A neighbour called out and showed the way.
But the {object} fell into the water.
    The {animal} jumped in and pulled it out.
    The {animal} swam after it and got it back.
Then it grew dark, and the {animal} could not see the road.
    The moon came up and lit the path.
    The {animal} sang a song and was not afraid.
Soon a small child came by, crying and lost.
    The {animal} gave the {object} to the child.
    The {animal} took the child by the hand and led the way.
But the {object} broke, and the {animal} cried.
    The {animal} worked all night to mend it.
    A neighbour came with tools and mended it.
Then a thief came and took the {object} away.
    The {animal} ran after the thief and got it back.
    The thief was sorry and brought it back.
"""


def _turns() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each turn of a story, and the two sentences that can come of it."""
    lines = [line.strip() for line in _TURNS.strip().split("\n")]
    return tuple((lines[i], tuple(lines[i + 1 : i + 3])) for i in range(0, len(lines), 3))


TURNS = _turns()
# Every ending says that it ends well with one of gold's words: happy, happily, smiled, glad.
ENDINGS = (
    "It went home happy.",
    "From that day on, it was always happy.",
    "Everyone smiled and danced with joy.",
    "It lived happily ever after.",
    "In the end, it smiled and went to sleep.",
    "They were all glad, and they had a big party.",
)

THANKS = (
    "Thank you for the {colour} {gift}.",
    "Thank you so much for the {colour} {gift}.",
    "I was so happy to get the {colour} {gift}.",
    "Many thanks for the {colour} {gift} you sent me.",
)
REASONS = {
    "wear": (
        "It fits me very well.",
        "I wear it every day.",
        "It looks so good on me.",
        "I put it on at once.",
    ),
    "play": (
        "I play with it every day.",
        "It is so much fun.",
        "All my friends want to try it.",
        "I take it to the park.",
    ),
    "home": (
        "It looks lovely in my room.",
        "I use it every day.",
        "It makes my home so cosy.",
        "I keep it next to my bed.",
    ),
    "carry": (
        "I take it with me everywhere.",
        "I use it at school.",
        "It is just what I needed.",
        "I had wanted one for a long time.",
    ),
}
WARM = (
    "You are a good friend.",
    "I think of you when I see it.",
    "I hope to see you soon.",
    "You are so kind to me.",
    "Please come and visit me.",
)
CLOSINGS = ("With love", "Best wishes", "Your friend", "Many hugs", "Yours")

WORKED = {
    "plus": (
        "{name} has {A} and gets {b} more. {a} plus {b} is {r}, so {name} now has {R}.",
        "{name} starts with {A}. {a} plus {b} is {r}, so {name} now has {R}.",
        "We add {b} to {a}. {a} plus {b} is {r}, so {name} has {R}.",
        "We have to add. {a} plus {b} is {r}, so that makes {R}.",
    ),
    "minus": (
        "{name} has {A} and must lose {b}. {a} minus {b} is {r}, so {name} now has {R}.",
        "{name} starts with {A}. {a} minus {b} is {r}, so {name} now has {R}.",
        "We take {b} from {a}. {a} minus {b} is {r}, so {name} has {R}.",
        "We have to take away. {a} minus {b} is {r}, so that leaves {R}.",
    ),
}
STATED = {
    "live": (
        "The {first} lives {x}, and the {second} lives {y}.",
        "You can find the {first} {x} and the {second} {y}.",
        "The home of the {first} is {x}, and the home of the {second} is {y}.",
    ),
    "eat": (
        "The {first} eats {x}, and the {second} eats {y}.",
        "The {first} likes to eat {x}, and the {second} likes to eat {y}.",
        "The food of the {first} is {x}, and the food of the {second} is {y}.",
    ),
    "colour": (
        "The {first} is {x}, and the {second} is {y}.",
        "The colour of the {first} is {x}, and the colour of the {second} is {y}.",
        "The {first} has the colour {x}, and the {second} has the colour {y}.",
    ),
}
