"""PPO: improve the assistant by the reward model's scores, tied to the SFT model by a KL penalty.

    accelerate launch -m stages.rl.train --config configs/demo/rl.yaml

One step is: sample answers to a batch of prompts; score them; reward = score at the end - kl_coef * KL at every token;
advantages by GAE; a few epochs of clipped policy and value updates. Policy and critic are separate networks: the policy
starts from the SFT model, the critic from the reward model (Stiennon 2020, InstructGPT). See stages/rl/ppo.py for the maths.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.chat import prompt_ids, rows_to_prompt
from common.checkpoint import load_model, load_tokenizer, publish
from common.config import InputError, cli, stage_config
from common.data import Row, Shards, batches, read_rows, share
from common.lora import add_lora, merged_state, save_adapter
from common.ops import entropy, masked_mean, masked_moments, token_logprobs, whiten
from common.optim import NonFiniteError, adamw, parameter_groups, schedule, set_learning_rate, steps_for, update
from common.run import NonNegative, Positive, Run, TrainConfig
from common.tokenizer import Tokenizer
from stages.rl.ppo import explained_variance, kl_estimates, next_kl_coef, policy_loss, value_loss
from stages.rl.rollout import ActorCritic, Trajectory, rollout


@stage_config
class Config(TrainConfig):
    """Improve an assistant with PPO."""

    parent: str
    """The policy to start from: the SFT model."""
    reference: str | None = None
    """The model that KL is measured from; null = parent."""
    reward_model: str
    """Directory of the reward model."""
    critic: str | None = None
    """Directory that the critic starts from; null = the reward model."""
    train_data: str
    """Prompts: rows with `prompt`, or SFT rows whose answers are ignored."""
    max_prompt_length: Positive = 96
    """Longer prompts are left out, and counted."""
    max_new_tokens: Positive = 80
    """Longest answer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; policy and reference log-probs are taken at the same one."""
    per_device_train_batch_size: Positive = 64
    """Episodes in a micro-batch; a minibatch is this times gradient_accumulation_steps times processes."""
    num_minibatches: Positive = 2
    """Minibatches (optimizer updates) an epoch; a rollout is num_minibatches minibatches of episodes."""
    num_ppo_epochs: Positive = 4
    """Epochs over each rollout."""
    max_steps: Positive | None = 40
    """Number of rollouts. Schedule and warm-up count rollouts too."""
    learning_rate: NonNegative = 5e-4
    """Peak learning rate of the policy."""
    critic_learning_rate: NonNegative | None = None
    """Peak learning rate of the critic; null = learning_rate."""
    lr_scheduler_type: str = "linear"
    """Shape after the warm-up: linear, cosine, constant, warmup_stable_decay."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First rollouts in which only the critic learns."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-5
    """AdamW epsilon."""
    kl_coef: NonNegative = 0.05
    """Weight of the KL penalty (the first one, when adaptive)."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Adapt kl_coef towards this KL in nats an episode (Ziegler 2019); null = fixed."""
    kl_horizon: Positive = 10_000
    """Episodes over which the adaptive coefficient moves."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Clip of the policy's ratio."""
    clip_range_value: Annotated[float, Field(gt=0)] = 0.2
    """Clip of the critic's change."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of GAE."""
    score_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Scores are clipped to +- this, after the shift; null = off."""
    missing_stop_penalty: NonNegative = 1.0
    """Taken off the score of an answer that was cut off."""
    early_stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End a rollout's epochs when approx_kl passes 1.5 times this; null = off."""
    ptx_data: str | None = None
    """Shards whose language-model loss is mixed in (InstructGPT's PPO-ptx)."""
    ptx_coef: NonNegative = 0.0
    """Weight of that loss, in nats a token."""
    logging_steps: Positive = 1
    """Rollouts between two lines of metrics."""
    samples: Annotated[int, Field(ge=0)] = 16
    """Episodes of each rollout kept in samples.jsonl."""


class MicroBatch(NamedTuple):
    episodes: Trajectory
    advantages_BT: Tensor  # whitened over the rollout
    ptx: Tensor | None  # (rows, length + 1) pretraining tokens


