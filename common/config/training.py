"""The keys that stages share: what each is called, what it may be, what it means."""

import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config.schema import InputPath, OutputDir, RowsPath, stage_config
from common.program.errors import InputError
from common.rows.batches import hold_out
from common.rows.sources import BadRows, Row, read_rows

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed: accelerate would go on without."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            raise ValueError(
                f"report_to {name}: the package is not installed; pip install {name}"
            ) from None


@stage_config
class ReadsRows:
    """What becomes of bad rows."""

    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (broken JSON, wrong columns or types, unknown role, no answer) ends
    the stage; or it is skipped and counted by reason, and the first few are named. Without any that
    can be used the stage ends all the same."""


SchedulerType = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


MOST_ROWS = 1_000_000  # of an update on one process: more is a mistake, and would fill its memory
MOST_TOKENS = 1 << 20  # of a row
MOST_EPOCHS = 1e6
MOST_RANK = 4096
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "no", "bf16", "fp16"]


@stage_config
class TrainConfig:
    """Keys that all four stages share."""

    output_dir: OutputDir
    """Where the stage publishes its directory."""
    parent: InputPath | None = None
    """Directory (or Hub id) of the model to start from; null = from scratch, where that makes
    sense."""
    seed: Seed = 0
    """Seed of weights, data order and sampling."""
    max_steps: Positive | None = None
    """Number of optimizer updates; wins over num_train_epochs. One of the two must be given."""
    num_train_epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] | None = None
    """Passes over the training rows, where max_steps is not given."""
    per_device_train_batch_size: Positive = 16
    """Rows in one micro-batch on one process."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches an update; the global batch is this times per_device_train_batch_size times
    processes."""
    max_length: Annotated[int, Field(gt=0, le=MOST_TOKENS)] = 128
    """Tokens in a training row."""
    learning_rate: NonNegative = 1e-3
    """Peak learning rate (AdamW)."""
    lr_scheduler_type: SchedulerType = "cosine"
    """Shape after the warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay, on matrices only."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Second AdamW beta."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this L2 norm."""
    mixed_precision: Precision = "auto"
    """auto = bf16 where GPU or CPU computes in it, else no (fp32). Weights and optimizer stay
    fp32."""
    torch_compile: bool = False
    """Compile the model; costs half a minute at the start and pays on longer runs."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more time."""
    max_skipped_batches: Annotated[int, Field(ge=0)] = 0
    """Updates with a loss or gradient that is not finite, which are left out before one more ends
    the run."""
    logging_steps: Positive = 25
    """Updates between two lines of metrics."""
    eval_steps: Positive | None = None
    """Updates between two evaluations (null: at the end only)."""
    save_steps: Positive | None = 500
    """Updates between two saves of what a resume needs (null: only when told to stop). The same
    command goes on from it."""
    resume: bool = True
    """Go on from a state in output_dir; --no_resume starts over, and wants an empty output_dir."""
    save_total_limit: Positive = 2
    """Saved states that are kept; all go when the stage is done."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio."""
    lora_r: Annotated[int, Field(ge=0, le=MOST_RANK)] = 0
    """Rank of LoRA adapters (0 = full finetuning); published merged, the adapter beside it."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA scale is lora_alpha / lora_r."""
    lora_targets: Annotated[list[Literal["qkv", "out", "up", "down"]], Field(min_length=1)] = [
        "qkv",
        "out",
        "up",
        "down",
    ]
    """Linear layers that get an adapter."""

    def __post_init__(self) -> None:
        check_trackers(self.report_to)
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("max_steps and num_train_epochs are both null: give one of the two")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows > MOST_ROWS:
            raise ValueError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}: at most "
                f"{MOST_ROWS:,} rows an update on one process"
            )


@stage_config
class RowsConfig(ReadsRows, TrainConfig):
    """Keys of the stages that train on rows and hold some out."""

    train_data: RowsPath
    """Rows: .jsonl, .json, .parquet, a folder of these, or a Hub data set."""
    eval_data: RowsPath | None = None
    """Held-out rows; null = rows of the last eval_fraction of the prompts in train_data."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts held out when there is no eval_data."""

    def read(
        self, prompt_of: Callable[[dict], Any], parse: Callable[[dict], Any]
    ) -> tuple[list[Row], list[Row], dict[str, int]]:
        """(training rows, held-out rows, how many were skipped by reason), each row parsed.

        prompt_of(row) tells what may not lie on both sides. Raises InputError when there are fewer
        rows than processes.
        """
        bad = BadRows(self.on_bad_row)
        rows = read_rows(self.train_data, parse, bad)
        held = read_rows(self.eval_data, parse, bad) if self.eval_data else []
        if not held:
            rows, held = hold_out(rows, self.eval_fraction, prompt_of)
        if len(rows) < (processes := int(os.environ.get("WORLD_SIZE", 1))):
            raise InputError(
                f"train_data {self.train_data}: {len(rows)} training rows for {processes} "
                "processes; use fewer"
            )
        return rows, held, dict(bad.counts)
