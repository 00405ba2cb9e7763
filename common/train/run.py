"""What every stage's main() starts with: Accelerator, seeds, metrics, progress bar, interruption,
gate.

It lends tools and owns no loop.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from common.config.schema import to_dict
from common.config.training import TrainConfig
from common.handoff.locate import lineage
from common.handoff.report import provenance
from common.model.gpt import Trunk
from common.program.errors import InputError, Interrupted
from common.program.signals import catch_signals, release_signals
from common.train.log import Log
from common.train.placement import accelerator, has_bf16
from common.train.resume import (
    check_same_run,
    generators,
    load_moments,
    load_weights,
    newest_state,
    save_state,
)
from common.train.update import NonFiniteError, Update, update
from common.train.zero import zero_stage

# Keys that may change between an interrupted run and the one that goes on: they say where it writes
# and how it reports. The two that make up a micro-batch are free because their product with the
# processes is compared.
FREE = {"output_dir", "resume", "save_steps", "save_total_limit", "report_to"}
FREE |= {"per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}


class Run(Log):
    """One stage's run: placement, metrics, and what stage.json says at the end."""

    def __init__(self, cfg: TrainConfig, stage: str, kind: str) -> None:
        self.stage = stage
        self.stop: int | None = None  # number of the signal that asked for the end
        self.point: dict[str, Any] | None = (
            None  # what a save of this moment holds, beside the tensors; None: not begun
        )
        catch_signals(self.ask_to_stop)
        self.precision = cfg.mixed_precision
        if self.precision == "auto":
            self.precision = "bf16" if has_bf16() else "no"
        self.cfg, self.kind = cfg, kind
        self.accelerator = accelerator(
            self.precision,
            cfg.per_device_train_batch_size,
            cfg.max_grad_norm,
            log_with=cfg.report_to or None,
            project_dir=cfg.output_dir,
        )
        self.device = self.accelerator.device
        super().__init__(
            stage,
            Path(cfg.output_dir),
            self.accelerator.is_main_process,
            self.accelerator.log if cfg.report_to else None,
        )
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.found = newest_state(self.state)
        left = [
            path for path in self.folder.glob("*") if not path.name.startswith(".")
        ]  # hidden ones are the pipeline's notes
        if not cfg.resume and left:
            raise InputError(
                f"resume false: {cfg.output_dir} is not empty; to start over name an empty output_dir, or clear it"
            )
        self.global_batch, self.accumulation = self.batch_shape()
        if self.found:
            check_same_run(self.found[0], self.found[1]["run"], self.identity())
        set_seed(cfg.seed)
        self.started = time.perf_counter()
        self.skipped = 0  # updates left out, as not finite
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if cfg.report_to:
            flat = {
                k: v if isinstance(v, int | float | str | bool) else str(v)
                for k, v in to_dict(cfg).items()
            }
            self.accelerator.init_trackers(f"state-of-gpt-{stage}", flat)

    def batch_shape(self) -> tuple[int, int]:
        """(rows in an update over all processes, micro-batches of it on each). Where only the
        number of processes is not that of the state, the global batch stays, and so the place in
        the data: the accumulation gives way."""
        micro = self.cfg.per_device_train_batch_size
        asked = micro * self.cfg.gradient_accumulation_steps
        rows = asked * self.processes
        if self.found and self.found[1]["per_process"] == asked:
            rows = self.found[1]["run"]["global_batch"]
        if rows % (micro * self.processes):
            raise InputError(
                f"{self.found[0]}: is of a run with {rows} rows an update, which {self.processes} processes of "
                f"per_device_train_batch_size {micro} cannot share; change one of the two"
            )
        return rows, rows // (micro * self.processes)

    def start_or_resume(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, data: str, **kept: Any
    ) -> tuple[int, dict[str, Any]]:
        """-> (updates already done, values of the loop): those last given to `checkpoint`, or 0 and
        `kept`.

        Call it when everything is prepared, right before the loop: weights, optimizers, random
        generators and log files are then as they were. `data`: fingerprint of the training data.
        Raises InputError when the state is of another run.
        """
        self.raw, self.optimizer, self.data = module, optimizer, data
        step, found = 0, self.found
        if found is None:
            if self.main:
                shutil.rmtree(
                    self.folder / "adapter", ignore_errors=True
                )  # of an earlier run, perhaps with LoRA
            self.empty()
        else:
            path, loop = found
            check_same_run(path, {"data": loop["data"]}, {"data": data})
            load_moments(self.accelerator, module, optimizer, path)
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(loop["scaler"])
            step, kept, self.last, self.skipped = (
                loop["step"],
                loop["kept"],
                loop["last"],
                loop["skipped"],
            )
            self.started -= loop["seconds"]
            self.cut_back(loop["logs"])
            self.say(f"{self.stage}: going on from {path}")
        self.saved = step
        return step, kept

    def ask_to_stop(self, number: int, _: Any) -> None:
        """The first signal asks; a second one ends the process at once. Ctrl-C in a terminal comes
        twice where there is a launcher, which passes on what the processes were told already."""
        now = time.monotonic()
        if self.stop is None:
            self.stop, self.stopped = number, now
            if self.point is None:
                raise Interrupted(f"{self.stage}, not begun; the same command starts it")
        elif now - self.stopped > 2 or os.environ.get("WORLD_SIZE", "1") == "1":
            release_signals()
            os.kill(os.getpid(), number)

    def checkpoint(self, step: int, kept: Mapping[str, Any] | None = None) -> None:
        """Before update number `step` (from 0): save if it is time, with the loop's own values
        (JSON) for the resume.

        Raises Interrupted after the save when a signal asked for the end.
        """
        loop = {
            "step": step,
            "kept": dict(kept or {}),
            "last": dict(self.last),
            "logs": self.sizes(),
            "skipped": self.skipped,
        }
        self.point = {"loop": loop, "random": generators(self.device)}
        if self.cfg.save_steps and step % self.cfg.save_steps == 0:
            self.save()
        self.poll()

    def save(self) -> None:
        """What the last `checkpoint` was given; the weights must not have changed since."""
        loop, random = self.point["loop"], self.point["random"]
        if loop["step"] > self.saved:
            loop |= {"run": self.identity(), "data": self.data}
            loop["per_process"] = (
                self.cfg.per_device_train_batch_size * self.cfg.gradient_accumulation_steps
            )
            loop["scaler"] = (
                self.accelerator.scaler and self.accelerator.scaler.state_dict()
            )  # fp16's
            loop["seconds"] = round(time.perf_counter() - self.started, 2)
            keep = self.cfg.save_total_limit
            save_state(self.accelerator, self.raw, self.optimizer, self.state, loop, random, keep)
            self.saved = loop["step"]

    def poll(self, *_: Any) -> None:
        """In long work between a `checkpoint` and the update after it (evaluation, rollout): ends
        here when asked to.

        All processes must call it alike. Raises Interrupted after a save.
        """
        stop = torch.tensor(float(self.stop is not None), device=self.device)
        if self.accelerator.reduce(stop, "sum"):  # all processes save, or none
            self.save()
            if self.bar is not None:
                self.bar.close()
            where = f"saved in {self.state}" if self.saved else "not begun"
            raise Interrupted(
                f"{self.stage} after step {self.point['loop']['step']}, {where}; the same command goes on from there"
            )

    def update(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[Any],
        loss: Callable[[Any], torch.Tensor],
        counts: torch.Tensor,
    ) -> Update | None:
        """common.train.optimizers.update; None when it was refused as not finite and
        max_skipped_batches allows for one more."""
        try:
            return update(
                self.accelerator,
                model,
                optimizer,
                micro_batches,
                loss,
                counts,
                self.cfg.max_grad_norm,
            )
        except NonFiniteError as error:
            self.skip(step, error)
            return None

    def skip(self, step: int, error: NonFiniteError) -> None:
        """Count a batch that is left out; raises NonFiniteError, with stage and step, when that is
        one too many."""
        self.skipped += 1
        text = f"{self.stage}, step {step + 1}: {error}"
        if self.skipped > self.cfg.max_skipped_batches:
            raise NonFiniteError(f"{text}; max_skipped_batches is {self.cfg.max_skipped_batches}")
        self.say(f"{text}; left out ({self.skipped} of at most {self.cfg.max_skipped_batches})")

    def forget(self) -> None:
        """The stage is published: drop what a resume would have needed."""
        release_signals()
        self.accelerator.wait_for_everyone()  # nobody leaves while the main process publishes
        if self.main:
            shutil.rmtree(self.state, ignore_errors=True)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must share with the one that left the state."""
        config = {key: value for key, value in to_dict(self.cfg).items() if key not in FREE}
        parent = lineage(self.cfg.parent).get("parent_hash")
        return {**config, "parent_hash": parent, "global_batch": self.global_batch}

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """(model, optimizer) placed, in train mode, compiled if the config says so; `model` itself
        stays the raw one."""
        for module in model.modules():
            if isinstance(module, Trunk):
                module.checkpointing = self.cfg.gradient_checkpointing
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["names"] = [names[id(p)] for p in group["params"]]
        if self.found:
            load_weights(model, self.found[0])
        if zero_stage(self.accelerator):
            model.forward = self.autocast()(model.forward)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        model.train()
        return (torch.compile(model) if self.cfg.torch_compile else model), optimizer

    def autocast(self) -> torch.autocast:
        """The precision that prepared modules train in, for modules used outside `prepare`."""
        half = self.dtype != torch.float32
        return torch.autocast(
            self.device.type, self.dtype if half else torch.bfloat16, enabled=half
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products in training."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def finish(self, step: int, gate: tuple[bool, str], **extra: Any) -> dict[str, Any]:
        """The content of stage.json; prints the gate: one line on whether the stage learned what it
        should."""
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
            "precision": self.precision,
            "skipped_batches": self.skipped,
            **provenance(),
            **extra,
        }
