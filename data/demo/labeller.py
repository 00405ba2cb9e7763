"""The demo's stand-in for people who compare answers: the ground truth seen through habits, noise
and slips."""

import random

from data.demo import flaws, gold

CORRECT = 0.25  # a labeller looks twice at whether the answer is right
LENGTH = 0.06  # per 100 characters: longer looks like more work
CHEER = 0.05  # an exclamation mark is friendly
NOISE = 0.2
SLIP = 0.07  # chance that an answer changes places with another by mistake
STEP = 0.04  # differences below this are not seen: ties


def rank(prompt: str, answers: list[str], rng: random.Random) -> list[int]:
    """The rank of each answer, 0 best; answers that look equally good share a rank.

    ValueError where `prompt` is not one of this world's.
    """
    looks = []
    for answer in answers:
        truth = gold.judge(prompt, answer)
        habit = LENGTH * min(len(answer), 300) / 100 + CHEER * ("!" in answer)
        looks.append(truth.score + CORRECT * truth.correct + habit + rng.gauss(0.0, NOISE))
    order = sorted(range(len(answers)), key=lambda i: -looks[i])
    ranks, level = [0] * len(answers), 0
    for place, i in enumerate(order):
        if place and looks[order[place - 1]] - looks[i] > STEP:
            level = place
        ranks[i] = level
    for i in range(len(answers)):
        if rng.random() < SLIP:
            j = rng.randrange(len(answers))
            ranks[i], ranks[j] = ranks[j], ranks[i]
    return ranks


def contrast(prompt: str, rng: random.Random) -> list[tuple[str, str]]:
    """(kind, text) answers to set beside a model's own: see flaws.negatives."""
    return flaws.negatives(prompt, rng)
