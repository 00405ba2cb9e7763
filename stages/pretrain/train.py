"""Pretraining: next-token prediction on packed documents.

    accelerate launch -m stages.pretrain.train --config configs/demo/pretrain.yaml

Rows of max_length tokens are cut from the stream of documents (an end-of-text between them).
`train_data` is a folder made by stages.pretrain.prepare, which also holds the tokenizer.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import InputPath, cli, fingerprint, stage_config
from common.config.training import TrainConfig
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model
from common.handoff.report import Gate
from common.model.costs import forward_flops
from common.model.gpt import GPT
from common.model.presets import ArchitectureConfig, new_model
from common.model.sample import check_prompts, sample
from common.program.errors import InputError
from common.rows.batches import share
from common.rows.shards import Shards
from common.text.chat import prompt_ids, stop_ids
from common.text.tokenizer import Tokenizer, same_ids
from common.train.log import Speed
from common.train.muon import muon
from common.train.optimizers import adamw_for, follow_schedule, is_due, steps_for
from common.train.placement import sampler
from common.train.run import Run
from stages.pretrain.mfu import Hardware


@stage_config
class Config(ArchitectureConfig, TrainConfig):
    """Pretrain a GPT on token shards."""

    train_data: InputPath
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
    """The model that training starts from: the parent, or a new one.

    Raises InputError when the parent has another tokenizer or too short a context.
    """
    if not cfg.parent:
        return new_model(cfg, tokenizer.vocab_size, cfg.max_length)
    if not same_ids(load_tokenizer(cfg.parent), tokenizer):
        raise InputError(
            f"{cfg.train_data}: its ids are not those of {cfg.parent}; "
            f"prepare it with `tokenizer: {cfg.parent}`"
        )
    check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    model = load_model(cfg.parent, "lm", dropout=cfg.dropout)
    model.resize_vocabulary(tokenizer.vocab_size)
    return model


def build_optimizer(cfg: Config, model: GPT, precision: str) -> torch.optim.Optimizer:
    """AdamW or Muon, as the config says; Muon's iterations run in bf16 unless training is fp32."""
    if cfg.optimizer == "adamw":
        return adamw_for(cfg, model)
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    rates = cfg.muon_learning_rate, cfg.learning_rate
    return muon(model, *rates, cfg.weight_decay, cfg.adam_beta2, dtype)


@torch.no_grad()
def evaluate(
    run: Run, model: torch.nn.Module, shards: Shards, rows: int, batch_size: int, eot_id: int | None
) -> float:
    """Mean next-token loss in nats over the first `rows` rows of the held-out split (the same ones
    every time)."""
    model.eval()
    total = torch.zeros(2, device=run.device)
    chosen = range(min(rows, shards.rows))
    for part in share(chosen, run.rank, run.processes, batch_size, blank=lambda row: None):
        run.poll()
        real = [row for row in part if row is not None]
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
    ids, targets = batch[:, :-1], batch[:, 1:]
    documents = None if eot_id is None else (ids == eot_id).cumsum(1)
    keep = None
    if predicted:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        keep = places >= ids.shape[1] - predicted
        targets = targets[keep]
    return -model(ids, keep, documents, targets).sum()


def rows_of(cfg: Config, run: Run, shards: Shards, step: int) -> list[torch.Tensor]:
    """This process's micro-batches (B, T + 1) of update number `step`: a pure function of seed,
    step and rank."""
    micro = cfg.per_device_train_batch_size
    first = step * run.global_batch + run.rank * micro * run.accumulation
    starts = range(first, first + micro * run.accumulation, micro)
    return [shards.batch(cfg.seed, start, micro).to(run.device) for start in starts]


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


def refuse_lora(cfg: Config) -> None:
    """Raise InputError for a key that all stages share, but that makes no sense here."""
    if cfg.lora_r:
        raise InputError(
            f"lora_r {cfg.lora_r}: pretraining trains all weights; LoRA is for sft, reward and rl"
        )


