"""Pretraining: next-token prediction on packed documents.

    accelerate launch -m stages.pretrain.train --config configs/demo/pretrain.yaml

Rows of max_length tokens are cut from the stream of documents (an end-of-text between them). `train_data` is a folder
made by stages.pretrain.prepare, which also holds the tokenizer.
"""

import math
import time
from typing import Annotated, Literal

import torch
from pydantic import Field

from common.chat import prompt_ids
from common.checkpoint import load_model, load_tokenizer, publish
from common.config import InputError, cli, stage_config
from common.data import Shards
from common.generate import check_prompts, sample
from common.model import GPT, GPTConfig
from common.optim import adamw, muon, parameter_groups, schedule, set_learning_rate, split_for_muon, steps_for, update
from common.run import Run
from common.scoring import same_ids
from common.train_config import TrainConfig


@stage_config
class Config(TrainConfig):
    """Pretrain a GPT on token shards."""

    train_data: str
    """Folder of shards and tokenizer, made by stages.pretrain.prepare."""
    family: Literal["llama", "gpt2"] = "llama"
    """llama: rotary positions, RMSNorm, SwiGLU; gpt2: learned positions, LayerNorm, GELU."""
    n_layer: Annotated[int, Field(ge=0)] = 4
    """Blocks (ignored, like all keys of the architecture, when a parent is given)."""
    n_head: Annotated[int, Field(gt=0)] = 4
    """Attention heads."""
    n_kv_head: Annotated[int, Field(gt=0)] | None = None
    """Key/value heads shared by groups of heads (llama); null = n_head."""
    n_embd: Annotated[int, Field(gt=0)] = 128
    """Width."""
    n_inner: Annotated[int, Field(gt=0)] | None = None
    """Width inside the MLP; null = 4 n_embd (gpt2), 8/3 n_embd (llama)."""
    context_length: Annotated[int, Field(gt=0)] | None = None
    """Positions the model can ever see; null = max_length."""
    tie_embeddings: bool = True
    """Input and output embedding are one matrix."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout while pretraining."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices inside the blocks, AdamW on the rest."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of Muon."""
    document_mask: bool = True
    """Attention stays inside a document; false: it also sees the unrelated ones packed before it in the row."""
    eval_rows: Annotated[int, Field(gt=0)] = 128
    """Rows of the held-out split in one evaluation."""
    sample_prompts: list[str] = []
    """Prompts that the model goes on from after each evaluation."""
    sample_tokens: Annotated[int, Field(gt=0)] = 60
    """Tokens in such a sample."""


def build_model(cfg: Config, vocab_size: int) -> GPT:
    if cfg.parent:
        if not same_ids(load_tokenizer(cfg.parent), load_tokenizer(cfg.train_data)):
            raise InputError(
                f"{cfg.train_data}: its ids are not those of {cfg.parent}; prepare it with `tokenizer: {cfg.parent}`"
            )
        model = load_model(cfg.parent, "lm", dropout=cfg.dropout)
        model.resize_vocabulary(vocab_size)
        return model
    return GPT(
        GPTConfig(
            family=cfg.family, vocab_size=vocab_size, max_length=cfg.context_length or cfg.max_length, n_layer=cfg.n_layer,
            n_head=cfg.n_head, n_kv_head=cfg.n_kv_head, n_embd=cfg.n_embd, n_inner=cfg.n_inner,
            tie_embeddings=cfg.tie_embeddings, dropout=cfg.dropout,
        )
    )  # fmt: skip


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


@torch.no_grad()
def evaluate(run: Run, model: torch.nn.Module, shards: Shards, rows: int, batch_size: int, eot_id: int | None) -> float:
    """Mean next-token loss in nats over the first `rows` rows of the held-out split (the same ones every time)."""
    model.eval()
    rows = min(rows, shards.rows)
    total = torch.zeros(2, device=run.device)
    for start in range(run.rank * batch_size, rows, run.processes * batch_size):
        batch = shards.batch(0, start, min(batch_size, rows - start)).to(run.device)
        total[0] += next_token_loss(model, batch, eot_id)
        total[1] += batch[:, 1:].numel()
    model.train()
    loss, count = run.accelerator.reduce(total, "sum").tolist()
    return loss / count


def next_token_loss(model: torch.nn.Module, batch: torch.Tensor, eot_id: int | None) -> torch.Tensor:
    """Summed cross-entropy of batch (B, T + 1): every token predicted from those before it.

    With eot_id only from those of its own document, which an end-of-text opens (as it opens a base model's prompt).
    """
    ids = batch[:, :-1]
    documents = None if eot_id is None else (ids == eot_id).cumsum(1)
    logits = model(ids, documents=documents)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")


