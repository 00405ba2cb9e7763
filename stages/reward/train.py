"""Reward modelling: a scalar head on the SFT model learns which of two answers people prefer.

    accelerate launch -m stages.reward.train --config configs/demo/reward.yaml

Rows: `prompt`, `answers`, `ranks` (K answers ranked; made by stages.reward.collect), or `prompt`,
`chosen`, `rejected`. Bradley-Terry over all pairs of a prompt's answers (InstructGPT, eq. 1). At
the end scores are shifted so that the SFT model's own answers average 0, and scaled so that they
deviate by 1.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import cli, fingerprint, stage_config
from common.config.training import NonNegative, RowsConfig
from common.handoff.adapter import save_adapter
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model, publish
from common.model.gpt import RewardModel
from common.model.lora import add_lora, merged_state
from common.program.errors import InputError
from common.rows.batches import Order, pad, share
from common.rows.sources import Row
from common.text.chat import comparison_prompt
from common.text.comparisons import ranked
from common.train.optimizers import adamw, parameter_groups, schedule, set_learning_rate, steps_for
from common.train.placement import whole
from common.train.run import Run
from stages.reward.loss import accuracy_by_margin, comparison_loss, ranked_pairs


@stage_config
class Config(RowsConfig):
    """Train a reward model on comparisons."""

    parent: str
    """The SFT model whose trunk the reward model starts from."""
    per_device_train_batch_size: Annotated[int, Field(gt=0)] = 16
    """Prompts in a micro-batch; all answers of a prompt stay together."""
    margin: NonNegative = 0.0
    """Wanted distance between the better and the worse score."""
    centering: NonNegative = 0.0
    """Weight of (better + worse)^2, which keeps scores near 0 (Eisenstein 2023)."""
    normalize: bool = True
    """Scale the head so that the SFT model's answers have a standard deviation of 1 (after the
    shift to mean 0)."""


class Comparison(NamedTuple):
    rows: list[list[int]]  # prompt and answer, K of them
    pairs: list[tuple[int, int]]  # (better, worse) indices into rows
    policy: list[int]  # indices of the SFT model's own answers


class Batch(NamedTuple):
    ids: Tensor  # (N, T) all answers of all prompts
    lengths: Tensor  # (N)
    better: Tensor  # (P)
    worse: Tensor  # (P)
    weights: Tensor  # (P) 1 / pairs of the prompt


def paired(rows: Sequence[Row], max_length: int) -> tuple[list[Comparison], dict[str, int]]:
    """Comparisons of parsed rows, and counts: comparisons, pairs, ties (no pair left), answers too
    long, identical answers.

    Raises InputError when no pair is left of any.
    """
    out: list[Comparison] = []
    counts = {"comparisons": 0, "pairs": 0, "tied": 0, "too_long": 0, "identical": 0}
    for row in rows:
        ids, ranks, sources = row.parsed
        # An over-long answer cannot be cut: its score is read at its end.
        fits = [i for i, answer in enumerate(ids) if len(answer) <= max_length]
        counts["too_long"] += len(ids) - len(fits)
        pairs = [
            (i, j)
            for i, j in ranked_pairs([ranks[i] for i in fits])
            if ids[fits[i]] != ids[fits[j]]
        ]
        counts["identical"] += len(ranked_pairs([ranks[i] for i in fits])) - len(pairs)
        if not pairs:
            counts["tied"] += 1
            continue
        out.append(
            Comparison(
                [ids[i] for i in fits],
                pairs,
                [n for n, i in enumerate(fits) if sources[i] == "policy"],
            )
        )
        counts["comparisons"] += 1
        counts["pairs"] += len(pairs)
    if not out:
        why = f"this and all {len(rows)} comparisons are left without a pair ({counts}); raise max_length {max_length}?"
        raise InputError(f"{rows[0].origin}: {why}")
    return out, counts


def collate(comparisons: Sequence[Comparison], pad_id: int, device: torch.device) -> Batch:
    rows, better, worse, weights = [], [], [], []
    for comparison in comparisons:
        better += [len(rows) + i for i, _ in comparison.pairs]
        worse += [len(rows) + j for _, j in comparison.pairs]
        weights += [1 / len(comparison.pairs)] * len(comparison.pairs)
        rows += comparison.rows
    lengths = torch.tensor([len(row) for row in rows])
    chosen = torch.tensor([better, worse], dtype=torch.long)
    return Batch(
        *(
            t.to(device)
            for t in (pad(rows, pad_id), lengths, *chosen, torch.tensor(weights, dtype=torch.float))
        )
    )


@torch.no_grad()
def evaluate(
    run: Run,
    model: torch.nn.Module,
    comparisons: Sequence[Comparison],
    batch_size: int,
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(score gap better - worse of every pair (P), comparison each belongs to (P), scores of the
    SFT model's answers)."""
    model.eval()
    own, found = any(comparison.policy for comparison in comparisons), []
    for rows in share(
        range(len(comparisons)), run.rank, run.processes, batch_size, blank=lambda row: row
    ):
        run.poll()
        part = [comparisons[row] for row in rows]
        batch = collate(part, pad_id, run.device)
        scores = iter(model(batch.ids, batch.lengths).tolist())
        for row, comparison in zip(rows, part, strict=True):
            mine = [next(scores) for _ in comparison.rows]
            wanted = comparison.policy if own else range(len(mine))
            found.append(
                (row, [mine[i] - mine[j] for i, j in comparison.pairs], [mine[i] for i in wanted])
            )
    model.train()
    each = {
        row: (gaps, policy) for row, gaps, policy in gather_object(found)
    }  # once each, though a blank has come twice
    in_order = [(row, *each[row]) for row in sorted(each)]
    gaps = torch.tensor([gap for _, gaps, _ in in_order for gap in gaps])
    groups = torch.tensor([row for row, gaps, _ in in_order for _ in gaps])
    return gaps, groups, torch.tensor([score for _, _, policy in in_order for score in policy])


