"""What every stage's main() starts with, and ends with: placement, seed, log, resuming, the
published directory.

It lends tools and owns no loop. A stage's loop is

    run = Run(cfg, "sft", "lm")
    model, optimizer = run.prepare(raw, optimizer)
    first_step, kept = run.start_or_resume(raw, optimizer, fingerprint(rows))
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step == steps:
            break
        ... run.update(...), run.log(...)
    run.publish(steps, Gate(passed, text), tokenizer, raw)
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import nn

from common.config.schema import to_dict
from common.config.training import TrainConfig
from common.handoff.adapter import save_adapter
from common.handoff.locate import lineage
from common.handoff.ownership import claim, sign
from common.handoff.publish import Kind, publish
from common.handoff.report import MODEL, Gate, stage_report
from common.model.gpt import GPT, RewardModel, Trunk
from common.model.lora import merged_state
from common.program.errors import Interrupted
from common.program.files import MANIFEST
from common.program.signals import release_signals
from common.text.tokenizer import Tokenizer
from common.train.interruption import Interruption
from common.train.log import LOGS, Log
from common.train.placement import DTYPES, accelerator, chosen_precision, whole
from common.train.resume import (
    batch_shape,
    check_empty,
    check_same_run,
    drop_all,
    generators,
    identity,
    load_moments,
    load_weights,
    newest_state,
    rows_per_process,
    save_state,
    with_new_keys,
)
from common.train.update import NonFiniteError, Update, update
from common.train.zero import zero_stage

# All that a run may write to output_dir; and shards of weights, which would be read in place of its
# own.
SHARDS = ("model.safetensors.index.json", "model-*.safetensors")
WRITTEN = (*MODEL, *SHARDS, *LOGS, "state", "adapter", "critic", "mistakes.jsonl")


class Training(NamedTuple):
    """What a loop trains: `start_or_resume` is told, and a save writes it."""

    module: nn.Module  # as it was before `prepare`
    optimizer: torch.optim.Optimizer  # prepared
    data: str  # fingerprint of the training data


class Point(NamedTuple):
    """The moment before an update, as `checkpoint` noted it; a save writes it beside the
    tensors."""

    loop: dict[str, Any]  # step, the loop's own values, newest metrics, sizes of the logs
    random: dict[str, torch.Tensor]  # state of this process's generators


class Run:
    """One stage's run.

    All but the last three members are made at the start and stay. `say`, `log`, `log_samples` and
    `progress` are those of its Log.
    """

    def __init__(self, cfg: TrainConfig, stage: str, kind: Kind) -> None:
        self.interruption = Interruption(stage)
        self.cfg, self.stage, self.kind = cfg, stage, kind
        self.started = time.perf_counter()

        self.precision = chosen_precision(cfg.mixed_precision)
        self.dtype = DTYPES[self.precision]  # of matrix products in training
        self.accelerator = accelerator(
            self.precision,
            cfg.per_device_train_batch_size,
            cfg.max_grad_norm,
            log_with=cfg.report_to or None,
            project_dir=cfg.output_dir,
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index

        self.folder = Path(cfg.output_dir)
        tracker = self.accelerator.log if cfg.report_to else None
        self.logs = Log(stage, self.folder, self.main, tracker)
        self.say, self.log = self.logs.say, self.logs.log
        self.log_samples, self.progress = self.logs.log_samples, self.logs.progress

        self.found = newest_state(self.state)
        if not cfg.resume:
            check_empty(self.folder)
        self.global_batch, self.accumulation = batch_shape(cfg, self.processes, self.found)
        self.identity = identity(cfg, self.global_batch)
        if self.found:
            noted = with_new_keys(self.found.loop["run"], cfg, self.identity)
            check_same_run(self.found.path, noted, self.identity)
        claim(cfg, stage, WRITTEN, resumes=self.found is not None, signed=False)
        set_seed(cfg.seed)
        self.start_trackers()

        self.skipped = 0  # updates left out, as not finite
        self.training: Training | None = None  # from `start_or_resume` on
        self.point: Point | None = None  # from the first `checkpoint` on
        self.saved_step = 0  # of the newest save; 0: none

    @property
    def state(self) -> Path:
        """Folder of what a resume needs."""
        return self.folder / "state"

    def start_trackers(self) -> None:
        """Tell the trackers of report_to, if any, the config."""
        if self.cfg.report_to:
            flat = {
                key: value if isinstance(value, int | float | str | bool) else str(value)
                for key, value in to_dict(self.cfg).items()
            }
            self.accelerator.init_trackers(f"state-of-gpt-{self.stage}", flat)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """(model, optimizer) placed, in train mode, compiled if the config says so; `model` itself
        stays the raw one. Weights that a resume found are put in before."""
        for module in model.modules():
            if isinstance(module, Trunk):
                module.checkpointing = self.cfg.gradient_checkpointing
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["names"] = [names[id(p)] for p in group["params"]]
        if self.found:
            load_weights(model, self.found.path)
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

    def start_or_resume(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, data: str, **kept: Any
    ) -> tuple[int, dict[str, Any]]:
        """-> (updates already done, values of the loop): those last given to `checkpoint`, or 0 and
        `kept`.

        Call it when everything is prepared, right before the loop: weights, optimizers, random
        generators and log files are then as they were. `data`: fingerprint of the training data.
        Raises InputError when the state is of another run.
        """
        self.training = Training(module, optimizer, data)
        if self.main:
            sign(self.folder, self.stage)
        if self.found is None:
            self.logs.empty()
            return 0, kept
        path, loop = self.found
        check_same_run(path, {"data": loop["data"]}, {"data": data})
        load_moments(self.accelerator, module, optimizer, path)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(loop["scaler"])
        self.logs.last, self.skipped = loop["last"], loop["skipped"]
        self.started -= loop["seconds"]
        self.logs.cut_back(loop["logs"])
        self.say(f"{self.stage}: going on from {path}")
        self.saved_step = loop["step"]
        return loop["step"], loop["kept"]

    def checkpoint(self, step: int, kept: Mapping[str, Any] | None = None) -> None:
        """Before update number `step` (from 0): save if it is time, with the loop's own values
        (JSON) for the resume.

        Raises Interrupted after the save when a signal asked for the end.
        """
        loop = {
            "step": step,
            "kept": dict(kept or {}),
            "last": dict(self.logs.last),
            "logs": self.logs.sizes(),
            "skipped": self.skipped,
        }
        self.point = Point(loop, generators(self.device))
        self.interruption.has_begun = True
        if self.cfg.save_steps and step % self.cfg.save_steps == 0:
            self.save()
        self.poll()

    def save(self) -> None:
        """Save what the last `checkpoint` noted, unless it is saved already; the weights must not
        have changed since. All processes must call it alike."""
        assert self.training and self.point, "save comes after start_or_resume and checkpoint"
        (module, optimizer, data), (loop, random) = self.training, self.point
        if loop["step"] <= self.saved_step:
            return
        scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()  # fp16's
        whole_loop = {
            **loop,
            "run": self.identity,
            "data": data,
            "per_process": rows_per_process(self.cfg),
            "scaler": scaler,
            "seconds": self.seconds(),
        }
        keep = self.cfg.save_total_limit
        save_state(self.accelerator, module, optimizer, self.state, whole_loop, random, keep)
        self.saved_step = loop["step"]

    def poll(self, *_: Any) -> None:
        """In long work between a `checkpoint` and the update after it (evaluation, rollout): ends
        here when asked to.

        All processes must call it alike. Raises Interrupted after a save.
        """
        asked = torch.tensor(float(self.interruption.is_asked), device=self.device)
        if self.accelerator.reduce(asked, "sum"):  # all processes save, or none
            self.save()
            self.logs.close()
            assert self.point is not None  # as it is saved
            where = f"saved in {self.state}" if self.saved_step else "not begun"
            raise Interrupted(
                f"{self.stage} after step {self.point.loop['step']}, {where}; "
                "the same command goes on from there"
            )

    def update(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: Sequence[Any],
        loss: Callable[[Any], torch.Tensor],
        counts: torch.Tensor,
    ) -> Update | None:
        """common.train.update.update; None when it was refused as not finite and
        max_skipped_batches allows for one more."""
        clip = self.cfg.max_grad_norm
        try:
            return update(self.accelerator, model, optimizer, micro_batches, loss, counts, clip)
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

    def publish(
        self,
        step: int,
        gate: Gate,
        tokenizer: Tokenizer,
        model: GPT | RewardModel,
        critic: RewardModel | None = None,
        **facts: Any,
    ) -> None:
        """The end of a stage: print the gate, publish the directory, drop what a resume would need.

        model, critic: as they were before `prepare`; with LoRA they are published merged, the
        model's adapter beside it. `facts` are the stage's own, for stage.json. All processes must
        call it.
        """
        self.logs.close()
        self.say(gate.line(self.stage))
        if self.cfg.report_to:
            self.accelerator.end_training()
        report = self.report(step, gate, facts)
        if critic is not None:  # first: the stage counts as finished from its own manifest on
            with whole(self.accelerator, critic):
                if self.main:
                    its_report = {**report, "kind": "reward"}
                    state = merged_state(critic)
                    publish(self.folder / "critic", critic, tokenizer, its_report, state)
        with whole(self.accelerator, model):
            if self.main:
                withdraw_adapter(self.folder)
                if self.cfg.lora_r:
                    r, alpha = self.cfg.lora_r, self.cfg.lora_alpha
                    folder = self.folder / "adapter"
                    save_adapter(model, folder, self.cfg.parent, r, alpha, tokenizer)
                publish(self.folder, model, tokenizer, report, merged_state(model))
        self.forget()

    def report(self, step: int, gate: Gate, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The content of stage.json after `step` updates; null for a metric that is not finite, as
        JSON has none such."""
        return stage_report(
            self.stage,
            self.cfg,
            gate,
            self.seconds(),
            kind=self.kind,
            step=step,
            **lineage(self.cfg.parent),
            metrics={k: v if math.isfinite(v) else None for k, v in self.logs.last.items()},
            processes=self.processes,
            precision=self.precision,
            skipped_batches=self.skipped,
            **facts,
        )

    def seconds(self) -> float:
        """Wall time of the run up to now, with that before an interruption."""
        return round(time.perf_counter() - self.started, 2)

    def forget(self) -> None:
        """The stage is published: drop what a resume would have needed."""
        release_signals()
        self.accelerator.wait_for_everyone()  # nobody leaves while the main process publishes
        if self.main:
            drop_all(self.state)


def withdraw_adapter(folder: Path) -> None:
    """Delete the adapter that an earlier run with LoRA has published, its manifest first."""
    for file in sorted((folder / "adapter").glob("adapter_*")):
        (folder / MANIFEST).unlink(missing_ok=True)
        file.unlink()
    with contextlib.suppress(OSError):
        (folder / "adapter").rmdir()  # where nothing of another is in it
