"""Supervised finetuning: imitate demonstrations, with loss on the assistant's tokens only.

    accelerate launch -m stages.sft.train --config configs/demo/sft.yaml

Rows: `prompt` and `completion`, `messages`, or Alpaca's `instruction`, `input`, `output`. The loss
is on each answer's text and its end token (InstructGPT, appendix C.1); a row too long for
max_length is cut, and counted.
"""

import sys
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

from common.config.schema import InputPath, cli, fingerprint, stage_config
from common.config.training import RowsConfig
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model
from common.handoff.report import Gate
from common.model.gpt import GPT
from common.model.lora import add_lora
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
from common.train.log import Speed
from common.train.optimizers import adamw_for, follow_schedule, is_due, steps_for
from common.train.placement import sampler
from common.train.run import Run

# Where answers end the end token must be at least so likely, or the gate fails. A model that cannot
# tell the five control tokens apart reaches a fifth at most.
STOPS = 0.25


@stage_config
class Config(ArchitectureConfig, RowsConfig):
    """Finetune a base model on demonstrations."""

    parent: InputPath | None = None
    """Base model: a stage directory, a transformers directory, or a Hub id; null = a new model,
    learned from the rows alone."""
    tokenizer: InputPath | None = None
    """Directory to take the tokenizer of a new model from."""
    eval_exact_match: bool = False
    """Also answer the held-out prompts greedily; counts answers equal to the row's own, the others
    go to mistakes.jsonl."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Held-out prompts answered after each evaluation."""
    sample_tokens: Annotated[int, Field(gt=0)] = 96
    """Longest such answer."""


class Example(NamedTuple):
    """One rendered conversation."""

    ids: list[int]
    mask: list[int]  # 1 = supervised


class Match(NamedTuple):
    """How many held-out answers are those of their rows to the letter."""

    share: float
    mistakes: list[dict[str, Any]]  # the other rows: prompt, wanted, answer, stopped


def parse(tokenizer: Tokenizer, row: dict[str, Any]) -> Rendered:
    """Ids and mask of a row. Raises InputError for one that is no demonstration."""
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
            f"{rows[0].origin}: this and all {len(rows)} rows have prompts of {max_length} tokens "
            "or more: raise max_length"
        )
    return examples, {
        "rows": len(examples),
        "truncated": truncated,
        "dropped": dropped,
        "supervised_tokens": sum(sum(example.mask) for example in examples),
    }


class Heldout(NamedTuple):
    """How well held-out answers are predicted."""

    loss: float  # mean, in nats a supervised token
    stop: float  # mean probability of the end token where an answer ends; 0 where none does


