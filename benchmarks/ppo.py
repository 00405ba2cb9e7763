"""PPO, stages.rl.train beside TRL's last PPOTrainer: seconds an update, lower is better.

    python -m benchmarks.ppo --trl /path/to/environment/bin/python

TRL had it until 1.12.0, so that lives in an environment of its own:

    python -m venv trl112 && trl112/bin/pip install trl==1.12.0

An update is a rollout of 64 prompts of exactly 32 tokens with 64
new tokens each, scored by policy, reference, critic and reward model, then 4 epochs of 4
minibatches. Same weights (random Llamas), prompts, rates and coefficients. No answer ends early on
either side: the weights are such that the end token is never sampled. `shares`: where our seconds
go; `peak_mb`: the most memory that a side held.
"""

import argparse
import json
import random
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import Missing, arguments, child, side_by_side, start
from benchmarks.workload import (
    MIXED,
    by_precision,
    endless,
    letters,
    llama,
    random_llama,
    run_stage,
    shape_arguments,
    write_model,
    write_rows,
)
from common.model.costs import forward_flops
from common.model.gpt import RewardModel
from common.model.shape import GPTConfig
from common.text.chat import prompt_ids
from common.text.tokenizer import Tokenizer

EPOCHS, MINIBATCHES, RATE, KL_COEF = 4, 4, 1e-5, 0.05


def update_flops(config: GPTConfig, episodes: int, prompt: int, new: int) -> float:
    """Model FLOPs of one update: sampling with a cache, four models over the result, and the epochs
    of policy and critic."""
    total = prompt + new
    sampling = forward_flops(config, episodes * (total - 1), total / 2, episodes * new)
    policy = forward_flops(config, episodes * total, total, episodes * new)
    critic = forward_flops(config, episodes * total, total)
    return sampling + 2 * (policy + critic) + 3 * EPOCHS * (policy + critic)