def tokenize_prompts(rows: Sequence[Row], tokenizer: Tokenizer, max_prompt_length: int) -> tuple[list[list[int]], int]:
    """Prompt ids, and how many rows were left out as too long. Raises InputError naming file and line."""
    prompts = []
    for row in rows:
        try:
            prompts.append(prompt_ids(tokenizer, rows_to_prompt(row.data)))
        except InputError as error:
            raise InputError(f"{row.origin}: {error}") from None
    kept = [prompt for prompt in prompts if len(prompt) <= max_prompt_length]
    if not kept:
        raise InputError(f"all {len(rows)} prompts are longer than max_prompt_length {max_prompt_length}")
    return kept, len(prompts) - len(kept)


def load_models(cfg: Config, run: Run) -> tuple[ActorCritic, torch.nn.Module, torch.nn.Module]:
    """(policy and critic, frozen reference, frozen reward model); dropout is off in all of them."""
    actor_critic = ActorCritic(load_model(cfg.parent, "lm"), load_model(cfg.critic or cfg.reward_model, "reward"))
    reference = load_model(cfg.reference or cfg.parent, "lm").requires_grad_(False).to(run.device)
    reward_model = load_model(cfg.reward_model, "reward").requires_grad_(False).to(run.device)
    sizes = {
        name: model.config.vocab_size
        for name, model in (("parent", actor_critic.policy), ("reference", reference), ("reward_model", reward_model))
    }
    if len(set(sizes.values())) > 1:
        raise InputError(f"vocabularies differ ({sizes}): policy, reference and reward model must share one tokenizer")
    needed = cfg.max_prompt_length + cfg.max_new_tokens
    context = min(model.config.max_length for model in (actor_critic.policy, reference, reward_model, actor_critic.critic))
    if needed > context:
        raise InputError(f"max_prompt_length + max_new_tokens = {needed}: the models' context is {context}")
    return actor_critic, reference, reward_model


def terms(model: ActorCritic, batch: MicroBatch, cfg: Config, stats: list[Tensor]) -> Tensor:
    """(summed PPO loss over response tokens, summed PTX loss) of a micro-batch; its sums for the log go to `stats`."""
    episodes = batch.episodes
    mask_BT = episodes.mask_BT
    logits, values = model(episodes.ids_BS, episodes.predicts_BS())
    logprobs = token_logprobs(logits, episodes.targets_N(), cfg.temperature)
    policy = policy_loss(logprobs, episodes.logprobs_BT[mask_BT], batch.advantages_BT[mask_BT], cfg.clip_range)
    value = value_loss(values.float(), episodes.values_BT[mask_BT], episodes.returns_BT[mask_BT], cfg.clip_range_value)
    with torch.no_grad():
        stats.append(
            torch.stack(
                [mask_BT.sum(), policy.loss, value, policy.clipped, policy.approx_kl, entropy(logits, cfg.temperature).sum()]
            )
        )
    ptx = torch.zeros((), device=logits.device)
    if batch.ptx is not None:
        everywhere = torch.ones_like(batch.ptx[:, :-1], dtype=torch.bool)
        ptx_logits, _ = model(batch.ptx[:, :-1], everywhere)
        ptx = -token_logprobs(ptx_logits, batch.ptx[:, 1:].flatten()).sum()
    return torch.stack([policy.loss + cfg.vf_coef * value, cfg.ptx_coef * ptx])