def answer_logprobs(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(log-probs of the supervised tokens, those tokens), each (N)."""
    ids = pad([example.ids for example in examples], pad_id).to(device)
    mask = pad([example.mask for example in examples], 0).to(device).bool()
    keep = mask[:, 1:]  # the head only runs where something is learned
    targets = ids[:, 1:][keep]
    return model(ids[:, :-1], keep, targets=targets), targets


def loss(
    model: torch.nn.Module, examples: Sequence[Example], pad_id: int, device: torch.device
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of the supervised tokens, and how many they are."""
    logprobs, targets = answer_logprobs(model, examples, pad_id, device)
    return -logprobs.sum(), len(targets)


def supervised_tokens(examples: Sequence[Example]) -> int:
    """How many tokens `loss` sums over: a row's first is never predicted."""
    return sum(sum(example.mask[1:]) for example in examples)


def blank(example: Example) -> Example:
    """The example with nothing to learn from it, for a process that is short of rows."""
    return example._replace(mask=[0] * len(example.mask))


@torch.no_grad()
def evaluate(
    run: Run,
    model: torch.nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    tokenizer: Tokenizer,
) -> Heldout:
    """How well the answers of `examples` are predicted."""
    model.eval()
    total = torch.zeros(4, device=run.device)
    for rows in share(examples, run.rank, run.processes, batch_size, blank):
        run.poll()
        logprobs, targets = answer_logprobs(model, rows, tokenizer.pad_id, run.device)
        ends = targets == tokenizer.eot_id
        counts = total.new_tensor([len(targets), int(ends.sum())])
        total += torch.stack([-logprobs.sum(), logprobs[ends].exp().sum(), *counts])
    model.train()
    summed, stops, count, ends = run.accelerator.reduce(total, "sum").tolist()
    return Heldout(summed / count, stops / max(1, ends))


def new_or_parent(cfg: Config) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) to start from: the parent's, with adapters where the config asks for LoRA,
    or a new model with the tokenizer of the config. Raises InputError when there is neither."""
    source = cfg.parent or cfg.tokenizer
    if source is None:
        raise InputError(
            "parent null: a new model needs a tokenizer: a folder made by stages.pretrain.prepare, "
            "or a parent"
        )
    if cfg.parent is None:
        if cfg.lora_r:
            why = "a new model has no weights worth freezing"
            raise InputError(f"lora_r {cfg.lora_r}: {why}; leave it out, or name a parent")
        tokenizer = load_tokenizer(source).with_chat()
        return new_model(cfg, tokenizer.vocab_size, cfg.max_length), tokenizer
    check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    raw = load_model(cfg.parent, "lm", dropout=cfg.dropout)
    known = load_tokenizer(cfg.parent)
    tokenizer = known.with_chat()
    new = raw.resize_vocabulary(tokenizer.vocab_size, cfg.seed)
    if cfg.lora_r:
        # Frozen, what no text has taught would stay as it is: never said, roles hardly told apart.
        learned = sorted({*known.untaught_ids, *new})
        add_lora(raw, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, learned)
    return raw, tokenizer


def preview(run: Run, tokenizer: Tokenizer, example: Example) -> None:
    """Show an example as it is learned, in colours."""
    run.say("first example; the model learns the green part:")
    if run.main:
        from rich.console import Console

        Console(soft_wrap=True).print(colour_preview(tokenizer, *example))


def exact_match(raw: GPT, tokenizer: Tokenizer, rows: Sequence[Row], max_new_tokens: int) -> Match:
    """Answer the rows' prompts greedily, and compare to their own answers."""
    prompts = [prompt_ids(tokenizer, rows_to_prompt(row.data)) for row in rows]
    answers = sample(
        raw, prompts, max_new_tokens=max_new_tokens, temperature=0, stop_ids=[tokenizer.eot_id]
    )
    mistakes = []
    for row, answer in zip(rows, answers, strict=True):
        *_, asked, wanted = (message["content"] for message in rows_to_messages(row.data))
        said, stopped = tokenizer.decode(answer.ids), answer.stopped
        if not stopped or said != wanted:
            mistake = {"prompt": asked, "wanted": wanted, "answer": said, "stopped": stopped}
            mistakes.append(mistake)
    return Match(1 - len(mistakes) / len(rows), mistakes)


