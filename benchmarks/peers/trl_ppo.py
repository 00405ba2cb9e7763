"""TRL's PPOTrainer (last in 1.12.0) on prompts that it is given.

    PYTHON -m benchmarks.peers.trl_ppo '<JSON>'

Keys of the JSON: `policy` and `reward` (directories), `prompts` (JSON file: lists of ids of one
length), `updates`, `episodes` (in an update), `new_tokens`, `epochs`, `minibatches`, `rate`
(learning rate), `kl_coef` and `bf16`. The last line is JSON: seconds of each update but the first,
how many answers ended early, peak memory.
"""

import json
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.memory import peak_mb


class Clock(TrainerCallback):
    """Notes when each update was done."""

    def __init__(self) -> None:
        """No update is done yet."""
        self.moments: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """TRL calls this behind each update."""
        self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each update but the first."""
        return [after - before for before, after in pairwise(self.moments)]


def config_of(spec: dict, folder: str) -> PPOConfig:
    """TRL's config for the JSON."""
    episodes = spec["episodes"]
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"],
        num_ppo_epochs=spec["epochs"],
        total_episodes=episodes * spec["updates"],
        local_rollout_forward_batch_size=episodes,
        response_length=spec["new_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=spec["kl_coef"],
        learning_rate=spec["rate"],
        lr_scheduler_type="linear",
        bf16=spec["bf16"],
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )


def trainer_of(spec: dict, folder: str) -> PPOTrainer:
    """TRL's trainer with its four models and the prompts."""

    def policy() -> torch.nn.Module:
        """A copy of the policy."""
        return AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32)

    def scorer() -> torch.nn.Module:
        """A copy of the reward model."""
        opened = AutoModelForSequenceClassification.from_pretrained
        return opened(spec["reward"], num_labels=1, dtype=torch.float32)

    prompts = json.loads(Path(spec["prompts"]).read_text())
    rows = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    return PPOTrainer(
        args=config_of(spec, folder),
        processing_class=AutoTokenizer.from_pretrained(spec["policy"], padding_side="left"),
        model=policy(),
        ref_model=policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=rows,
        eval_dataset=rows,
    )


def main(spec: dict) -> None:
    """Train as the JSON says, and print what came of it."""
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(spec, folder)
        trainer.add_callback(clock)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "val/num_eos_tokens" in row]
    done = {
        "seconds": clock.seconds(),
        "ended_early": sum(row["val/num_eos_tokens"] for row in logged),
        "autocast": trainer.accelerator.mixed_precision,
        "peak_mb": peak_mb(),
    }
    print(json.dumps(done))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
