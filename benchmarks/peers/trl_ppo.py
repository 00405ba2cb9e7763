"""TRL's PPOTrainer (last in 1.12.0) on prompts that it is given: PYTHON -m benchmarks.peers.trl_ppo
'<JSON>'.

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
    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.moments.append(time.perf_counter())


def main(spec: dict) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32) for _ in range(2)
    )
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(
            spec["reward"], num_labels=1, dtype=torch.float32
        )
        for _ in range(2)
    )
    rows = Dataset.from_list(
        [{"input_ids": ids} for ids in json.loads(Path(spec["prompts"]).read_text())]
    )
    episodes = spec["episodes"]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
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
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=rows,
            eval_dataset=rows,
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "val/num_eos_tokens" in row]
    seconds = [
        after - before for before, after in zip(clock.moments, clock.moments[1:], strict=False)
    ]
    ended = sum(row["val/num_eos_tokens"] for row in logged)
    done = {
        "seconds": seconds,
        "ended_early": ended,
        "autocast": trainer.accelerator.mixed_precision,
    }
    print(json.dumps(done | {"peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
