"""What every stage's main() starts with: Accelerator, seeds, metrics, progress bar, interruption, gate.

It lends tools and owns no loop.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from common.checkpoint import lineage, provenance
from common.config import InputError, Interrupted, to_dict
from common.state import check_same_run, newest_state, save_state
from common.train_config import TrainConfig

LOGS = ("metrics.jsonl", "samples.jsonl")
# Keys that may change between an interrupted run and the one that goes on: they say where it writes and how it reports.
FREE = {"output_dir", "save_steps", "save_total_limit", "report_to"}


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
        self.stop: int | None = None  # number of the signal that asked for the end
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if cfg.report_to:
            flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in to_dict(cfg).items()}
            self.accelerator.init_trackers(f"state-of-gpt-{stage}", flat)

    def resume(self, **kept: Any) -> tuple[int, dict[str, Any]]:
        """-> (updates already done, values of the loop): those last given to `checkpoint`, or 0 and `kept`.

        Call it when everything is prepared, right before the loop: weights, optimizers, random generators and log files
        are then as they were. From here on SIGTERM and SIGINT ask for a save (a second one ends the run at once).
        Raises InputError when the state there is of another run.
        """
        step, found = 0, newest_state(self.state)
        if found is None:
            if self.main:
                shutil.rmtree(self.folder / "adapter", ignore_errors=True)  # of an earlier run, perhaps with LoRA
                for name in LOGS:
                    (self.folder / name).write_text("")
        else:
            path, loop = found
            check_same_run(path, loop["run"], self.identity())
            self.accelerator.load_state(str(path))
            step, kept, self.last = loop["step"], loop["kept"], loop["last"]
            self.started -= loop["seconds"]
            if self.main:
                for name, size in loop["logs"].items():  # lines written after the save are about to be written again
                    os.truncate(self.folder / name, size)
            self.say(f"{self.stage}: going on from {path}")
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGTERM, signal.SIGINT):
                signal.signal(kind, self.ask_to_stop)
        self.first_step = step
        return step, kept

    def ask_to_stop(self, number: int, _: Any) -> None:
        self.stop = number
        release_signals()

    def checkpoint(self, step: int, kept: Mapping[str, Any] | None = None) -> None:
        """Before update number `step` (from 0): save if it is time, with the loop's own values (JSON) for `resume`.

        Raises Interrupted after the save when a signal asked for the end.
        """
        stop = torch.tensor(float(self.stop is not None), device=self.device)
        stopping = bool(self.accelerator.reduce(stop, "sum"))  # all processes save, or none
        due = self.cfg.save_steps and step % self.cfg.save_steps == 0
        if (stopping or due) and step > self.first_step:
            logs = {name: (self.folder / name).stat().st_size for name in LOGS} if self.main else {}
            loop = {"step": step, "kept": dict(kept or {}), "last": self.last, "logs": logs, "run": self.identity()}
            loop["seconds"] = round(time.perf_counter() - self.started, 2)
            save_state(self.accelerator, self.state, step, loop, self.cfg.save_total_limit)
        if stopping:
            if self.bar is not None:
                self.bar.close()
            saved = f"saved in {self.state}" if step else "not begun"
            raise Interrupted(f"{self.stage} after step {step}, {saved}; the same command goes on from there")

    def forget(self) -> None:
        """The stage is published: drop what a resume would have needed."""
        if self.main:
            shutil.rmtree(self.state, ignore_errors=True)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must share with the one that left the state."""
        config = {key: value for key, value in to_dict(self.cfg).items() if key not in FREE}
        return {**config, "parent_hash": lineage(self.cfg.parent).get("parent_hash"), "processes": self.processes}

    def prepare(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[Any, ...]:
        """(model, *optimizers) placed, in train mode, compiled if the config says so; `model` itself stays the raw one."""
        model, *rest = self.accelerator.prepare(model, *optimizers)
        model.train()
        return (torch.compile(model) if self.cfg.torch_compile else model), *rest

    def autocast(self) -> AbstractContextManager:
        """The precision that prepared modules train in, for modules used outside `prepare`."""
        return self.accelerator.autocast()

    def progress(self, total: int, done: int = 0, unit: str = "step", label: str | None = None) -> tqdm:
        """A progress bar on the main process, where someone watches; log lines appear above it, or alone in a file."""
        watched = self.main and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc=label or self.stage,
            disable=not watched,
            dynamic_ncols=True,
            mininterval=0.5,
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
        release_signals()
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


def release_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def number(value: float) -> str:
    """Short and aligned enough to read in a log line."""
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"
