"""What does not fit into a GPU, and the smallest change that makes it fit."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from tools.plan.workload import Memory, Work, memory

MOST_GPUS = 65536  # no advice goes beyond


class Change(NamedTuple):
    """Another way to run a step."""

    work: Work
    zero: int
    """ZeRO stage."""
    words: list[str]
    """The changes, each in words; fewer is better."""


def alternatives(work: Work, factor: int = 1) -> list[Change]:
    """Ways to run a step on `factor` times as many GPUs, the smallest change first.

    The global batch stays as long as each GPU has a row of it: smaller micro-batches are made up
    for by accumulation.
    """
    rows, found = max(1, work.micro * work.accumulation // factor), []
    spread = replace(work, gpus=work.gpus * factor)
    for zero, micro in itertools.product(spread.zero_stages, range(1, work.micro + 1)):
        if rows % micro:
            continue
        times = rows // micro
        words = [f"{spread.gpus:,} GPUs"] * (factor > 1) + [f"ZeRO stage {zero}"] * (zero > 0)
        if (micro, times) != (work.micro, work.accumulation):
            words += [f"per_device_train_batch_size {micro}, gradient_accumulation_steps {times}"]
        found.append(Change(replace(spread, micro=micro, accumulation=times), zero, words))
    return sorted(found, key=lambda change: (len(change.words), -change.work.micro, change.zero))


def advice(work: Work, room: float) -> str:
    """What does not fit into `room` bytes of a GPU, and the smallest change that makes it fit."""
    needs = said(memory(work), f"a GPU, there are {room / 1e9:,.0f}")
    text = f"{work.step} needs {needs}"
    if work.stage == "collect":
        return f"{text} {smaller_batch(work, room)}"
    tried = list(with_memory(work))
    for need, words in tried:
        if need.peak <= room:
            size = f"{need.peak / 1e9:,.1f} GB"
            return f"{text} Smallest change that fits: {' and '.join(words)} ({size})"
    least = min((need for need, _ in tried), key=lambda need: need.peak)
    return f"{text} No number of GPUs helps: {said(least, 'at least')} {what_may_help(work)}"


def said(need: Memory, words: str) -> str:
    """The peak, and its three largest parts."""
    parts = sorted(zip(need[:-1], need._fields, strict=False), reverse=True)
    largest = ", ".join(f"{name} {size / 1e9:,.1f}" for size, name in parts[:3] if size)
    return f"{need.peak / 1e9:,.1f} GB {words} (largest: {largest})."


def smaller_batch(work: Work, room: float) -> str:
    """The largest batch of collect that fits."""
    for size in range(work.micro - 1, 0, -1):
        if memory(replace(work, micro=size)).peak <= room:
            return f"Smallest change that fits: batch_size {size}"
    return "The model alone is too large for it"


def with_memory(work: Work) -> Iterator[tuple[Memory, list[str]]]:
    """(what it needs, the changes in words) of all alternatives, few GPUs first."""
    for power in range(MOST_GPUS.bit_length()):
        if work.gpus * 2**power <= MOST_GPUS:
            for change in alternatives(work, 2**power):
                yield memory(change.work, change.zero), change.words


def what_may_help(work: Work) -> str:
    """What a user can try where no number of GPUs is enough."""
    others = ["a larger GPU"]
    if not work.checkpointing:
        others.append("gradient_checkpointing")
    if work.stage != "pretrain":
        others.append("lora_r")
    whole = "Where a model is started or published, every GPU has the whole model"
    return f"{whole}. What may: {', '.join(others)}"
