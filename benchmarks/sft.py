"""Supervised finetuning, stages.sft.train beside TRL's SFTTrainer: real (unpadded) tokens a second.

    python -m benchmarks.sft --data alpaca.json

Same weights (a random Llama), chat format, rows, batch, limit and learning rate. Each row is seen
once, in an order of each side's own, and padded as each side does by default. `loss` in the last
line is the mean loss while training (nats a token), `eval_loss` that of the same held-out rows
after it.
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.finetune import LENGTH, Work, compare, options, uncounted_steps, write_work
from benchmarks.side_by_side import start
from benchmarks.workload import llama, training_flops
from common.text.chat import Message, render, rows_to_messages
from common.text.tokenizer import Tokenizer

RATE = 1e-3


class Rows(NamedTuple):
    """The conversations that both sides see."""

    tokenizer: Tokenizer  # trained on all answers of the file
    train: list[list[Message]]
    held_out: list[list[Message]]


def read(file: str, train: int, held_out: int, vocab_size: int) -> Rows:
    """So many of the file's rows. Ends the program where it has too few with an answer."""
    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    conversations = [rows_to_messages(row) for row in rows if row["output"]]
    needed = train + held_out
    if len(conversations) < needed:
        found = f"{file}: has {len(conversations)} rows with an answer"
        raise SystemExit(f"{found}, {needed} are needed")
    texts = ("\n".join(turn["content"] for turn in turns) for turns in conversations)
    tokenizer = Tokenizer.train_bpe(texts, vocab_size).with_chat()
    return Rows(tokenizer, conversations[:train], conversations[train:needed])


def as_row(turns: list[Message]) -> dict[str, list[Message]]:
    """A conversation in the columns that both sides read."""
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def main() -> None:
    """Read the rows, write the work, run both sides."""
    parser = options(__doc__, "Alpaca rows: a JSON list of instruction, input, output", batch=16)
    parser.add_argument("--held_out", type=int, default=64, help="rows for the held-out loss")
    args = start(parser)
    uncounted = uncounted_steps(args)
    steps = args.steps + uncounted
    rows = read(args.data, steps * args.batch, args.held_out, args.vocab_size)
    rendered = [render(rows.tokenizer, turns) for turns in rows.train]
    lengths = [min(LENGTH, len(row.ids)) for row in rendered]
    supervised = sum(sum(row.mask[:LENGTH]) for row in rendered)
    config = llama(args, 2 * LENGTH)
    flops = training_flops(config, lengths, supervised)

    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = (
            [as_row(turns) for turns in side] for side in (rows.train, rows.held_out)
        )
        places = write_work(Path(scratch), config, rows.tokenizer, train, held_out)
        work = Work("sft", *places, steps, uncounted, args.batch, RATE)
        compare(work, args, scratch, flops_per_unit=flops)


if __name__ == "__main__":
    main()