def accuracy(gaps: Tensor, groups: Tensor) -> tuple[float, float]:
    """(share of pairs ordered right, half-width of its 95 % interval with prompts, not pairs, as
    independent)."""
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    mean = right.mean()
    residuals = torch.zeros(int(groups.max()) + 1, dtype=torch.double).index_add(
        0, groups, right - mean
    )
    return float(mean), 1.96 * float(residuals.square().sum().sqrt()) / len(gaps)


@torch.no_grad()
def set_origin(model: RewardModel, scores: Tensor, normalize: bool) -> tuple[float, float]:
    """Shift (and scale) the model so that `scores` average 0 (and deviate by 1); returns their mean
    and std before."""
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    if normalize and std > 1e-6:
        # Dividing the head is exact; the shift is subtracted after it, so it shrinks alike.
        model.score.weight.div_(std)
        model.shift.div_(std)
        shift = mean / std
    else:
        shift = mean
    model.shift.add_(shift)
    return mean, std


def main(cfg: Config) -> None:
    run = Run(cfg, "reward", "reward")
    check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    parent = load_model(cfg.parent, "lm")
    tokenizer = load_tokenizer(cfg.parent)
    parent.resize_vocabulary(tokenizer.vocab_size)
    rows, heldout_rows, skipped = cfg.read(comparison_prompt, partial(ranked, tokenizer))
    comparisons, counts = paired(rows, cfg.max_length)
    heldout, heldout_counts = paired(heldout_rows, cfg.max_length)
    run.say(f"training: {counts}; held out: {heldout_counts}")

    raw = RewardModel(parent.config, parent.trunk)
    if cfg.lora_r:
        add_lora(raw, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    optimizer = adamw(
        parameter_groups(raw.parameters(), cfg.learning_rate, cfg.weight_decay), cfg.adam_beta2
    )
    model, optimizer = run.prepare(raw, optimizer)
    micro = cfg.per_device_train_batch_size
    batch_rows = run.global_batch
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, len(comparisons), batch_rows)
    order = Order(
        [max(map(len, comparison.rows)) for comparison in comparisons], batch_rows, cfg.seed
    )  # pads the least

    def loss(batch: Batch) -> Tensor:
        scores = model(batch.ids, batch.lengths)
        return comparison_loss(
            scores.float(), batch.better, batch.worse, batch.weights, cfg.margin, cfg.centering
        )[None]

    first_step, _ = run.start_or_resume(raw, optimizer, fingerprint(comparisons))
    bar, clock, tokens = run.progress(steps, first_step), time.perf_counter(), 0
    for step in range(first_step, steps + 1):
        run.checkpoint(step)
        if step == steps or (step and cfg.eval_steps and step % cfg.eval_steps == 0):
            gaps, groups, scores = evaluate(run, model, heldout, micro, tokenizer.pad_id)
            mean, half = accuracy(gaps, groups)
            run.log(
                step,
                {
                    "eval_accuracy": mean,
                    "eval_loss": float(torch.nn.functional.softplus(-gaps).mean()),
                },
            )
            clock, tokens = time.perf_counter(), 0
        if step == steps:
            break
        chosen = [comparisons[row] for row in order.rows(step)]
        parts = list(
            share(
                chosen,
                run.rank,
                run.processes,
                micro,
                lambda comparison: comparison._replace(pairs=[]),
            )
        )
        counted = torch.tensor(
            [float(sum(bool(comparison.pairs) for part in parts for comparison in part))]
        )
        micro_batches = [collate(part, tokenizer.pad_id, run.device) for part in parts]
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate(optimizer, factor)
        done = run.update(step, model, optimizer, micro_batches, loss, counted)
        tokens += sum(len(row) for comparison in chosen for row in comparison.rows)
        bar.update()
        if done and ((step + 1) % cfg.logging_steps == 0 or step + 1 == steps):
            metrics = {
                "loss": done.losses[0],
                "grad_norm": done.grad_norm,
                "lr": factor * cfg.learning_rate,
            }
            run.log(step + 1, metrics | {"tokens/s": round(tokens / (time.perf_counter() - clock))})
            clock, tokens = time.perf_counter(), 0

    for bucket, pairs, right, claim in accuracy_by_margin(gaps):
        run.say(
            f"  score gap {bucket:>8}: {pairs:>6} pairs, {right:.1%} right, {claim:.1%} by the model's own reckoning"
        )
    # The origin is set on training prompts: held-out ones stay unseen by every number that ships.
    _, _, scores = evaluate(
        run, model, comparisons[: max(200, len(heldout))], micro, tokenizer.pad_id
    )
    with whole(run.accelerator, raw):
        before, std = set_origin(raw, scores, cfg.normalize)
        run.log(steps, {"score_mean_before": before, "score_std_before": std})
        share_right = (
            f"orders {mean:.1%} +- {half:.1%} of {len(gaps)} held-out pairs as the labels do"
        )
        whose = (
            "SFT answers" if any(comparison.policy for comparison in comparisons) else "all answers"
        )
        text = f"{share_right}; {whose} scored {before:+.2f} on average, now 0"
        margins = [
            dict(zip(("gap", "pairs", "accuracy", "claimed"), row, strict=True))
            for row in accuracy_by_margin(gaps)
        ]
        stage = run.finish(
            steps,
            (mean - half > 0.5, text),
            accuracy={"mean": mean, "ci95": [mean - half, mean + half], "n": len(gaps)},
            margins=margins,
            data={"train": counts, "eval": heldout_counts, "skipped": skipped},
        )
        if run.main:
            if cfg.lora_r:
                save_adapter(raw, run.folder / "adapter", cfg.parent, cfg.lora_r, cfg.lora_alpha)
            publish(
                run.folder, raw, tokenizer, stage, weights=merged_state(raw) if cfg.lora_r else None
            )
    run.forget()


if __name__ == "__main__":
    cli(Config, main)
