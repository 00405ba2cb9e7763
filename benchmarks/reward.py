"""Reward modelling, stages.reward.train beside TRL's RewardTrainer: real (unpadded) tokens a
second, chosen and rejected.

    python -m benchmarks.reward --data preferences.json

Same trunk (a random Llama; each side draws its own head), chat format, pairs, batch, limit and
learning rate. Pairs longer than the limit are left out beforehand, as both sides would.
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.finetune import LENGTH, Work, compare, options, uncounted_steps, write_work
from benchmarks.side_by_side import start
from benchmarks.workload import llama, training_flops
from common.text.chat import Message, comparison_prompt, render
from common.text.tokenizer import Tokenizer

RATE = 1e-4
HELD_OUT = 16  # pairs for the held-out loss


class Pairs(NamedTuple):
    """The pairs that both sides see: those that differ, and are not longer than the limit."""

    tokenizer: Tokenizer  # trained on all pairs of the file
    rows: list[dict[str, list[Message]]]  # in the columns that both sides read
    lengths: list[list[int]]  # tokens of the chosen and the rejected side


def sides(row: dict) -> list[list[Message]]:
    """[messages of the prompt and the chosen answer, ... and the rejected one]."""
    prompt = comparison_prompt(row)
    found = []
    for name in ("chosen", "rejected"):
        text = row[name] if isinstance(row[name], str) else row[name]["value"]
        found.append([*prompt, {"role": "assistant", "content": text}])
    return found


def read(file: str, needed: int, vocab_size: int) -> Pairs:
    """The file's pairs. Ends the program where fewer than `needed` can be used."""
    pairs = [sides(row) for row in json.loads(Path(file).read_text(encoding="utf-8"))]
    texts = ("\n".join(turn["content"] for turn in side) for pair in pairs for side in pair)
    tokenizer = Tokenizer.train_bpe(texts, vocab_size).with_chat()
    rows, lengths = [], []
    for chosen, rejected in pairs:
        both = [len(render(tokenizer, side).ids) for side in (chosen, rejected)]
        if max(both) <= LENGTH and chosen != rejected:
            prompt, answers = chosen[:-1], {"chosen": chosen[-1:], "rejected": rejected[-1:]}
            rows.append({"prompt": prompt, **answers})
            lengths.append(both)
    if len(rows) < needed:
        found = f"{file}: has {len(rows)} pairs of at most {LENGTH} tokens"
        raise SystemExit(f"{found}, too few")
    return Pairs(tokenizer, rows, lengths)


def main() -> None:
    """Read the pairs, write the work, run both sides."""
    data = "preferences: a JSON list of conversations (or prompt), chosen, rejected"
    args = start(options(__doc__, data, batch=8))
    uncounted = uncounted_steps(args)
    pairs = read(args.data, args.batch + HELD_OUT, args.vocab_size)
    config = llama(args, 2 * LENGTH)
    trained = [length for both in pairs.lengths[HELD_OUT:] for length in both]

    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = pairs.rows[HELD_OUT:], pairs.rows[:HELD_OUT]
        places = write_work(Path(scratch), config, pairs.tokenizer, train, held_out)
        work = Work("reward", *places, args.steps + uncounted, uncounted, args.batch, RATE)
        flops = training_flops(config, trained, 0)
        compare(work, args, scratch, flops_per_unit=flops, pairs=len(pairs.rows))


if __name__ == "__main__":
    main()
