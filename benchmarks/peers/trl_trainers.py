"""TRL's SFTTrainer or RewardTrainer on rows that it is given.

    python -m benchmarks.peers.trl_trainers '<JSON>'

Keys of the JSON: `trainer` (sft or reward), `model` (a directory), `train` and `eval` (JSONL),
`steps`, `uncounted` (first steps that the clock leaves out), `batch`, `length` (limit in tokens),
`rate` (learning rate) and `bf16`. The last line is JSON: real tokens a second, training and
held-out loss.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Notes when the first `uncounted` steps and when the last one were done, and how many real
    tokens lie between."""

    def __init__(self, uncounted: int) -> None:
        """Nothing is done yet."""
        self.uncounted, self.tokens = uncounted, 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """TRL calls this behind each step."""
        self.end = time.perf_counter()
        if state.global_step == self.uncounted:
            self.begin, self.before = self.end, self.tokens

    def rate(self) -> float:
        """Real tokens a second."""
        return (self.tokens - self.before) / (self.end - self.begin)

    def counting(self, step):
        """A trainer's training_step that counts the tokens it is given."""

        def counted(model, inputs, *rest, **named):
            """The step."""
            masks = [value for key, value in inputs.items() if key.endswith("attention_mask")]
            self.tokens += sum(int(mask.sum()) for mask in masks)
            return step(model, inputs, *rest, **named)

        return counted


def open_model(spec: dict) -> torch.nn.Module:
    """The language model, or the reward model that is made from it."""
    if spec["trainer"] == "sft":
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    opened = AutoModelForSequenceClassification.from_pretrained
    model = opened(spec["model"], num_labels=1, dtype=torch.float32)
    # Drawn as ours is, three times as wide as transformers' own, so that losses can be compared.
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    return model


def trainer_of(spec: dict, folder: str) -> SFTTrainer | RewardTrainer:
    """TRL's trainer with model and rows."""
    sft = spec["trainer"] == "sft"
    config, trainer = (SFTConfig, SFTTrainer) if sft else (RewardConfig, RewardTrainer)
    tokenizer, model = AutoTokenizer.from_pretrained(spec["model"]), open_model(spec)
    files = {split: spec[split] for split in ("train", "eval")}
    rows = load_dataset("json", data_files=files, cache_dir=folder)
    args = config(
        output_dir=folder,
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        max_length=spec["length"],
        learning_rate=spec["rate"],
        lr_scheduler_type="linear",
        bf16=spec["bf16"],
        gradient_checkpointing=False,
        logging_steps=spec["steps"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        # In one batch, so that its loss is a mean over tokens, or pairs.
        per_device_eval_batch_size=len(rows["eval"]),
    )
    return trainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        processing_class=tokenizer,
    )


def main(spec: dict) -> None:
    """Train as the JSON says, and print what came of it."""
    torch.manual_seed(0)
    clock = Clock(spec["uncounted"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(spec, folder)
        trainer.add_callback(clock)
        trainer.training_step = clock.counting(trainer.training_step)
        trainer.train()
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        eval_loss = trainer.evaluate()["eval_loss"]
    done = {"tokens_per_second": clock.rate(), "tokens": clock.tokens}
    print(json.dumps(done | {"loss": logged[0], "eval_loss": eval_loss}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
