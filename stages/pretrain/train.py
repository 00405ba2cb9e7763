"""Pretraining: next-token prediction on packed documents.

    accelerate launch -m stages.pretrain.train --config configs/demo/pretrain.yaml

Rows of max_length tokens are cut from the stream of documents (an end-of-text between them).
`train_data` is a folder made by stages.pretrain.prepare, which also holds the tokenizer.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import cli, fingerprint, stage_config
from common.config.training import TrainConfig
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model, publish
from common.model.costs import GPUS, forward_flops
from common.model.gpt import GPT
from common.model.presets import ArchitectureConfig, new_model
from common.model.sample import check_prompts, sample
from common.program.errors import InputError
from common.rows.batches import share
from common.rows.shards import Shards
from common.text.chat import prompt_ids, stop_ids
from common.text.tokenizer import Tokenizer, same_ids
from common.train.muon import muon
from common.train.optimizers import adamw, parameter_groups, schedule, set_learning_rate, steps_for
from common.train.placement import sampler, whole
from common.train.run import Run


@stage_config
class Config(ArchitectureConfig, TrainConfig):
    """Pretrain a GPT on token shards."""

    train_data: str
    """Folder of shards and tokenizer, made by stages.pretrain.prepare."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices inside the blocks, AdamW on the rest."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of Muon."""
    document_mask: bool = True
    """Attention stays inside a document; false: it also sees the unrelated ones packed before it in
    the row."""
    row_stride: Annotated[int, Field(gt=0)] | None = None
    """Tokens from the start of one row to the next, of which each row predicts so many, its last:
    those that no earlier row has. Null = max_length; 1 = every token from a full context."""
    eval_rows: Annotated[int, Field(gt=0)] = 128
    """Rows of the held-out split in one evaluation."""
    eval_only: bool = False
    """Evaluate and sample, train nothing and publish nothing."""
    sample_prompts: list[str] = []
    """Prompts that the model goes on from after each evaluation."""
    sample_tokens: Annotated[int, Field(gt=0)] = 60
    """Tokens in such a sample."""


def build_model(cfg: Config, tokenizer: Tokenizer) -> GPT:
    if cfg.parent:
        if not same_ids(load_tokenizer(cfg.parent), tokenizer):
            raise InputError(
                f"{cfg.train_data}: its ids are not those of {cfg.parent}; prepare it with `tokenizer: {cfg.parent}`"
            )
        check_context(cfg.parent, "lm", cfg.max_length, "max_length")
        model = load_model(cfg.parent, "lm", dropout=cfg.dropout)
        model.resize_vocabulary(tokenizer.vocab_size)
        return model
    return new_model(cfg, tokenizer.vocab_size, cfg.max_length)


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that MFU is a share of: the data sheet's figure for a known GPU (dense bf16), else a
    GEMM timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [gpu.flops for key, gpu in GPUS.items() if key.split("-")[0].upper() in name]
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


@torch.no_grad()
def evaluate(
    run: Run, model: torch.nn.Module, shards: Shards, rows: int, batch_size: int, eot_id: int | None
) -> float:
    """Mean next-token loss in nats over the first `rows` rows of the held-out split (the same ones
    every time)."""
    model.eval()
    total = torch.zeros(2, device=run.device)
    for chosen in share(
        range(min(rows, shards.rows)), run.rank, run.processes, batch_size, blank=lambda row: None
    ):
        run.poll()
        real = [row for row in chosen if row is not None]
        batch = torch.cat([shards.batch(0, row, 1) for row in real or [0]]).to(run.device)
        summed = next_token_loss(model, batch, eot_id, shards.stride)
        total += torch.stack([summed * bool(real), summed.new_tensor(len(real) * shards.stride)])
    model.train()
    loss, count = run.accelerator.reduce(total, "sum").tolist()
    return loss / count


def next_token_loss(
    model: torch.nn.Module, batch: torch.Tensor, eot_id: int | None, predicted: int = 0
) -> torch.Tensor:
    """Summed cross-entropy of the last `predicted` tokens (0 = all) of each row of batch (B, T +
    1), each from those before it.

    With eot_id only from those of its own document, which an end-of-text opens (as it opens a base
    model's prompt).
    """
    ids = batch[:, :-1]
    documents = None if eot_id is None else (ids == eot_id).cumsum(1)
    keep = (
        torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= ids.shape[1] - predicted
        if predicted
        else None
    )
    targets = batch[:, 1:] if keep is None else batch[:, 1:][keep]
    return -model(ids, keep, documents, targets).sum()


def continuations(
    cfg: Config, run: Run, raw: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]
) -> list[dict[str, str]]:
    """What the model goes on with after `sample_prompts`; every process must call it."""
    answers = sample(
        sampler(run.accelerator, raw),
        prompts,
        max_new_tokens=cfg.sample_tokens,
        seed=cfg.seed,
        stop_ids=stop_ids(tokenizer),
    )
    texts = [tokenizer.decode(answer.ids) for answer in answers]
    return [
        {"prompt": prompt, "sample": text}
        for prompt, text in zip(cfg.sample_prompts, texts, strict=True)
    ]


def main(cfg: Config) -> None:
    if cfg.lora_r:
        raise InputError(
            f"lora_r {cfg.lora_r}: pretraining trains all weights; LoRA is for sft, reward and rl"
        )
    run = Run(cfg, "pretrain", "lm")
    tokenizer = load_tokenizer(cfg.train_data)
    shards = Shards(cfg.train_data, "train", cfg.max_length, cfg.row_stride)
    heldout = Shards(cfg.train_data, "eval", cfg.max_length, cfg.row_stride)

    raw = build_model(cfg, tokenizer)
    parameters = sum(p.numel() for p in raw.parameters())
    if cfg.optimizer == "muon":
        dtype = torch.float32 if run.precision == "no" else torch.bfloat16
        optimizer = muon(
            raw, cfg.muon_learning_rate, cfg.learning_rate, cfg.weight_decay, cfg.adam_beta2, dtype
        )
    else:
        optimizer = adamw(
            parameter_groups(raw.parameters(), cfg.learning_rate, cfg.weight_decay), cfg.adam_beta2
        )
    model, optimizer = run.prepare(raw, optimizer)

    prompts = [
        prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in cfg.sample_prompts
    ]
    check_prompts(raw, prompts)  # now, not after hours of training
    micro, accumulation, batch_rows = (
        cfg.per_device_train_batch_size,
        run.accumulation,
        run.global_batch,
    )
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, shards.rows, batch_rows)
    tokens_per_step = batch_rows * cfg.max_length
    peak = peak_flops(run.device, run.accelerator.mixed_precision) * run.processes
    flops_per_token = 3 * forward_flops(
        raw.config, 1, cfg.max_length, 1
    )  # backward is twice forward
    epochs, seen = steps * batch_rows / shards.rows, shards.epochs(steps * batch_rows)
    of_each = "".join(f"; {times:.2f} of {name}" for name, times in seen.items() if len(seen) > 1)
    run.say(
        f"{parameters:,} parameters, {steps} steps of {tokens_per_step:,} tokens "
        f"({epochs:.2f} epochs of {shards.tokens:,}{of_each})"
    )

    eot_id = tokenizer.eot_id if cfg.document_mask and tokenizer.has_control else None
    if cfg.eval_only:
        found = evaluate(run, model, heldout, cfg.eval_rows, micro, eot_id)
        run.say(
            f"held-out loss {found:.4f} nats a token (guessing: {math.log(tokenizer.vocab_size):.2f})"
        )
        for row in continuations(cfg, run, raw, tokenizer, prompts):
            run.say(f"{row['prompt']}{row['sample']}")
        return
    first_step, kept = run.start_or_resume(raw, optimizer, fingerprint(shards.meta))
    bar, clock, clock_step = run.progress(steps, first_step), time.perf_counter(), first_step
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step in (0, steps) or (cfg.eval_steps and step % cfg.eval_steps == 0):
            eval_loss = evaluate(run, model, heldout, cfg.eval_rows, micro, eot_id)
            run.log(
                step,
                {"eval_loss": eval_loss}
                | ({} if step else {"ln_vocab": math.log(tokenizer.vocab_size)}),
            )
            if step:
                run.log_samples(step, continuations(cfg, run, raw, tokenizer, prompts))
            else:
                kept["initial"] = eval_loss
            clock, clock_step = time.perf_counter(), step
        if step == steps:
            break
        first = step * batch_rows + run.rank * micro * accumulation
        micro_batches = [
            shards.batch(cfg.seed, first + i * micro, micro).to(run.device)
            for i in range(accumulation)
        ]
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate(optimizer, factor)
        counts = torch.tensor([sum(len(batch) * shards.stride for batch in micro_batches)])
        done = run.update(
            step,
            model,
            optimizer,
            micro_batches,
            lambda batch: next_token_loss(model, batch, eot_id, shards.stride)[None],
            counts,
        )
        bar.update()
        if done and ((step + 1) % cfg.logging_steps == 0 or step + 1 == steps):
            speed = (step + 1 - clock_step) * tokens_per_step / (time.perf_counter() - clock)
            metrics = {
                "loss": done.losses[0],
                "grad_norm": done.grad_norm,
                "lr": factor * cfg.learning_rate,
            }
            run.log(
                step + 1,
                metrics | {"tokens/s": round(speed), "mfu": speed * flops_per_token / peak},
            )
            clock, clock_step = time.perf_counter(), step + 1

    text = f"held-out loss {kept['initial']:.2f} -> {eval_loss:.3f} nats a token (guessing: {math.log(tokenizer.vocab_size):.2f})"
    enough = min(
        0.5, 0.1 * kept["initial"]
    )  # nats; a tenth where few symbols, or a parent, leave less than that to learn
    stage = run.finish(
        steps,
        (eval_loss < kept["initial"] - enough, text),
        parameters=parameters,
        tokens_seen=steps * tokens_per_step,
        data={"train": shards.meta["fingerprint"], "epochs": seen},
    )
    with whole(run.accelerator, raw):
        if run.main:
            publish(run.folder, raw, tokenizer, stage)
    run.forget()


if __name__ == "__main__":
    cli(Config, main)