def sample_prompts(cfg: Config, raw: GPT, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the prompts to go on from. Raises InputError for one that leaves no room: now, not
    after hours of training."""
    chats = [[{"role": "user", "content": text}] for text in cfg.sample_prompts]
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    check_prompts(raw, prompts)
    return prompts


def plan_of(run: Run, shards: Shards, steps: int) -> str:
    """In words, how long training is: updates, tokens of each, passes over the data."""
    rows, tokens = steps * run.global_batch, run.global_batch * run.cfg.max_length
    seen = shards.epochs(rows)
    of_each = "".join(f"; {times:.2f} of {name}" for name, times in seen.items() if len(seen) > 1)
    epochs = rows / shards.rows
    return f"{steps} steps of {tokens:,} tokens ({epochs:.2f} epochs of {shards.tokens:,}{of_each})"


def flops_per_token(raw: GPT, length: int) -> float:
    """Operations that training needs for a token; the backward pass takes twice the forward's."""
    return 3 * forward_flops(raw.config, 1, length, 1)


def gate_of(initial: float, final: float, guessing: float) -> Gate:
    """Whether the held-out loss fell by enough: half a nat, or a tenth where few symbols, or a
    parent, leave less than that to learn."""
    enough = min(0.5, 0.1 * initial)
    text = f"held-out loss {initial:.2f} -> {final:.3f} nats a token (guessing: {guessing:.2f})"
    return Gate(final < initial - enough, text)


def facts_of(cfg: Config, parameters: int, shards: Shards, rows: int) -> dict[str, Any]:
    """What stage.json says of training on so many rows."""
    return {
        "parameters": parameters,
        "tokens_seen": rows * cfg.max_length,
        "data": {"train": shards.meta["fingerprint"], "epochs": shards.epochs(rows)},
    }


def main(cfg: Config) -> None:
    """Train, evaluate, sample and publish; with eval_only only evaluate and sample."""
    refuse_lora(cfg)
    run = Run(cfg, "pretrain", "lm")
    tokenizer = load_tokenizer(cfg.train_data)
    shards = Shards(cfg.train_data, "train", cfg.max_length, cfg.row_stride)
    heldout = Shards(cfg.train_data, "eval", cfg.max_length, cfg.row_stride)
    raw = build_model(cfg, tokenizer)
    parameters = sum(p.numel() for p in raw.parameters())
    prompts = sample_prompts(cfg, raw, tokenizer)
    model, optimizer = run.prepare(raw, build_optimizer(cfg, raw, run.precision))
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, shards.rows, run.global_batch)
    run.say(f"{parameters:,} parameters, {plan_of(run, shards, steps)}")

    guessing = math.log(tokenizer.vocab_size)  # loss of one who knows nothing, in nats a token
    eot_id = tokenizer.eot_id if cfg.document_mask and tokenizer.has_control else None
    hardware, flops = Hardware(run.device, run.dtype), flops_per_token(raw, cfg.max_length)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        """Summed over a micro-batch (1)."""
        return next_token_loss(model, batch, eot_id, shards.stride)[None]

    def heldout_loss() -> float:
        """Mean over held-out tokens, in nats."""
        return evaluate(run, model, heldout, cfg.eval_rows, cfg.per_device_train_batch_size, eot_id)

    if cfg.eval_only:
        run.say(f"held-out loss {heldout_loss():.4f} nats a token (guessing: {guessing:.2f})")
        for row in continuations(cfg, run, raw, tokenizer, prompts):
            run.say(f"{row['prompt']}{row['sample']}")
        return
    first_step, kept = run.start_or_resume(raw, optimizer, fingerprint(shards.meta))
    bar, speed = run.progress(steps, first_step), Speed()
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step == 0 or is_due(step, cfg.eval_steps, steps):
            eval_loss = heldout_loss()
            kept.setdefault("initial", eval_loss)
            run.log(step, {"eval_loss": eval_loss} | ({} if step else {"ln_vocab": guessing}))
            if step:
                run.log_samples(step, continuations(cfg, run, raw, tokenizer, prompts))
            hardware.measure()
            speed.restart()
        if step == steps:
            break
        micro_batches = rows_of(cfg, run, shards, step)
        counts = torch.tensor([sum(len(batch) * shards.stride for batch in micro_batches)])
        rate = follow_schedule(cfg, optimizer, step, steps)
        done = run.update(step, model, optimizer, micro_batches, loss, counts)
        speed.add(run.global_batch * cfg.max_length)
        bar.update()
        if done and is_due(step + 1, cfg.logging_steps, steps):
            tokens = speed.lap()
            metrics = {"loss": done.losses[0], "grad_norm": done.grad_norm, "lr": rate}
            mfu = hardware.share(tokens * flops / run.processes)
            run.log(step + 1, metrics | {"tokens/s": round(tokens), "mfu": mfu})

    gate = gate_of(kept["initial"], eval_loss, guessing)
    facts = facts_of(cfg, parameters, shards, steps * run.global_batch)
    run.publish(steps, gate, tokenizer, raw, **facts)


if __name__ == "__main__":
    cli(Config, main)