def main(cfg: Config) -> None:
    if cfg.lora_r:
        raise InputError(f"lora_r {cfg.lora_r}: pretraining trains all weights; LoRA is for sft, reward and rl")
    run = Run(cfg, "pretrain", "lm")
    tokenizer = load_tokenizer(cfg.train_data)
    shards = Shards(cfg.train_data, "train", cfg.max_length)
    heldout = Shards(cfg.train_data, "eval", cfg.max_length)

    raw = build_model(cfg, tokenizer.vocab_size)
    parameters = sum(p.numel() for p in raw.parameters())
    if cfg.optimizer == "muon":
        _, rest = split_for_muon(raw)
        rest = torch.nn.ParameterList(rest)
        optimizers = [muon(raw, cfg.muon_learning_rate, cfg.weight_decay)]
        optimizers += [adamw(parameter_groups(rest, cfg.learning_rate, cfg.weight_decay), cfg.adam_beta2)]
    else:
        optimizers = [adamw(parameter_groups(raw, cfg.learning_rate, cfg.weight_decay), cfg.adam_beta2)]
    model, *optimizers = run.accelerator.prepare(raw, *optimizers)
    model.train()

    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in cfg.sample_prompts]
    check_prompts(raw, prompts)  # now, not after hours of training
    micro, accumulation = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps
    batch_rows = micro * accumulation * run.processes
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, shards.rows, batch_rows)
    tokens_per_step = batch_rows * cfg.max_length
    peak = peak_flops(run.device, run.accelerator.mixed_precision) * run.processes
    flops_per_token = raw.config.flops_per_token(cfg.max_length)
    epochs = steps * tokens_per_step / shards.tokens
    run.say(
        f"{parameters:,} parameters, {steps} steps of {tokens_per_step:,} tokens ({epochs:.2f} epochs of {shards.tokens:,})"
    )

    eot_id = tokenizer.eot_id if cfg.document_mask else None
    first_step, kept = run.resume()
    if not kept:
        kept = {"initial": evaluate(run, model, heldout, cfg.eval_rows, micro, eot_id)}
        run.log(0, {"eval_loss": kept["initial"], "ln_vocab": math.log(tokenizer.vocab_size)})
    bar, clock, clock_step = run.progress(steps, first_step), time.perf_counter(), first_step
    for step in range(first_step, steps):
        run.checkpoint(step, kept)
        first = step * batch_rows + run.rank * micro * accumulation
        micro_batches = [shards.batch(cfg.seed, first + i * micro, micro).to(run.device) for i in range(accumulation)]
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate(optimizers, factor)
        counts = torch.tensor([sum(batch[:, 1:].numel() for batch in micro_batches)])
        done = update(
            run.accelerator,
            model,
            optimizers,
            micro_batches,
            lambda batch: next_token_loss(model, batch, eot_id)[None],
            counts,
            cfg.max_grad_norm,
        )
        bar.update()
        if (step + 1) % cfg.logging_steps == 0 or step + 1 == steps:
            speed = (step + 1 - clock_step) * tokens_per_step / (time.perf_counter() - clock)
            metrics = {"loss": done.losses[0], "grad_norm": done.grad_norm, "lr": factor * cfg.learning_rate}
            run.log(step + 1, metrics | {"tokens/s": round(speed), "mfu": speed * flops_per_token / peak})
            clock, clock_step = time.perf_counter(), step + 1
        if step + 1 == steps or (cfg.eval_steps and (step + 1) % cfg.eval_steps == 0):
            eval_loss = evaluate(run, model, heldout, cfg.eval_rows, micro, eot_id)
            run.log(step + 1, {"eval_loss": eval_loss})
            if prompts and run.main:
                answers = sample(raw, prompts, max_new_tokens=cfg.sample_tokens, seed=cfg.seed, stop_ids=[tokenizer.eot_id])
                texts = [tokenizer.decode(answer.ids) for answer in answers]
                run.log_samples(step + 1, [{"prompt": p, "sample": t} for p, t in zip(cfg.sample_prompts, texts, strict=True)])
            clock, clock_step = time.perf_counter(), step + 1

    text = (
        f"held-out loss {kept['initial']:.2f} -> {eval_loss:.3f} nats a token (guessing: {math.log(tokenizer.vocab_size):.2f})"
    )
    stage = run.finish(
        steps, (eval_loss < kept["initial"] - 0.5, text), parameters=parameters, tokens_seen=steps * tokens_per_step,
        data={"train": shards.meta["fingerprint"]},
    )  # fmt: skip
    if run.main:
        publish(run.folder, raw, tokenizer, stage)
    run.forget()


if __name__ == "__main__":
    cli(Config, main)
