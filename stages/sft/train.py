"""Supervised finetuning: imitate demonstrations, with loss on the assistant's tokens only.

    accelerate launch -m stages.sft.train --config configs/demo/sft.yaml

Rows: `prompt` and `completion`, `messages`, or Alpaca's `instruction`, `input`, `output`. The loss
is on each answer's text and its end token (InstructGPT, appendix C.1); a row too long for
max_length is cut, and counted.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import cli, fingerprint, stage_config
from common.config.training import RowsConfig
from common.handoff.adapter import save_adapter
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model, publish
from common.model.gpt import GPT
from common.model.lora import add_lora, merged_state
from common.model.presets import ArchitectureConfig, new_model
from common.model.sample import sample
from common.program.errors import InputError
from common.program.files import write_jsonl
from common.rows.batches import Order, pad, share
from common.rows.sources import Row
from common.text.chat import (
    Rendered,
    colour_preview,
    prompt_ids,
    render,
    rows_to_messages,
    rows_to_prompt,
)
from common.text.tokenizer import Tokenizer
from common.train.optimizers import adamw, parameter_groups, schedule, set_learning_rate, steps_for
from common.train.placement import sampler, whole
from common.train.run import Run


@stage_config
class Config(ArchitectureConfig, RowsConfig):
    """Finetune a base model on demonstrations."""

    parent: str | None = None
    """Base model: a stage directory, a transformers directory, or a Hub id; null = a new model,
    learned from the rows alone."""
    tokenizer: str | None = None
    """Directory to take the tokenizer of a new model from."""
    eval_exact_match: bool = False
    """Also answer the held-out prompts greedily; counts answers equal to the row's own, the others
    go to mistakes.jsonl."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts answered after each evaluation."""
    sample_tokens: Annotated[int, Field(gt=0)] = 96
    """Longest such answer."""


