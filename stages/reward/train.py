"""Reward modelling: a scalar head on the SFT model learns which of two answers people prefer.

    accelerate launch -m stages.reward.train --config configs/demo/reward.yaml

Rows: `prompt`, `answers`, `ranks` (K answers ranked; made by stages.reward.collect), or `prompt`,
`chosen`, `rejected`. Bradley-Terry over all pairs of a prompt's answers (InstructGPT, eq. 1). At
the end scores are shifted so that the SFT model's own answers average 0, and scaled so that they
deviate by 1.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import InputPath, cli, fingerprint, stage_config
from common.config.training import NonNegative, RowsConfig
from common.handoff.locate import load_tokenizer
from common.handoff.publish import check_context, load_model
from common.handoff.report import Gate
from common.model.gpt import RewardModel
from common.model.lora import add_lora
from common.program.errors import InputError
from common.rows.batches import Order, pad, share
from common.rows.sources import Row
from common.text.chat import comparison_prompt
from common.text.comparisons import ranked
from common.text.tokenizer import Tokenizer
from common.train.log import Speed
from common.train.optimizers import adamw_for, follow_schedule, is_due, steps_for
from common.train.placement import whole
from common.train.run import Run
from stages.reward.loss import accuracy_by_margin, comparison_loss, ranked_pairs


@stage_config
class Config(RowsConfig):
    """Train a reward model on comparisons."""

    parent: InputPath
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
    """A prompt with its answers, and which of them are better than which."""

    rows: list[list[int]]  # prompt and answer, K of them
    pairs: list[tuple[int, int]]  # (better, worse) indices into rows
    policy: list[int]  # indices of the SFT model's own answers


class Batch(NamedTuple):
    """A micro-batch: N answers, P pairs of them."""

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
        # An over-long answer cannot be cut: its score is read at its end.
        answers = list(zip(*row.parsed, strict=True))
        fits = [answer for answer in answers if len(answer[0]) <= max_length]
        ids = [its_ids for its_ids, _, _ in fits]
        ordered = ranked_pairs([rank for _, rank, _ in fits])
        pairs = [(i, j) for i, j in ordered if ids[i] != ids[j]]
        policy = [i for i, (_, _, source) in enumerate(fits) if source == "policy"]
        counts["too_long"] += len(answers) - len(fits)
        counts["identical"] += len(ordered) - len(pairs)
        counts["pairs"] += len(pairs)
        counts["comparisons" if pairs else "tied"] += 1
        if pairs:
            out.append(Comparison(ids, pairs, policy))
    if not out:
        raise InputError(
            f"{rows[0].origin}: this and all {len(rows)} comparisons are left without a pair "
            f"({counts}); raise max_length {max_length}?"
        )
    return out, counts


def collate(comparisons: Sequence[Comparison], pad_id: int, device: torch.device) -> Batch:
    """The answers of all comparisons as one padded batch."""
    rows: list[Sequence[int]] = []
    better: list[int] = []
    worse: list[int] = []
    weights: list[float] = []
    for comparison in comparisons:
        better += [len(rows) + i for i, _ in comparison.pairs]
        worse += [len(rows) + j for _, j in comparison.pairs]
        weights += [1 / len(comparison.pairs) for _ in comparison.pairs]  # a blank one has none
        rows += comparison.rows
    lengths = torch.tensor([len(row) for row in rows])
    indices = torch.tensor([better, worse], dtype=torch.long)
    weight_of = torch.tensor(weights, dtype=torch.float)
    return Batch(*(t.to(device) for t in (pad(rows, pad_id), lengths, *indices, weight_of)))


def blank(comparison: Comparison) -> Comparison:
    """The comparison with nothing to learn from it, for a process that is short of rows."""
    return comparison._replace(pairs=[])


class Evaluation(NamedTuple):
    """Scores of a reward model on comparisons; P pairs, A answers."""

    gaps: Tensor  # (P) score of the better answer less that of the worse
    groups: Tensor  # (P) comparison that each pair belongs to
    scores: Tensor  # (A) of the SFT model's own answers; of all, where none is known to be its


@torch.no_grad()
def evaluate(
    run: Run,
    model: torch.nn.Module,
    comparisons: Sequence[Comparison],
    batch_size: int,
    pad_id: int,
) -> Evaluation:
    """Score all answers. Every process must call it, and gets the whole result."""
    model.eval()
    own, found = has_policy(comparisons), []
    indices = range(len(comparisons))
    for rows in share(indices, run.rank, run.processes, batch_size, blank=lambda row: row):
        run.poll()
        part = [comparisons[row] for row in rows]
        batch = collate(part, pad_id, run.device)
        scores = iter(model(batch.ids, batch.lengths).tolist())
        for row, comparison in zip(rows, part, strict=True):
            mine = [next(scores) for _ in comparison.rows]
            wanted = comparison.policy if own else range(len(mine))
            gaps = [mine[i] - mine[j] for i, j in comparison.pairs]
            found.append((row, gaps, [mine[i] for i in wanted]))
    model.train()
    # Once each, though a row may have been given to a second process as well.
    each = {row: (gaps, policy) for row, gaps, policy in gather_object(found)}
    in_order = [(row, *each[row]) for row in sorted(each)]
    return Evaluation(
        torch.tensor([gap for _, gaps, _ in in_order for gap in gaps]),
        torch.tensor([row for row, gaps, _ in in_order for _ in gaps]),
        torch.tensor([score for _, _, policy in in_order for score in policy]),
    )


def has_policy(comparisons: Sequence[Comparison]) -> bool:
    """Whether any answer is known to be the SFT model's own."""
    return any(comparison.policy for comparison in comparisons)