class Bench:
    """The work of both sides in a folder, and what is noted beside the speed."""

    def __init__(self, args: argparse.Namespace, config: GPTConfig, folder: Path) -> None:
        """Write the models and the prompts."""
        self.args, self.folder = args, folder
        self.shares: dict[str, dict[str, float]] = {}  # of the seconds of each of our sides
        self.peak_mb: dict[str, float] = {}  # of each side
        tokenizer = letters(args.vocab_size)
        policy = endless(random_llama(config), tokenizer)
        self.policy = write_model(folder / "policy", policy, tokenizer)
        torch.manual_seed(1)
        self.reward = write_model(folder / "reward", RewardModel(config), tokenizer)
        self.write_prompts(tokenizer)

    def write_prompts(self, tokenizer: Tokenizer) -> None:
        """As many prompts as there are episodes, all of the same length: as text for us, as ids for
        TRL."""
        args, draw = self.args, random.Random(0)
        alphabet = [chr(0x4E00 + i) for i in range(args.vocab_size - 5)]
        number, length = args.episodes * args.updates, args.prompt_tokens - 2
        texts = ["".join(draw.choices(alphabet, k=length)) for _ in range(number)]
        ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        self.rows = write_rows(self.folder / "prompts.jsonl", ({"prompt": t} for t in texts))
        self.ids = self.folder / "prompts.json"
        self.ids.write_text(json.dumps(ids))

    def ours(self, precision: str) -> float:
        """Seconds an update of our stage."""
        config = self.stage_config(precision)
        log, _ = run_stage("stages.rl.train", config, str(self.folder))
        lengths = [row["length"] for row in log]
        if any(length != self.args.new_tokens for length in lengths):
            raise RuntimeError(f"answers of ours ended early: {lengths} tokens on average")
        parts = {
            key.removeprefix("seconds_"): sum(row[key] for row in log[1:])
            for key in log[0]
            if key.startswith("seconds_")
        }
        whole = sum(parts.values())
        self.shares[f"ours {precision}"] = {
            part: round(seconds / whole, 3) for part, seconds in parts.items()
        }
        self.peak_mb[f"ours {precision}"] = log[-1]["peak_mb"]
        return statistics.mean(after["at"] - before["at"] for before, after in pairwise(log))

    def trl(self, precision: str) -> float:
        """Seconds an update of TRL's trainer."""
        python = self.args.trl
        if not python or not Path(python).exists():
            how = "python -m venv trl112 && trl112/bin/pip install trl==1.12.0"
            how += ", and --trl trl112/bin/python"
            raise Missing(f"not found at --trl {python}: {how}")
        spec = json.dumps(self.trainer_spec(precision))
        # Its own bf16 key changes nothing (transformers 5): what `accelerate launch
        # --mixed_precision` sets does.
        mixed = MIXED[precision]
        command = [python, "-m", "benchmarks.peers.trl_ppo", spec]
        done = child(command, ACCELERATE_MIXED_PRECISION=mixed)
        if done["autocast"] != mixed:
            raise RuntimeError(f"TRL computed in {done['autocast']}, not in {precision}")
        if done["ended_early"]:
            raise RuntimeError(f"{done['ended_early']} answers of TRL ended early")
        self.peak_mb[f"TRL 1.12 {precision}"] = done["peak_mb"]
        return statistics.mean(done["seconds"])

    def stage_config(self, precision: str) -> dict[str, Any]:
        """The config of our stage."""
        return {
            "parent": self.policy,
            "reward_model": self.reward,
            "train_data": self.rows,
            "max_prompt_length": self.args.prompt_tokens,
            "max_new_tokens": self.args.new_tokens,
            "per_device_train_batch_size": self.args.episodes // MINIBATCHES,
            "num_minibatches": MINIBATCHES,
            "num_ppo_epochs": EPOCHS,
            "max_steps": self.args.updates,
            "learning_rate": RATE,
            "lr_scheduler_type": "linear",
            "kl_coef": KL_COEF,
            "mixed_precision": MIXED[precision],
            "save_steps": None,
            "samples": 0,
        }

    def trainer_spec(self, precision: str) -> dict[str, Any]:
        """The same for benchmarks.peers.trl_ppo."""
        return {
            "policy": self.policy,
            "reward": self.reward,
            "prompts": str(self.ids),
            "updates": self.args.updates,
            "episodes": self.args.episodes,
            "new_tokens": self.args.new_tokens,
            "epochs": EPOCHS,
            "minibatches": MINIBATCHES,
            "rate": RATE,
            "kl_coef": KL_COEF,
            "bf16": precision == "bf16",
        }


def options() -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments(__doc__)
    parser.add_argument("--trl", help="the Python of an environment with trl==1.12.0")
    parser.add_argument(
        "--updates", type=int, default=3, help="updates of a run; the first is not counted"
    )
    parser.add_argument("--episodes", type=int, default=64, help="episodes in an update")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens in a prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens in an answer")
    shape_arguments(parser)
    args = start(parser)
    if args.updates < 2 or args.episodes % MINIBATCHES:
        given = f"--updates {args.updates}, --episodes {args.episodes}"
        raise SystemExit(f"{given}: need 2 or more, a multiple of {MINIBATCHES}")
    return args


def main() -> None:
    """Write the work, run both sides."""
    args = options()
    config = llama(args, 256)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, config, Path(folder))
        sides = by_precision("ours", args.precisions, bench.ours)
        sides |= by_precision("TRL 1.12", args.precisions, bench.trl)
        side_by_side(
            "ppo",
            "s/update",
            sides,
            runs=args.runs,
            alone=args.alone,
            shares=bench.shares,
            peak_mb=bench.peak_mb,
            updates=args.updates,
            episodes=args.episodes,
            flops_per_unit=update_flops(config, args.episodes, args.prompt_tokens, args.new_tokens),
        )


if __name__ == "__main__":
    main()
