"""What every stage's main() starts with: shared config keys, Accelerator, seeds, metrics, progress bar, gate.

It lends tools and owns no loop.
"""

import json
import shutil
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import Field
from tqdm import tqdm

from common.checkpoint import lineage, provenance
from common.config import InputError, stage_config, to_dict
from common.optim import SchedulerType

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Precision = Literal["auto", "no", "bf16", "fp16"]


@stage_config
class TrainConfig:
    """Keys that all four stages share."""

    output_dir: str
    """Where the stage publishes its directory."""
    parent: str | None = None
    """Directory (or Hub id) of the model to start from; null = from scratch, where that makes sense."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, data order and sampling."""
    max_steps: Positive | None = None
    """Number of optimizer updates (null: use num_train_epochs)."""
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows (null: use max_steps)."""
    per_device_train_batch_size: Positive = 16
    """Rows in one micro-batch on one process."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches an update; the global batch is this times per_device_train_batch_size times processes."""
    max_length: Positive = 128
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
    """auto = bf16 where GPU or CPU computes in it, else no (fp32). Weights and optimizer stay fp32."""
    logging_steps: Positive = 25
    """Updates between two lines of metrics."""
    eval_steps: Positive | None = None
    """Updates between two evaluations (null: at the end only)."""
    report_to: list[str] = []
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio."""
    lora_r: Annotated[int, Field(ge=0)] = 0
    """Rank of LoRA adapters (0 = full finetuning); published merged, the adapter beside it."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA scale is lora_alpha / lora_r."""
    lora_targets: list[str] = ["qkv", "out", "up", "down"]
    """Linear layers that get an adapter."""


def has_bf16() -> bool:
    """Whether bf16 arithmetic (not emulation) is at hand."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The flags are private in torch; /proc/cpuinfo says the same on Linux, and a Mac's CPU is best left in fp32.
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Run:
    """One stage's run: placement, metrics, and what stage.json says at the end."""

    def __init__(self, cfg: TrainConfig, stage: str, kind: str) -> None:
        precision = cfg.mixed_precision
        if precision == "auto":
            precision = "bf16" if has_bf16() else "no"
        if precision == "fp16" and not torch.cuda.is_available():
            raise InputError("mixed_precision fp16: there is no GPU here, and CPUs train in no or bf16; use auto")
        self.cfg, self.stage, self.kind = cfg, stage, kind
        self.folder = Path(cfg.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output_dir {cfg.output_dir}: is a file; name a directory")
        if cfg.parent and self.folder.resolve() == Path(cfg.parent).resolve():
            raise InputError(f"output_dir {cfg.output_dir}: is the parent itself, which would be overwritten")
        self.accelerator = Accelerator(
            mixed_precision=precision,
            log_with=cfg.report_to or None,
            project_dir=cfg.output_dir,
            cpu=not torch.cuda.is_available(),
        )
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        set_seed(cfg.seed)
        self.started = time.perf_counter()
        self.last: dict[str, Any] = {}  # newest metrics, by name
        self.bar: tqdm | None = None
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / "adapter", ignore_errors=True)  # of an earlier run, perhaps with LoRA
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.folder / name).write_text("")
        if cfg.report_to:
            flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_dict(cfg).items()}
            self.accelerator.init_trackers(f"state-of-gpt-{stage}", flat)

    def autocast(self) -> AbstractContextManager:
        """The precision that prepared modules train in, for modules used outside `prepare`."""
        return self.accelerator.autocast()

    def progress(self, total: int, unit: str = "step", label: str | None = None) -> tqdm:
        """A progress bar on the main process, where someone watches; log lines appear above it, or alone in a file."""
        watched = self.main and sys.stderr.isatty()
        self.bar = tqdm(
            total=total, unit=unit, desc=label or self.stage, disable=not watched, dynamic_ncols=True, mininterval=0.5
        )
        return self.bar

    def say(self, line: Any) -> None:
        if self.main:
            tqdm.write(str(line), file=sys.stdout)
            sys.stdout.flush()

    def log(self, step: int, metrics: dict[str, float], note: str = "") -> None:
        """One line to the terminal, one to metrics.jsonl, and to the trackers."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self.last |= metrics
        if not self.main:
            return
        self.say(f"{self.stage} {step:>5}  " + "  ".join(f"{k} {number(v)}" for k, v in metrics.items()) + note)
        self.append("metrics.jsonl", {"step": step, **metrics})
        if self.cfg.report_to:
            self.accelerator.log(metrics, step=step)

    def log_samples(self, step: int, samples: list[dict[str, Any]], shown: int = 1) -> None:
        """Samples taken while training: all to samples.jsonl, the first few to the terminal."""
        if not self.main:
            return
        for i, row in enumerate(samples):
            self.append("samples.jsonl", {"step": step, **row})
            if i < shown:
                self.say("  " + "  ".join(f"{k}: {v!r}" if isinstance(v, str) else f"{k}: {v}" for k, v in row.items()))

    def append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, step: int, gate: tuple[bool, str], **extra: Any) -> dict[str, Any]:
        """The content of stage.json; prints the gate: one line on whether the stage learned what it should."""
        if self.bar is not None:
            self.bar.close()
        passed, text = gate
        self.say(f"gate {self.stage}: {'PASS' if passed else 'FAIL'}  {text}")
        if self.cfg.report_to:
            self.accelerator.end_training()
        return {
            "stage": self.stage,
            "kind": self.kind,
            "step": step,
            **lineage(self.cfg.parent),
            "config": to_dict(self.cfg),
            "seed": self.cfg.seed,
            "metrics": self.last,
            "gate": {"passed": bool(passed), "text": text},
            "wall_time": round(time.perf_counter() - self.started, 2),
            "processes": self.processes,
            "precision": self.accelerator.mixed_precision,
            **provenance(),
            **extra,
        }


def number(value: float) -> str:
    """Short and aligned enough to read in a log line."""
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that MFU is a share of: the data sheet's figure for a known GPU (dense bf16), else a GEMM timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        sheet = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "V100": 125e12}
        known = [flops for part, flops in sheet.items() if part in name]
        if known:
            return known[0]
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    a = torch.randn(1024, 1024, device=device).to(dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)