def learn(
    run: Run,
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Trajectory,
    ptx: Tensor | None,
    cfg: Config,
    step: int,
) -> dict[str, float]:
    """PPO epochs over one rollout (this process's part); returns means over all response tokens of all updates."""
    moments = run.accelerator.reduce(masked_moments(batch.advantages_BT, batch.mask_BT), "sum")
    advantages_BT = whiten(batch.advantages_BT, batch.mask_BT, moments)
    lengths = (batch.prompt_lengths_B + batch.mask_BT.sum(1)).tolist()
    per_minibatch = math.ceil(len(lengths) / cfg.num_minibatches)
    stats: list[Tensor] = []
    norms: list[float] = []
    for epoch in range(cfg.num_ppo_epochs):
        # The order is that of a shuffled deck: which episodes share a minibatch is new in every epoch.
        order = np.random.default_rng((cfg.seed, step, epoch)).permutation(len(lengths)).tolist()
        for start in range(0, len(order), per_minibatch):
            rows = sorted(order[start : start + per_minibatch], key=lambda row: lengths[row])
            parts = list(share(rows, 0, 1, cfg.per_device_train_batch_size))
            ptx_parts = [None] * len(parts) if ptx is None else list(ptx.chunk(len(parts)))
            micro_batches = []
            for part, ptx_part in zip(parts, ptx_parts, strict=True):
                episodes = batch.rows(part)
                micro_batches.append(MicroBatch(episodes, advantages_BT[part][:, : episodes.mask_BT.shape[1]], ptx_part))
            tokens = sum(micro.episodes.mask_BT.sum() for micro in micro_batches)
            counts = torch.tensor([float(tokens), float(0 if ptx is None else ptx[:, 1:].numel())])
            done = update(
                run.accelerator,
                model,
                [optimizer],
                micro_batches,
                lambda micro: terms(model, micro, cfg, stats),
                counts,
                cfg.max_grad_norm,
            )
            norms.append(done.grad_norm)
            recent = run.accelerator.reduce(torch.stack(stats[-len(parts) :]).sum(0), "sum")
            if cfg.early_stop_kl and float(recent[4] / recent[0]) > 1.5 * cfg.early_stop_kl:
                return summarise(run, stats, norms, epoch + 1)
    return summarise(run, stats, norms, cfg.num_ppo_epochs)


def summarise(run: Run, stats: list[Tensor], norms: list[float], epochs: int) -> dict[str, float]:
    tokens, *sums = run.accelerator.reduce(torch.stack(stats).sum(0), "sum").tolist()
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy")
    means = {name: total / tokens for name, total in zip(names, sums, strict=True)}
    return means | {"grad_norm": sum(norms) / len(norms), "ppo_epochs": epochs}


def describe(run: Run, batch: Trajectory, cfg: Config) -> dict[str, float]:
    """Means over the episodes of a rollout, all processes; KL in nats an episode."""
    k1_BT, _, _ = kl_estimates(batch.logprobs_BT, batch.ref_logprobs_BT)
    episodes = torch.stack(
        [
            torch.ones_like(batch.scores_B),
            batch.scores_B,
            (batch.rewards_BT * batch.mask_BT).sum(1),
            (k1_BT * batch.mask_BT).sum(1),
            batch.mask_BT.sum(1).float(),
            batch.stopped_B.float(),
        ]
    ).sum(1)
    count, *sums = run.accelerator.reduce(episodes, "sum").tolist()
    names = ("score", "reward", "kl", "length", "stop_rate")
    metrics = {name: total / count for name, total in zip(names, sums, strict=True)}
    if not all(map(math.isfinite, metrics.values())):
        raise NonFiniteError(f"rollout statistics {metrics}; no update was applied")
    mask = batch.mask_BT
    metrics["explained_variance"] = float(explained_variance(batch.values_BT[mask], batch.returns_BT[mask]))
    metrics["rollout_entropy"] = float(masked_mean(batch.entropy_BT, mask))
    return metrics


def episode_samples(batch: Trajectory, tokenizer: Tokenizer, count: int) -> list[dict]:
    """The first episodes of a rollout as text, with score and KL."""
    k1_B = ((batch.logprobs_BT - batch.ref_logprobs_BT) * batch.mask_BT).sum(1)
    rows = []
    for b in range(min(count, len(batch.scores_B))):
        prompt, end = int(batch.prompt_lengths_B[b]), int(batch.prompt_lengths_B[b] + batch.mask_BT[b].sum())
        ids = batch.ids_BS[b].tolist()
        rows.append(
            {
                "prompt": tokenizer.decode(ids[:prompt]),
                "answer": tokenizer.decode(ids[prompt:end]),
                "score": round(float(batch.scores_B[b]), 4),
                "kl": round(float(k1_B[b]), 4),
                "stopped": bool(batch.stopped_B[b]),
            }
        )
    return rows


