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

from benchmarks.side_by_side import arguments, side_by_side, start
from benchmarks.workload import (
    MIXED,
    by_precision,
    llama,
    random_llama,
    run_stage,
    shape_arguments,
    tokens_per_second,
    training_flops,
    trl_name,
    trl_trainer,
    write_model,
    write_rows,
)
from common.text.chat import render, rows_to_messages
from common.text.tokenizer import Tokenizer

LENGTH, RATE = 512, 1e-3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--data", required=True, help="Alpaca rows: a JSON list of instruction, input, output"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="counted updates; a quarter as many come before"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows in an update")
    parser.add_argument("--held_out", type=int, default=64, help="rows for the held-out loss")
    shape_arguments(parser)
    args = start(parser)
    uncounted = max(1, args.steps // 4)
    steps = args.steps + uncounted

    rows = json.loads(Path(args.data).read_text(encoding="utf-8"))
    conversations = [rows_to_messages(row) for row in rows if row["output"]]
    trained, needed = steps * args.batch, steps * args.batch + args.held_out
    if len(conversations) < needed:
        raise SystemExit(
            f"{args.data}: has {len(conversations)} rows with an answer, {needed} are needed"
        )
    texts = ("\n".join(turn["content"] for turn in turns) for turns in conversations)
    tokenizer = Tokenizer.train_bpe(texts, args.vocab_size).with_chat()
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in conversations[:needed]]
    rendered = [render(tokenizer, turns) for turns in conversations[:trained]]
    lengths = [min(LENGTH, len(row.ids)) for row in rendered]
    config = llama(args, 2 * LENGTH)
    losses: dict[str, float] = {}
    held_out_losses: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", random_llama(config), tokenizer)
        train = write_rows(Path(scratch) / "train.jsonl", rows[:trained])
        held_out = write_rows(Path(scratch) / "eval.jsonl", rows[trained:])

        def ours(precision: str) -> float:
            log, _ = run_stage(
                "stages.sft.train",
                {
                    "parent": model,
                    "train_data": train,
                    "eval_data": held_out,
                    "max_length": LENGTH,
                    "max_steps": steps,
                    "per_device_train_batch_size": args.batch,
                    "learning_rate": RATE,
                    "lr_scheduler_type": "linear",
                    "mixed_precision": MIXED[precision],
                    "logging_steps": 1,
                    "save_steps": None,
                    "samples": 0,
                },
                scratch,
            )
            logged = [row["loss"] for row in log if "loss" in row]
            losses[f"ours {precision}"] = sum(logged) / len(logged)
            held_out_losses[f"ours {precision}"] = log[-1]["eval_loss"]
            return tokens_per_second(log, uncounted)

        def trl(precision: str) -> float:
            done = trl_trainer(
                trainer="sft",
                model=model,
                train=train,
                eval=held_out,
                steps=steps,
                uncounted=uncounted,
                batch=args.batch,
                length=LENGTH,
                rate=RATE,
                bf16=precision == "bf16",
            )
            losses[f"{trl_name()} {precision}"] = done["loss"]
            held_out_losses[f"{trl_name()} {precision}"] = done["eval_loss"]
            return done["tokens_per_second"]

        supervised = sum(sum(row.mask[:LENGTH]) for row in rendered)
        side_by_side(
            "sft",
            "tokens/s",
            by_precision("ours", args.precisions, ours)
            | by_precision(trl_name(), args.precisions, trl),
            runs=args.runs,
            alone=args.alone,
            flops_per_unit=training_flops(config, lengths, supervised),
            loss=losses,
            eval_loss=held_out_losses,
            steps=steps,
            batch=args.batch,
        )


if __name__ == "__main__":
    main()
