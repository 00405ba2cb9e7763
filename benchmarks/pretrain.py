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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
README: dict[str, Any] = {  # nanoGPT's run for a CPU
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "batch": 12,
    "warmup": 100,
    "decay_to": 1e-4,
}


def nanogpt(args: argparse.Namespace, precision: str, **spec: Any) -> dict[str, Any]:
    """What benchmarks.peers.nanogpt says of a run. Raises Missing where there is no clone."""
    clone = Path(args.nanogpt or "nanoGPT").resolve()
    if not (clone / "model.py").exists():
        how = "git clone https://github.com/karpathy/nanoGPT, and --nanogpt nanoGPT"
        raise Missing(f"no clone at --nanogpt: {how}")
    text = str(Path(args.text).resolve())
    return peer("nanogpt", clone=str(clone), text=text, bf16=precision == "bf16", **spec)


def training_cost(config: GPTConfig, rows: int, length: int) -> float:
    """Model FLOPs of training on so many rows of this length."""
    return training_flops(config, [length], length) * rows * length


class Speed:
    """Both sides train the same shape for a few updates."""

    def __init__(self, args: argparse.Namespace, shards: str, scratch: str) -> None:
        """`shards`: our folder of the text; `scratch`: where runs may leave what they like."""
        self.args, self.shards, self.scratch = args, shards, scratch
        heads = max(1, args.n_embd // 64)
        self.shape = {"n_layer": args.n_layer, "n_head": heads, "n_embd": args.n_embd}
        self.uncounted = max(1, args.steps // 4)
        self.steps = args.steps + self.uncounted
        self.parameters: dict[str, int] = {}  # of each side
        self.config: GPTConfig | None = None  # of ours, once it has run

    def ours(self, precision: str) -> float:
        """Tokens a second of our stage."""
        config = {
            **self.shape,
            "family": "gpt2",
            "attention_bias": False,
            "mlp_bias": False,
            "train_data": self.shards,
            "document_mask": False,
            "max_length": self.args.block,
            "per_device_train_batch_size": self.args.batch,
            "max_steps": self.steps,
            "learning_rate": 1e-3,
            "min_lr_ratio": 0.1,
            "weight_decay": 0.1,
            "adam_beta2": 0.99,
            "mixed_precision": MIXED[precision],
            "logging_steps": 1,
            "eval_rows": 1,
            "save_steps": None,
        }
        log, stage = run_stage("stages.pretrain.train", config, self.scratch)
        self.parameters[f"ours {precision}"] = stage["parameters"]
        self.config = load_config(stage["config"]["output_dir"])
        return tokens_per_second(log, self.uncounted)

    def theirs(self, precision: str) -> float:
        """Tokens a second of nanoGPT."""
        done = nanogpt(
            self.args,
            precision,
            **self.shape,
            block_size=self.args.block,
            batch=self.args.batch,
            steps=self.steps,
            uncounted=self.uncounted,
            warmup=0,
            decay_to=1e-4,
            evaluate=False,
        )
        self.parameters[f"nanoGPT {precision}"] = done["parameters"]
        return done["tokens_per_second"]

    def flops(self, _: str) -> float:
        """Model FLOPs of training on a token, the same on both sides; known once ours has run."""
        assert self.config is not None
        return training_flops(self.config, [self.args.block], self.args.block)

    def compare(self) -> None:
        """Run both sides and print the line."""
        args = self.args
        sides = by_precision("ours", args.precisions, self.ours)
        sides |= by_precision("nanoGPT", args.precisions, self.theirs)
        side_by_side(
            "pretrain speed",
            "tokens/s",
            sides,
            runs=args.runs,
            alone=args.alone,
            flops_per_unit=self.flops,
            parameters=self.parameters,
            steps=self.steps,
            batch=args.batch,
            block=args.block,
        )


class Reached(NamedTuple):
    """How a side came to its loss."""

    loss: float  # over the whole held-out text, nats a character
    parameters: int
    updates: int
    flops: float  # of the training until then


class TimeToLoss:
    """nanoGPT trains to the end of its run, ours until it is as good."""

    def __init__(self, args: argparse.Namespace, shards: str, scratch: str) -> None:
        """`shards`: our folder of the text; `scratch`: where runs may leave what they like."""
        self.args, self.scratch = args, scratch
        self.reached: dict[str, Reached] = {}  # by side
        self.recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8")) | {
            "train_data": shards,
            "eval_steps": args.eval_steps,
            "logging_steps": args.eval_steps,
            "sample_prompts": [],
            "eval_rows": 10**6,  # all of the held-out text
            "save_steps": None,
        }
        if args.max_steps:
            self.recipe["max_steps"] = args.max_steps

    def theirs(self, precision: str) -> float:
        """Seconds of nanoGPT's training."""
        steps = self.args.nanogpt_steps
        how = {"steps": steps, "uncounted": 0, "evaluate": True}
        done = nanogpt(self.args, precision, **README, **how)
        shape: dict[str, Any] = {key: README[key] for key in ("n_layer", "n_head", "n_embd")}
        config = GPTConfig(family="gpt2", vocab_size=65, **shape)
        cost = training_cost(config, steps * README["batch"], README["block_size"])
        reached = Reached(done["loss"], done["parameters"], steps, cost)
        self.reached[f"nanoGPT {precision}"] = reached
        return done["seconds"]

    def ours(self, precision: str) -> float:
        """Seconds of our training until it is as good as the best of nanoGPT's."""
        theirs = [found.loss for name, found in self.reached.items() if name.startswith("nanoGPT")]
        target = min([self.args.target, *theirs])
        config = self.recipe | {"mixed_precision": MIXED[precision]}
        log, stage = run_stage("stages.pretrain.train", config, self.scratch)
        rows, length = config["per_device_train_batch_size"], config["max_length"]
        seconds, done = 0.0, 0
        for row in log:
            if "tokens/s" in row:
                seconds += (row["step"] - done) * rows * length / row["tokens/s"]
                done = int(row["step"])
            elif done and row["eval_loss"] <= target:
                shape = load_config(stage["config"]["output_dir"])
                cost = training_cost(shape, done * rows, length)
                reached = Reached(row["eval_loss"], stage["parameters"], done, cost)
                self.reached[f"ours {precision}"] = reached
                return seconds
        found = f"{log[-1]['eval_loss']:.4f} nats a character"
        raise RuntimeError(f"{RECIPE} ended at {found}, above {target:.4f}")

    def compare(self) -> None:
        """Run both sides, nanoGPT first, and print the line."""
        args = self.args
        sides = by_precision("nanoGPT", args.precisions, self.theirs)
        sides |= by_precision("ours", args.precisions, self.ours)
        columns: dict[str, dict[str, float]] = {"loss": {}, "updates": {}, "parameters": {}}

        def noting(name: str, run: Callable[[], float]) -> float:
            """Run a side and put what it reached into the line's columns."""
            seconds = run()
            for column, values in columns.items():
                values[name] = getattr(self.reached[name], column)
            return seconds

        side_by_side(
            "pretrain loss",
            "s",
            {name: partial(noting, name, run) for name, run in sides.items()},
            runs=args.runs,
            alone=args.alone,
            warm_up=False,
            flops_per_unit=lambda name: self.reached[name].flops,
            **columns,
        )


def options() -> argparse.Namespace:
    """The arguments."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--text", required=True, help="a text file, tinyshakespeare for the figures that are known"
    )
    parser.add_argument("--nanogpt", help="a clone of nanoGPT")
    what = "tokens a second, or seconds to a loss"
    parser.add_argument("--what", choices=("speed", "loss"), default="speed", help=what)
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
    target = "the loss to reach, or nanoGPT's here if that is lower"
    group.add_argument("--target", type=float, default=1.886, help=target)
    return start(parser)


def main() -> None:
    """Prepare the text, run both sides."""
    args = options()
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        prepare = {
            "train_data": [str(Path(args.text).resolve())],
            "output_dir": str(shards),
            "tokenizer": "characters",
            "eval_fraction": 0.1,
        }
        launch("stages.pretrain.prepare", prepare, Path(scratch))
        bench = Speed if args.what == "speed" else TimeToLoss
        bench(args, str(shards), scratch).compare()


if __name__ == "__main__":
    main()