class Example(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 = supervised


def parse(tokenizer: Tokenizer, row: dict[str, Any]) -> Rendered:
    return render(tokenizer, rows_to_messages(row))


def cut(rows: Sequence[Row], max_length: int) -> tuple[list[Example], dict[str, int]]:
    """Parsed rows cut to max_length, and counts: rows, truncated, dropped (nothing to learn is
    left), tokens.

    Raises InputError when every row was dropped.
    """
    examples, truncated, dropped = [], 0, 0
    for row in rows:
        ids, mask = row.parsed
        truncated += len(ids) > max_length
        example = Example(ids[:max_length], mask[:max_length])
        if any(example.mask[1:]):
            examples.append(example)
        else:
            dropped += 1
    if not examples:
        raise InputError(
            f"{rows[0].origin}: this and all {len(rows)} rows have prompts of {max_length} tokens or more: raise max_length"
        )
    supervised = sum(sum(example.mask) for example in examples)
    return examples, {
        "rows": len(examples),
        "truncated": truncated,
        "dropped": dropped,
        "supervised_tokens": supervised,
    }


def loss(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, device: torch.device
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the supervised tokens, and how many they are."""
    ids = pad([example.ids for example in examples], pad_id).to(device)
    mask = pad([example.mask for example in examples], 0).to(device).bool()
    keep = mask[:, 1:]  # the head only runs where something is learned
    return -model(ids[:, :-1], keep, targets=ids[:, 1:][keep]).sum(), int(keep.sum())


def blank(example: Example) -> Example:
    return example._replace(mask=[0] * len(example.mask))


@torch.no_grad()
def evaluate(
    run: Run, model: torch.nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int
) -> float:
    """Mean loss in nats a supervised token over `examples`."""
    model.eval()
    total = torch.zeros(2, device=run.device)
    for rows in share(examples, run.rank, run.processes, batch_size, blank):
        run.poll()
        summed, count = loss(model, rows, pad_id, run.device)
        total += torch.stack([summed, torch.tensor(float(count), device=run.device)])
    model.train()
    summed, count = run.accelerator.reduce(total, "sum").tolist()
    return summed / count


def new_or_parent(cfg: Config) -> tuple[GPT, Tokenizer]:
    if cfg.parent:
        check_context(cfg.parent, "lm", cfg.max_length, "max_length")
        raw, tokenizer = (
            load_model(cfg.parent, "lm", dropout=cfg.dropout),
            load_tokenizer(cfg.parent).with_chat(),
        )
        raw.resize_vocabulary(tokenizer.vocab_size)
    elif cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer).with_chat()
        raw = new_model(cfg, tokenizer.vocab_size, cfg.max_length)
    else:
        raise InputError(
            "parent null: a new model needs a tokenizer: a folder made by stages.pretrain.prepare, or a parent"
        )
    return raw, tokenizer


def exact_match(
    raw: GPT, tokenizer: Tokenizer, rows: Sequence[Row], max_new_tokens: int
) -> tuple[float, list[dict]]:
    """Share of the rows whose greedy answer is their own to the letter, and the other rows with
    what was said instead."""
    prompts = [prompt_ids(tokenizer, rows_to_prompt(row.data)) for row in rows]
    answers = sample(
        raw, prompts, max_new_tokens=max_new_tokens, temperature=0, stop_ids=[tokenizer.eot_id]
    )
    mistakes = []
    for row, answer in zip(rows, answers, strict=True):
        *_, asked, wanted = (message["content"] for message in rows_to_messages(row.data))
        said = tokenizer.decode(answer.ids)
        if not answer.stopped or said != wanted:
            mistakes.append(
                {"prompt": asked, "wanted": wanted, "answer": said, "stopped": answer.stopped}
            )
    return 1 - len(mistakes) / len(rows), mistakes


def sample_answers(
    cfg: Config, raw: torch.nn.Module, tokenizer: Tokenizer, rows: Sequence[Row]
) -> list[dict]:
    """What the model answers to the prompts of `rows`, for the log."""
    prompts = []
    for row in rows:
        with suppress(
            InputError
        ):  # a conversation may train without having a prompt that could be answered
            prompts.append(rows_to_prompt(row.data))
    ids = [prompt_ids(tokenizer, prompt)[-cfg.max_length // 2 :] for prompt in prompts]
    answers = sample(
        raw, ids, max_new_tokens=cfg.sample_tokens, seed=cfg.seed, stop_ids=[tokenizer.eot_id]
    )
    return [
        {
            "prompt": prompt[-1]["content"],
            "sample": tokenizer.decode(answer.ids),
            "stopped": answer.stopped,
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def main(cfg: Config) -> None:
    run = Run(cfg, "sft", "lm")
    raw, tokenizer = new_or_parent(cfg)
    rows, heldout_rows, skipped = cfg.read(rows_to_prompt, partial(parse, tokenizer))
    examples, counts = cut(rows, cfg.max_length)
    heldout, heldout_counts = cut(heldout_rows, cfg.max_length)
    run.say("first example; the model learns the green part:")
    if run.main:
        from rich.console import Console

        Console(soft_wrap=True).print(colour_preview(tokenizer, *examples[0]))
    run.say(f"training rows: {counts}; held out: {heldout_counts}")

    if cfg.lora_r:
        add_lora(raw, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    optimizer = adamw(
        parameter_groups(raw.parameters(), cfg.learning_rate, cfg.weight_decay), cfg.adam_beta2
    )
    model, optimizer = run.prepare(raw, optimizer)
    micro = cfg.per_device_train_batch_size
    batch_rows = run.global_batch
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, len(examples), batch_rows)
    order = Order([len(example.ids) for example in examples], batch_rows, cfg.seed)

    first_step, kept = run.start_or_resume(raw, optimizer, fingerprint(examples), tokens_seen=0)
    bar, clock, tokens = run.progress(steps, first_step), time.perf_counter(), 0
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step in (0, steps) or (cfg.eval_steps and step % cfg.eval_steps == 0):
            eval_loss = evaluate(run, model, heldout, micro, tokenizer.pad_id)
            run.log(step, {"eval_loss": eval_loss})
            if not step:
                kept["initial"] = eval_loss
            else:
                speaker = sampler(run.accelerator, raw)
                run.log_samples(
                    step, sample_answers(cfg, speaker, tokenizer, heldout_rows[: cfg.samples])
                )
                if cfg.eval_exact_match:
                    match, mistakes = exact_match(
                        speaker, tokenizer, heldout_rows, cfg.sample_tokens
                    )
                    run.log(step, {"exact_match": match})
                    for row in mistakes[:8]:
                        run.say(f"  {row['prompt']!r}: {row['answer']!r}, not {row['wanted']!r}")
            clock, tokens = time.perf_counter(), 0
        if step == steps:
            break
        chosen = [examples[row] for row in order.rows(step)]
        micro_batches = list(share(chosen, run.rank, run.processes, micro, blank))
        counted = torch.tensor(
            [sum(sum(example.mask[1:]) for batch in micro_batches for example in batch)]
        )
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate(optimizer, factor)
        done = run.update(
            step,
            model,
            optimizer,
            micro_batches,
            lambda batch: loss(model, batch, tokenizer.pad_id, run.device)[0][None],
            counted,
        )
        new = sum(len(example.ids) for example in chosen)
        tokens, kept["tokens_seen"] = tokens + new, kept["tokens_seen"] + new
        bar.update()
        if done and ((step + 1) % cfg.logging_steps == 0 or step + 1 == steps):
            metrics = {
                "loss": done.losses[0],
                "grad_norm": done.grad_norm,
                "lr": factor * cfg.learning_rate,
            }
            run.log(step + 1, metrics | {"tokens/s": round(tokens / (time.perf_counter() - clock))})
            clock, tokens = time.perf_counter(), 0

    if cfg.eval_exact_match:
        run.say(
            f"{len(mistakes)} of {len(heldout_rows)} held-out answers are not exact: {run.folder / 'mistakes.jsonl'}"
        )
        if run.main:
            write_jsonl(run.folder / "mistakes.jsonl", mistakes)
    losses = f"{kept['initial']:.2f} -> {eval_loss:.3f}"
    text = f"held-out loss on answers {losses} nats a token; {counts['truncated']} rows truncated"
    text += (
        f"; {match:.2%} of {len(heldout_rows)} held-out answers exact"
        if cfg.eval_exact_match
        else ""
    )
    stage = run.finish(
        steps,
        (eval_loss < kept["initial"], text),
        tokens_seen=kept["tokens_seen"],
        data={"train": counts, "eval": heldout_counts, "skipped": skipped},
    )
    with whole(run.accelerator, raw):
        if run.main:
            if cfg.lora_r:
                save_adapter(raw, run.folder / "adapter", cfg.parent, cfg.lora_r, cfg.lora_alpha)
            publish(
                run.folder, raw, tokenizer, stage, weights=merged_state(raw) if cfg.lora_r else None
            )
    run.forget()


if __name__ == "__main__":
    cli(Config, main)
