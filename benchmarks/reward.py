"""Reward modelling, stages.reward.train beside TRL's RewardTrainer: real (unpadded) tokens a
second, chosen and rejected.

    python -m benchmarks.reward --data preferences.json

Same trunk (a random Llama; each side draws its own head), chat format, pairs, batch, limit and
learning rate. Pairs longer than the limit are left out beforehand, as both sides would.
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
from common.text.chat import comparison_prompt, render
from common.text.tokenizer import Tokenizer

LENGTH, RATE = 512, 1e-4
HELD_OUT = 16  # pairs for the held-out loss


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--data",
        required=True,
        help="preferences: a JSON list of conversations (or prompt), chosen, rejected",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="counted updates; a quarter as many come before"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs in an update")
    shape_arguments(parser)
    args = start(parser)
    uncounted = max(1, args.steps // 4)
    steps = args.steps + uncounted

    pairs = [sides(row) for row in json.loads(Path(args.data).read_text(encoding="utf-8"))]
    texts = ("\n".join(turn["content"] for turn in side) for pair in pairs for side in pair)
    tokenizer = Tokenizer.train_bpe(texts, args.vocab_size).with_chat()
    lengths = [[len(render(tokenizer, side).ids) for side in pair] for pair in pairs]
    fitting = [
        i for i, both in enumerate(lengths) if max(both) <= LENGTH and pairs[i][0] != pairs[i][1]
    ]
    if len(fitting) < args.batch + HELD_OUT:
        raise SystemExit(
            f"{args.data}: has {len(fitting)} pairs of at most {LENGTH} tokens, too few"
        )
    config = llama(args, 2 * LENGTH)
    losses: dict[str, float] = {}
    held_out_losses: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", random_llama(config), tokenizer)
        rows = [
            {"prompt": pairs[i][0][:-1], "chosen": pairs[i][0][-1:], "rejected": pairs[i][1][-1:]}
            for i in fitting
        ]
        train = write_rows(Path(scratch) / "train.jsonl", rows[HELD_OUT:])
        held_out = write_rows(Path(scratch) / "eval.jsonl", rows[:HELD_OUT])

        def ours(precision: str) -> float:
            log, _ = run_stage(
                "stages.reward.train",
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
                },
                scratch,
            )
            logged = [row["loss"] for row in log if "loss" in row]
            losses[f"ours {precision}"] = sum(logged) / len(logged)
            held_out_losses[f"ours {precision}"] = next(
                row["eval_loss"] for row in reversed(log) if "eval_loss" in row
            )
            return tokens_per_second(log, uncounted)

        def trl(precision: str) -> float:
            done = trl_trainer(
                trainer="reward",
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

        flat = [length for i in fitting[HELD_OUT:] for length in lengths[i]]
        side_by_side(
            "reward",
            "tokens/s",
            by_precision("ours", args.precisions, ours)
            | by_precision(trl_name(), args.precisions, trl),
            runs=args.runs,
            alone=args.alone,
            flops_per_unit=training_flops(config, flat, 0),
            loss=losses,
            eval_loss=held_out_losses,
            steps=steps,
            batch=args.batch,
            pairs=len(fitting),
        )


def sides(row: dict) -> list[list[dict[str, str]]]:
    """[messages of the prompt and the chosen answer, ... and the rejected one]."""
    prompt = comparison_prompt(row)
    texts = (
        side if isinstance(side := row[name], str) else side["value"]
        for name in ("chosen", "rejected")
    )
    return [[*prompt, {"role": "assistant", "content": text}] for text in texts]


if __name__ == "__main__":
    main()