def main(cfg: Config) -> None:
    run = Run(cfg, "rl", "lm")
    tokenizer = load_tokenizer(cfg.parent)
    raw, reference, reward_model = load_models(cfg, run)
    prompts, left_out = tokenize_prompts(read_rows(cfg.train_data), tokenizer, cfg.max_prompt_length)
    run.say(f"{len(prompts):,} prompts, {left_out} left out as longer than {cfg.max_prompt_length} tokens")
    if cfg.lora_r:
        add_lora(raw.policy, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
        add_lora(raw.critic, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    critic_rate = cfg.learning_rate if cfg.critic_learning_rate is None else cfg.critic_learning_rate
    groups = parameter_groups(raw.policy, cfg.learning_rate, cfg.weight_decay)
    policy_groups = len(groups)
    groups += parameter_groups(raw.critic, critic_rate, cfg.weight_decay)
    model, optimizer = run.accelerator.prepare(raw, adamw(groups, cfg.adam_beta2, cfg.adam_eps))
    model.eval()  # no dropout in RL: old log-probs must be those that training computes

    minibatch = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * run.processes
    episodes = minibatch * cfg.num_minibatches
    if episodes > len(prompts):
        raise InputError(f"a rollout takes {episodes} prompts, {cfg.train_data} has {len(prompts)}: use smaller batches")
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, len(prompts), episodes)
    shards = Shards(cfg.ptx_data, "train", cfg.max_length) if cfg.ptx_data and cfg.ptx_coef else None
    per_epoch = len(prompts) // episodes
    kl_coef, history = cfg.kl_coef, []
    bar = run.progress(steps, unit="rollout")
    for step in range(steps):
        if step % per_epoch == 0:
            order = batches([1] * len(prompts), episodes, cfg.seed, step // per_epoch)
        chosen = [prompts[row] for row in order[step % per_epoch]][run.rank :: run.processes]
        with run.autocast():
            batch = rollout(
                raw,
                reference,
                reward_model,
                chosen,
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                stop_ids=[tokenizer.eot_id],
                pad_id=tokenizer.pad_id,
                seed=hash((cfg.seed, step, run.rank)) % 2**31,
                kl_coef=kl_coef,
                gamma=cfg.gamma,
                gae_lambda=cfg.gae_lambda,
                score_clip=cfg.score_clip,
                missing_stop_penalty=cfg.missing_stop_penalty,
                batch_size=256,
                score_batch_size=cfg.per_device_train_batch_size,
            )
        metrics = describe(run, batch, cfg)
        history.append(metrics)
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate([optimizer], factor)
        if step < cfg.critic_warmup_steps:
            for group in optimizer.param_groups[:policy_groups]:
                group["lr"] = 0.0
        ptx = shards.batch(cfg.seed, step * episodes + run.rank, cfg.per_device_train_batch_size) if shards else None
        metrics |= learn(run, model, optimizer, batch, None if ptx is None else ptx.to(run.device), cfg, step)
        metrics |= {"kl_coef": kl_coef, "lr": factor * cfg.learning_rate}
        if cfg.target_kl:
            kl_coef = next_kl_coef(kl_coef, metrics["kl"], cfg.target_kl, cfg.kl_horizon, episodes)
        bar.update()
        if (step + 1) % cfg.logging_steps == 0 or step + 1 == steps:
            run.log(step + 1, metrics)
            run.log_samples(step + 1, episode_samples(batch, tokenizer, cfg.samples), shown=int((step + 1) % 10 == 0))

    last = history[-max(1, min(5, steps // 4)) :]
    mean = {name: sum(row[name] for row in last) / len(last) for name in ("score", "kl", "stop_rate")}
    text = f"score {history[0]['score']:+.2f} -> {mean['score']:+.2f} at KL {mean['kl']:.1f} nats, {mean['stop_rate']:.0%} complete"
    stage = run.finish(steps, (mean["score"] > history[0]["score"], text), episodes=steps * episodes)
    if run.main:
        policy = merged_state(raw.policy) if cfg.lora_r else None
        if cfg.lora_r:
            save_adapter(raw.policy, run.folder / "adapter", cfg.parent, cfg.lora_r, cfg.lora_alpha)
        publish(run.folder, raw.policy, tokenizer, stage, weights=policy)
        critic = merged_state(raw.critic) if cfg.lora_r else None
        publish(run.folder / "critic", raw.critic, tokenizer, {**stage, "kind": "reward"}, weights=critic)


if __name__ == "__main__":
    cli(Config, main)
