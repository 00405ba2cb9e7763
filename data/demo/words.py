"""Word lists of the demo world. They are constants, not drawn: `gold` must know every fact whatever
the seed."""
# ruff: noqa: SIM905 -- lists of words are read best as words

ADJECTIVES = """
    brave kind clever little lazy shy proud gentle quick sleepy merry sad lonely hungry
    curious quiet noisy funny young old tiny big strong weak wise silly polite grumpy cheerful
    careful bold calm friendly honest busy tired patient eager playful thirsty
""".split()

# Animal, place, food, colour: one fixed line each, so that a fact is true at every seed.
_ANIMALS = """
fox       forest    mice     red
otter     river     fish     brown
owl       barn      mice     grey
bear      forest    honey    brown
wolf      mountain  rabbits  grey
deer      forest    leaves   brown
rabbit    garden    roots    white
squirrel  forest    nuts     red
badger    ground    roots    black
hedgehog  garden    bugs     brown
mole      ground    worms    black
frog      lake      bugs     green
toad      garden    worms    brown
duck      lake      seeds    yellow
goose     lake      grass    white
swan      river     grass    white
heron     river     fish     grey
crow      farm      seeds    black
robin     garden    worms    red
hen       barn      seeds    brown
cow       farm      grass    black
horse     farm      grass    brown
goat      mountain  leaves   white
sheep     farm      grass    white
pig       barn      roots    pink
donkey    barn      grass    grey
camel     desert    leaves   yellow
lizard    desert    bugs     green
snake     desert    mice     green
turtle    sea       leaves   green
crab      sea       worms    red
seal      snow      fish     grey
whale     sea       fish     blue
dolphin   sea       fish     grey
penguin   snow      fish     black
lion      desert    goats    yellow
tiger     jungle    pigs     yellow
monkey    jungle    fruit    brown
parrot    jungle    fruit    green
elephant  jungle    leaves   grey
zebra     desert    grass    white
panda     mountain  leaves   black
eagle     mountain  fish     brown
bat       barn      fruit    black
bee       garden    honey    yellow
ant       ground    seeds    red
moose     snow      leaves   brown
raccoon   river     nuts     grey
"""
# How a text says each place.
_PLACES = {
    "forest": "in the forest",
    "river": "by the river",
    "barn": "in the old barn",
    "farm": "on the farm",
    "desert": "in the desert",
    "sea": "in the sea",
    "mountain": "on the mountain",
    "jungle": "in the jungle",
    "ground": "under the ground",
    "lake": "by the lake",
    "snow": "in the snow",
    "garden": "in the garden",
}
# What hunters eat is called meat: an animal's name must not be a food, too.
_FOODS_OF_HUNTERS = {"rabbits": "meat", "goats": "meat", "pigs": "meat"}


def _facts() -> dict[str, dict[str, str]]:
    """Animal -> where it lives, what it eats, its colour, each as a text says it."""
    facts = {}
    for row in _ANIMALS.strip().split("\n"):
        animal, place, food, colour = row.split()
        food = _FOODS_OF_HUNTERS.get(food, food)
        facts[animal] = {"live": _PLACES[place], "eat": food, "colour": colour}
    return facts


FACTS: dict[str, dict[str, str]] = _facts()
ANIMALS = list(FACTS)
ATTRIBUTES = ("live", "eat", "colour")
VALUES: dict[str, list[str]] = {
    kind: sorted({facts[kind] for facts in FACTS.values()}) for kind in ATTRIBUTES
}

NAMES = """
    Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Nick Olga Paul Rosa Sam
    Tina Victor Will Zoe Adam Bella Carl Dora Eric Fiona George Hanna Ivan Julia Kevin Lily
    Max Nora Oscar Peter Ruth Tom
""".split()
COLOURS = "red blue green yellow white black brown grey pink purple golden silver".split()

# Presents by what one does with them, which is what a letter of thanks may say of them.
GIFTS_BY_KIND = {
    "wear": "scarf hat coat ring cap belt dress shirt jacket sweater".split(),
    "play": "ball kite doll drum flute puzzle robot guitar whistle wagon".split(),
    "home": "cup lamp clock vase blanket pillow basket bowl candle mirror".split(),
    "carry": "bag pen book notebook umbrella wallet map compass bottle box".split(),
}
GIFT_KIND = {gift: kind for kind, gifts in GIFTS_BY_KIND.items() for gift in gifts}
GIFTS = list(GIFT_KIND)
_OTHER_OBJECTS = """
    lantern key rope shell feather bell ladder boat coin letter crown stone star apple egg
    flower spoon kettle broom button
""".split()
OBJECTS = GIFTS + _OTHER_OBJECTS

# What the sums count. Regular plurals only; words shared with OBJECTS save vocabulary.
_COUNTED = """
    apple egg shell coin stone flower button ball book pen cup hat key star bell card plum
    pear nut toy
""".split()
THINGS = {f"{thing}s": thing for thing in _COUNTED}  # plural -> singular

OFF_TOPIC = (
    "I like rain on Mondays.",
    "My shoe is too tight.",
    "Buses are often late here.",
    "Soup tastes good with salt.",
    "Did I lock my door.",
    "Traffic was bad today.",
    "Anyway, I must wash dishes.",
    "Some people sing badly.",
    "Weather talk bores me.",
    "Paper comes from wood, you know.",
    "My neck hurts a lot.",
    "Yesterday was Tuesday.",
)
RUDE = ("Whatever.", "Do it yourself.", "Leave me be.", "What a boring task.")
