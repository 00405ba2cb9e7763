"""PPO, stages.rl.train beside TRL's last PPOTrainer: seconds an update, lower is better.

    python -m benchmarks.ppo --trl /path/to/environment/bin/python

TRL had it until 1.12.0, so that lives in an environment of its own: python -m venv trl112 &&
trl112/bin/pip install trl==1.12.0 An update is a rollout of 64 prompts of exactly 32 tokens with 64
new tokens each, scored by policy, reference, critic and reward model, then 4 epochs of 4
minibatches. Same weights (random Llamas), prompts, rates and coefficients. No answer ends early on
either side: the weights are such that the end token is never sampled. `shares`: where our seconds
go; `peak_mb`: the most memory that a side held.
"""

import json
import random
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

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

EPOCHS, MINIBATCHES, RATE, KL_COEF = 4, 4, 1e-5, 0.05


def update_flops(config: GPTConfig, episodes: int, prompt: int, new: int) -> float:
    """Model FLOPs of one update: sampling with a cache, four models over the result, and the epochs
    of policy and critic."""
    total = prompt + new
    sampling = forward_flops(config, episodes * (total - 1), total / 2, episodes * new)
    policy = forward_flops(config, episodes * total, total, episodes * new)
    critic = forward_flops(config, episodes * total, total)
    return sampling + 2 * (policy + critic) + 3 * EPOCHS * (policy + critic)


def main() -> None:
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
        raise SystemExit(
            f"--updates {args.updates}, --episodes {args.episodes}: need 2 or more, a multiple of {MINIBATCHES}"
        )

    tokenizer = letters(args.vocab_size)
    config = llama(args, 256)
    shares: dict[str, dict[str, float]] = {}
    peaks: dict[str, float] = {}
    draw = random.Random(0)
    alphabet = [chr(0x4E00 + i) for i in range(args.vocab_size - 5)]
    texts = [
        "".join(draw.choices(alphabet, k=args.prompt_tokens - 2))
        for _ in range(args.episodes * args.updates)
    ]
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        policy = write_model(
            scratch / "policy", endless(random_llama(config), tokenizer), tokenizer
        )
        torch.manual_seed(1)
        reward = write_model(scratch / "reward", RewardModel(config), tokenizer)
        rows = write_rows(scratch / "prompts.jsonl", ({"prompt": text} for text in texts))
        (scratch / "prompts.json").write_text(json.dumps(ids))

        def ours(precision: str) -> float:
            log, _ = run_stage(
                "stages.rl.train",
                {
                    "parent": policy,
                    "reward_model": reward,
                    "train_data": rows,
                    "max_prompt_length": args.prompt_tokens,
                    "max_new_tokens": args.new_tokens,
                    "per_device_train_batch_size": args.episodes // MINIBATCHES,
                    "num_minibatches": MINIBATCHES,
                    "num_ppo_epochs": EPOCHS,
                    "max_steps": args.updates,
                    "learning_rate": RATE,
                    "lr_scheduler_type": "linear",
                    "kl_coef": KL_COEF,
                    "mixed_precision": MIXED[precision],
                    "save_steps": None,
                    "samples": 0,
                },
                folder,
            )
            if any(row["length"] != args.new_tokens for row in log):
                raise RuntimeError(
                    f"answers of ours ended early: {[row['length'] for row in log]} tokens on average"
                )
            parts = {
                key: sum(row[key] for row in log[1:])
                for key in log[0]
                if key.startswith("seconds_")
            }
            whole = sum(parts.values())
            shares[f"ours {precision}"] = {
                key.removeprefix("seconds_"): round(s / whole, 3) for key, s in parts.items()
            }
            peaks[f"ours {precision}"] = log[-1]["peak_mb"]
            return statistics.mean(after["at"] - before["at"] for before, after in pairwise(log))

        def trl(precision: str) -> float:
            if not args.trl or not Path(args.trl).exists():
                how = "python -m venv trl112 && trl112/bin/pip install trl==1.12.0, and --trl trl112/bin/python"
                raise Missing(f"not found at --trl {args.trl}: {how}")
            spec = {
                "policy": policy,
                "reward": reward,
                "prompts": str(scratch / "prompts.json"),
                "updates": args.updates,
                "episodes": args.episodes,
                "new_tokens": args.new_tokens,
                "epochs": EPOCHS,
                "minibatches": MINIBATCHES,
                "rate": RATE,
                "kl_coef": KL_COEF,
                "bf16": precision == "bf16",
            }
            # Its own bf16 key changes nothing (transformers 5): what `accelerate launch
            # --mixed_precision` sets does.
            mixed = MIXED[precision]
            done = child(
                [args.trl, "-m", "benchmarks.peers.trl_ppo", json.dumps(spec)],
                ACCELERATE_MIXED_PRECISION=mixed,
            )
            if done["autocast"] != mixed:
                raise RuntimeError(f"TRL computed in {done['autocast']}, not in {precision}")
            if done["ended_early"]:
                raise RuntimeError(f"{done['ended_early']} answers of TRL ended early")
            peaks[f"TRL 1.12 {precision}"] = done["peak_mb"]
            return statistics.mean(done["seconds"])

        side_by_side(
            "ppo",
            "s/update",
            by_precision("ours", args.precisions, ours)
            | by_precision("TRL 1.12", args.precisions, trl),
            runs=args.runs,
            alone=args.alone,
            lower_is_better=True,
            shares=shares,
            peak_mb=peaks,
            updates=args.updates,
            episodes=args.episodes,
            flops_per_unit=update_flops(config, args.episodes, args.prompt_tokens, args.new_tokens),
        )


if __name__ == "__main__":
    main()