def sample_answers(
    cfg: Config, raw: GPT, tokenizer: Tokenizer, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """What the model answers to the prompts of `rows`, for the log."""
    prompts = []
    for row in rows:
        # A conversation may train without having a prompt that could be answered.
        with suppress(InputError):
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


def log_answers(
    cfg: Config, run: Run, raw: GPT, tokenizer: Tokenizer, rows: Sequence[Row], step: int
) -> Match | None:
    """Log what the model answers to held-out prompts, and with eval_exact_match how many of all are
    exact, which is returned. All processes must call it."""
    speaker = sampler(run.accelerator, raw)
    run.log_samples(step, sample_answers(cfg, speaker, tokenizer, rows[: cfg.samples]))
    if not cfg.eval_exact_match:
        return None
    match = exact_match(speaker, tokenizer, rows, cfg.sample_tokens)
    run.log(step, {"exact_match": match.share})
    for row in match.mistakes[:8]:
        run.say(f"  {row['prompt']!r}: {row['answer']!r}, not {row['wanted']!r}")
    return match


def list_mistakes(run: Run, match: Match, rows: int) -> None:
    """Write the answers that are not exact to mistakes.jsonl, and say how many of `rows` they
    are."""
    file = run.folder / "mistakes.jsonl"
    run.say(f"{len(match.mistakes)} of {rows} held-out answers are not exact: {file}")
    if run.main:
        write_jsonl(file, match.mistakes)


def gate_of(
    initial: float, final: Heldout, truncated: int, match: Match | None, heldout: int
) -> Gate:
    """Whether the held-out loss fell, and the end token was learned."""
    text = f"held-out loss on answers {initial:.2f} -> {final.loss:.3f} nats a token"
    text += f"; end token {final.stop:.0%} likely where they end"
    if final.stop < STOPS:
        text += f", below {STOPS:.0%}: it was not learned"
    text += f"; {truncated} rows truncated"
    if match:
        text += f"; {match.share:.2%} of {heldout} held-out answers exact"
    return Gate(final.loss < initial and final.stop >= STOPS, text)


def main(cfg: Config) -> None:
    """Train on the demonstrations, evaluate on those held out, publish."""
    run = Run(cfg, "sft", "lm")
    raw, tokenizer = new_or_parent(cfg)
    rows, heldout_rows, skipped = cfg.read(rows_to_prompt, partial(parse, tokenizer))
    examples, counts = cut(rows, cfg.max_length)
    heldout, heldout_counts = cut(heldout_rows, cfg.max_length)
    preview(run, tokenizer, examples[0])
    run.say(f"training rows: {counts}; held out: {heldout_counts}")

    model, optimizer = run.prepare(raw, adamw_for(cfg, raw))
    micro, pad_id = cfg.per_device_train_batch_size, tokenizer.pad_id
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, len(examples), run.global_batch)
    order = Order([len(example.ids) for example in examples], run.global_batch, cfg.seed)

    def summed_loss(batch: Sequence[Example]) -> Tensor:
        """Summed over a micro-batch (1)."""
        return loss(model, batch, pad_id, run.device)[0][None]

    match = None
    first_step, kept = run.start_or_resume(raw, optimizer, fingerprint(examples), tokens_seen=0)
    bar, speed = run.progress(steps, first_step), Speed()
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step == 0 or is_due(step, cfg.eval_steps, steps):
            found = evaluate(run, model, heldout, micro, tokenizer)
            kept.setdefault("initial", found.loss)
            run.log(step, {"eval_loss": found.loss, "eval_stop": found.stop})
            if step:
                match = log_answers(cfg, run, raw, tokenizer, heldout_rows, step)
            speed.restart()
        if step == steps:
            break
        chosen = [examples[row] for row in order.rows(step)]
        micro_batches = list(share(chosen, run.rank, run.processes, micro, blank))
        counted = torch.tensor([sum(map(supervised_tokens, micro_batches))])
        rate = follow_schedule(cfg, optimizer, step, steps)
        done = run.update(step, model, optimizer, micro_batches, summed_loss, counted)
        tokens = sum(len(example.ids) for example in chosen)
        kept["tokens_seen"] += tokens
        speed.add(tokens)
        bar.update()
        if done and is_due(step + 1, cfg.logging_steps, steps):
            metrics = {"loss": done.losses[0], "grad_norm": done.grad_norm, "lr": rate}
            run.log(step + 1, metrics | {"tokens/s": round(speed.lap())})

    if match:
        list_mistakes(run, match, len(heldout_rows))
    gate = gate_of(kept["initial"], found, counts["truncated"], match, len(heldout_rows))
    data = {"train": counts, "eval": heldout_counts, "skipped": skipped}
    run.publish(steps, gate, tokenizer, raw, tokens_seen=kept["tokens_seen"], data=data)


if __name__ == "__main__":
    cli(Config, main)
