"""Pretraining on the characters of one text, stages.pretrain.train beside nanoGPT.

    python -m benchmarks.pretrain --text input.txt --nanogpt /path/to/nanoGPT
    python -m benchmarks.pretrain --text input.txt --nanogpt /path/to/nanoGPT --what loss --runs 1

nanoGPT is a clone: git clone https://github.com/karpathy/nanoGPT. On a CPU it computes in fp32;
"nanoGPT bf16" adds autocast.

speed: tokens a second of training a GPT-2 (6 layers, width 384, rows of 256 characters, 32 of them
in an update). loss: seconds of training, evaluation left out, to a loss over the whole held-out
text in rows of 64. nanoGPT's is that at the end of the run which its README has for a CPU. Ours is
the first (of one every --eval_steps updates of configs/nanogpt) that is as good as the best of
nanoGPT's.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.side_by_side import ROOT, Missing, arguments, side_by_side, start
from benchmarks.workload import (
    MIXED,
    by_precision,
    launch,
    peer,
    run_stage,
    tokens_per_second,
    training_flops,
)
from common.handoff.publish import load_config
from common.model.shape import GPTConfig

RECIPE = ROOT / "configs" / "nanogpt" / "pretrain.yaml"
README = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "batch": 12,
    "warmup": 100,
    "decay_to": 1e-4,
}


def nanogpt(args: argparse.Namespace, precision: str, **spec: Any) -> dict[str, Any]:
    clone = Path(args.nanogpt or "nanoGPT").resolve()
    if not (clone / "model.py").exists():
        raise Missing(
            "no clone at --nanogpt: git clone https://github.com/karpathy/nanoGPT, and --nanogpt nanoGPT"
        )
    return peer(
        "nanogpt",
        clone=str(clone),
        text=str(Path(args.text).resolve()),
        bf16=precision == "bf16",
        **spec,
    )


def speed(args: argparse.Namespace, shards: str, scratch: str) -> None:
    shape = {"n_layer": args.n_layer, "n_head": max(1, args.n_embd // 64), "n_embd": args.n_embd}
    uncounted = max(1, args.steps // 4)
    steps = args.steps + uncounted
    parameters, configs = {}, {}

    def ours(precision: str) -> float:
        log, stage = run_stage(
            "stages.pretrain.train",
            {
                **shape,
                "family": "gpt2",
                "attention_bias": False,
                "mlp_bias": False,
                "train_data": shards,
                "document_mask": False,
                "max_length": args.block,
                "per_device_train_batch_size": args.batch,
                "max_steps": steps,
                "learning_rate": 1e-3,
                "min_lr_ratio": 0.1,
                "weight_decay": 0.1,
                "adam_beta2": 0.99,
                "mixed_precision": MIXED[precision],
                "logging_steps": 1,
                "eval_rows": 1,
                "save_steps": None,
            },
            scratch,
        )
        parameters[f"ours {precision}"], configs["ours"] = (
            stage["parameters"],
            load_config(stage["config"]["output_dir"]),
        )
        return tokens_per_second(log, uncounted)

    def theirs(precision: str) -> float:
        done = nanogpt(
            args,
            precision,
            **shape,
            block_size=args.block,
            batch=args.batch,
            steps=steps,
            uncounted=uncounted,
            warmup=0,
            decay_to=1e-4,
            evaluate=False,
        )
        parameters[f"nanoGPT {precision}"] = done["parameters"]
        return done["tokens_per_second"]

    side_by_side(
        "pretrain speed",
        "tokens/s",
        by_precision("ours", args.precisions, ours)
        | by_precision("nanoGPT", args.precisions, theirs),
        runs=args.runs,
        alone=args.alone,
        flops_per_unit=lambda _: training_flops(configs["ours"], [args.block], args.block),
        parameters=parameters,
        steps=steps,
        batch=args.batch,
        block=args.block,
    )


def time_to_loss(args: argparse.Namespace, shards: str, scratch: str) -> None:
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {
        "train_data": shards,
        "eval_steps": args.eval_steps,
        "logging_steps": args.eval_steps,
        "sample_prompts": [],
    }
    recipe |= {"eval_rows": 10**6, "save_steps": None}  # all of the held-out text
    recipe |= {"max_steps": args.max_steps} if args.max_steps else {}
    losses, parameters, updates, flops = {}, {}, {}, {}

    def theirs(precision: str) -> float:
        done = nanogpt(
            args, precision, **README, steps=args.nanogpt_steps, uncounted=0, evaluate=True
        )
        name, shape = (
            f"nanoGPT {precision}",
            {key: README[key] for key in ("n_layer", "n_head", "n_embd")},
        )
        losses[name], parameters[name], updates[name] = (
            done["loss"],
            done["parameters"],
            args.nanogpt_steps,
        )
        rows = args.nanogpt_steps * README["batch"]
        flops[name] = training_cost(
            GPTConfig(family="gpt2", vocab_size=65, **shape), rows, README["block_size"]
        )
        return done["seconds"]

    def ours(precision: str) -> float:
        target = min(
            [args.target, *(value for name, value in losses.items() if name.startswith("nanoGPT"))]
        )
        log, stage = run_stage(
            "stages.pretrain.train", recipe | {"mixed_precision": MIXED[precision]}, scratch
        )
        name, seconds, done = f"ours {precision}", 0.0, 0
        rows, length = recipe["per_device_train_batch_size"], recipe["max_length"]
        for row in log:
            if "tokens/s" in row:
                seconds += (row["step"] - done) * rows * length / row["tokens/s"]
                done = row["step"]
            elif done and row["eval_loss"] <= target:
                losses[name], parameters[name], updates[name] = (
                    row["eval_loss"],
                    stage["parameters"],
                    done,
                )
                flops[name] = training_cost(
                    load_config(stage["config"]["output_dir"]), done * rows, length
                )
                return seconds
        raise RuntimeError(
            f"{RECIPE} ended at {log[-1]['eval_loss']:.4f} nats a character, above {target:.4f}"
        )

    side_by_side(
        "pretrain loss",
        "s",
        by_precision("nanoGPT", args.precisions, theirs)
        | by_precision("ours", args.precisions, ours),
        runs=args.runs,
        alone=args.alone,
        lower_is_better=True,
        warm_up=False,
        flops_per_unit=flops.__getitem__,
        loss=losses,
        updates=updates,
        parameters=parameters,
    )


def training_cost(config: GPTConfig, rows: int, length: int) -> float:
    return training_flops(config, [length], length) * rows * length


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--text", required=True, help="a text file, tinyshakespeare for the figures that are known"
    )
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    parser.add_argument(
        "--what",
        choices=("speed", "loss"),
        default="speed",
        help="tokens a second, or seconds to a loss",
    )
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--steps", type=int, default=4, help="counted updates; a quarter as many come before"
    )
    group.add_argument("--n_layer", type=int, default=6, help="layers")
    group.add_argument("--n_embd", type=int, default=384, help="width, in heads of 64")
    group.add_argument("--block", type=int, default=256, help="characters in a row")
    group.add_argument("--batch", type=int, default=32, help="rows in an update")
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--eval_steps", type=int, default=50, help="updates of ours between two evaluations"
    )
    group.add_argument("--max_steps", type=int, help="updates of ours; default: the recipe's")
    group.add_argument("--nanogpt_steps", type=int, default=2000, help="updates of nanoGPT")
    group.add_argument(
        "--target",
        type=float,
        default=1.886,
        help="the loss to reach, or nanoGPT's here if that is lower",
    )
    args = start(parser)
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        launch(
            "stages.pretrain.prepare",
            {
                "train_data": [str(Path(args.text).resolve())],
                "output_dir": str(shards),
                "tokenizer": "characters",
                "eval_fraction": 0.1,
            },
            Path(scratch),
        )
        (speed if args.what == "speed" else time_to_loss)(args, str(shards), scratch)


if __name__ == "__main__":
    main()