def accuracy(gaps: Tensor, groups: Tensor) -> tuple[float, float]:
    """(share of pairs ordered right, half-width of its 95 % interval with prompts, not pairs, as
    independent)."""
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    mean = right.mean()
    residuals = torch.zeros(int(groups.max()) + 1, dtype=torch.double)
    residuals = residuals.index_add(0, groups, right - mean)
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


def new_reward_model(cfg: Config) -> tuple[RewardModel, Tokenizer]:
    """(reward model, tokenizer): a new head on the SFT model's trunk, whose vocabulary the
    tokenizer's control tokens are part of."""
    check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    parent = load_model(cfg.parent, "lm")
    tokenizer = load_tokenizer(cfg.parent)
    new = parent.resize_vocabulary(tokenizer.vocab_size, cfg.seed)
    model = RewardModel(parent.config, parent.trunk)
    if cfg.lora_r:
        learned = sorted({*tokenizer.untaught_ids, *new})  # nothing when the parent is of sft
        add_lora(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, learned)
    return model, tokenizer


def say_calibration(run: Run, gaps: Tensor) -> None:
    """A line for each bucket of score gaps: how often the order is right, and how often the model
    claims it is."""
    for bucket, pairs, right, claim in accuracy_by_margin(gaps):
        run.say(
            f"  score gap {bucket:>8}: {pairs:>6} pairs, {right:.1%} right, "
            f"{claim:.1%} by the model's own reckoning"
        )


def gate_of(mean: float, half: float, pairs: int, whose: str, before: float) -> Gate:
    """Whether more than half of the held-out pairs are ordered right, beyond chance."""
    right = f"orders {mean:.1%} +- {half:.1%} of {pairs} held-out pairs as the labels do"
    return Gate(mean - half > 0.5, f"{right}; {whose} scored {before:+.2f} on average, now 0")


def facts_of(gaps: Tensor, mean: float, half: float) -> dict[str, Any]:
    """What stage.json says of the held-out pairs: accuracy, and by score gap."""
    names = ("gap", "pairs", "accuracy", "claimed")
    margins = [dict(zip(names, row, strict=True)) for row in accuracy_by_margin(gaps)]
    accuracy = {"mean": mean, "ci95": [mean - half, mean + half], "n": len(gaps)}
    return {"accuracy": accuracy, "margins": margins}


def main(cfg: Config) -> None:
    """Train on the comparisons, evaluate on those held out, set the origin of the scores,
    publish."""
    run = Run(cfg, "reward", "reward")
    raw, tokenizer = new_reward_model(cfg)
    rows, heldout_rows, skipped = cfg.read(comparison_prompt, partial(ranked, tokenizer))
    comparisons, counts = paired(rows, cfg.max_length)
    heldout, heldout_counts = paired(heldout_rows, cfg.max_length)
    run.say(f"training: {counts}; held out: {heldout_counts}")

    model, optimizer = run.prepare(raw, adamw_for(cfg, raw))
    micro, pad_id = cfg.per_device_train_batch_size, tokenizer.pad_id
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, len(comparisons), run.global_batch)
    lengths = [max(map(len, comparison.rows)) for comparison in comparisons]
    order = Order(lengths, run.global_batch, cfg.seed)  # alike in length: pads the least

    def loss(batch: Batch) -> Tensor:
        """Summed over a micro-batch (1)."""
        scores, pairs = model(batch.ids, batch.lengths).float(), (batch.better, batch.worse)
        return comparison_loss(scores, *pairs, batch.weights, cfg.margin, cfg.centering)[None]

    first_step, _ = run.start_or_resume(raw, optimizer, fingerprint(comparisons))
    bar, speed = run.progress(steps, first_step), Speed()
    for step in range(first_step, steps + 1):
        run.checkpoint(step)
        if step and is_due(step, cfg.eval_steps, steps):
            gaps, groups, _ = evaluate(run, model, heldout, micro, pad_id)
            mean, half = accuracy(gaps, groups)
            eval_loss = float(torch.nn.functional.softplus(-gaps).mean())
            run.log(step, {"eval_accuracy": mean, "eval_loss": eval_loss})
            speed.restart()
        if step == steps:
            break
        chosen = [comparisons[row] for row in order.rows(step)]
        parts = list(share(chosen, run.rank, run.processes, micro, blank))
        counted = sum(bool(comparison.pairs) for part in parts for comparison in part)
        micro_batches = [collate(part, pad_id, run.device) for part in parts]
        rate = follow_schedule(cfg, optimizer, step, steps)
        done = run.update(step, model, optimizer, micro_batches, loss, torch.tensor([counted]))
        speed.add(sum(len(row) for comparison in chosen for row in comparison.rows))
        bar.update()
        if done and is_due(step + 1, cfg.logging_steps, steps):
            metrics = {"loss": done.losses[0], "grad_norm": done.grad_norm, "lr": rate}
            run.log(step + 1, metrics | {"tokens/s": round(speed.lap())})

    say_calibration(run, gaps)
    # The origin is set on training prompts: held-out ones stay unseen by every number that ships.
    some = comparisons[: max(200, len(heldout))]
    scores = evaluate(run, model, some, micro, pad_id).scores
    with whole(run.accelerator, raw.score, change=True):
        before, std = set_origin(raw, scores, cfg.normalize)
    run.log(steps, {"score_mean_before": before, "score_std_before": std})
    whose = "SFT answers" if has_policy(comparisons) else "all answers"
    gate = gate_of(mean, half, len(gaps), whose, before)
    data = {"train": counts, "eval": heldout_counts, "skipped": skipped}
    run.publish(steps, gate, tokenizer, raw, **facts_of(gaps, mean, half), data=data)


if __name__ == "__main__":
    cli(Config, main)
