"""PPO: improve the assistant by the reward model's scores, tied to the SFT model by a KL penalty.

    accelerate launch -m stages.rl.train --config configs/demo/rl.yaml

One step is: sample answers to a batch of prompts; score them; reward = score at the end - kl_coef *
KL at every token; advantages by GAE; a few epochs of clipped policy and value updates. Policy and
critic are separate networks: the policy starts from the SFT model, the critic from the reward model
(Stiennon 2020, InstructGPT). See stages/rl/ppo.py for the maths.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate.utils import gather_object
from pydantic import Field

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import cli, fingerprint, stage_config
from common.config.training import NonNegative, Positive, ReadsRows, SchedulerType
from common.handoff.adapter import save_adapter
from common.handoff.locate import lineage, load_tokenizer
from common.handoff.publish import check_context, load_config, load_model, publish
from common.model.lora import add_lora, merged_state
from common.program.errors import Failure, InputError
from common.rows.batches import Order
from common.rows.shards import Shards
from common.rows.sources import BadRows, Row, read_rows
from common.text.chat import prompt_ids, rows_to_prompt
from common.text.tokenizer import Tokenizer, same_ids
from common.train.log import Laps
from common.train.optimizers import adamw, parameter_groups, schedule, set_learning_rate, steps_for
from common.train.placement import frozen, sampler, whole
from common.train.run import Run
from common.train.update import NonFiniteError
from stages.rl.algorithms.ppo import next_kl_coef
from stages.rl.learn import PPOConfig, describe, episode_samples, learn
from stages.rl.rollout import ActorCritic, Trajectory, joined, rollout


@stage_config
class Config(ReadsRows, PPOConfig):
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
    max_steps: Positive | None = 40
    """Number of rollouts. Schedule and warm-up count rollouts too."""
    learning_rate: NonNegative = 5e-4
    """Peak learning rate of the policy."""
    critic_learning_rate: NonNegative | None = None
    """Peak learning rate of the critic; null = learning_rate."""
    lr_scheduler_type: SchedulerType = "linear"
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
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of GAE."""
    score_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Scores are clipped to +- this, after the shift; null = off."""
    missing_stop_penalty: NonNegative = 1.0
    """Taken off the score of an answer that was cut off."""
    ptx_data: str | None = None
    """Shards whose language-model loss is mixed in (InstructGPT's PPO-ptx)."""
    logging_steps: Positive = 1
    """Rollouts between two lines of metrics."""
    save_steps: Positive | None = 10
    """Rollouts between two saves of what a resume needs (null: only when told to stop)."""
    samples: Annotated[int, Field(ge=0)] = 16
    """Episodes of each rollout kept in samples.jsonl."""


def texts(run: Run, shards: Shards, cfg: Config, step: int, update: int) -> torch.Tensor:
    """This process's rows of pretraining text for one update of a rollout: a pure function of both
    numbers."""
    rows, updates = cfg.ptx_batch_size, cfg.num_ppo_epochs * cfg.num_minibatches
    return shards.batch(
        cfg.seed, ((step * updates + update) * run.processes + run.rank) * rows, rows
    ).to(run.device)


def parse(tokenizer: Tokenizer, row: dict[str, Any]) -> list[int]:
    return prompt_ids(tokenizer, rows_to_prompt(row))


def short_enough(rows: Sequence[Row], max_prompt_length: int) -> tuple[list[list[int]], int]:
    """Ids of the prompts of parsed rows, and how many were left out as too long."""
    kept = [row.parsed for row in rows if len(row.parsed) <= max_prompt_length]
    if not kept:
        all_of = f"{rows[0].origin}: this and all {len(rows)} prompts"
        raise InputError(f"{all_of} are longer than max_prompt_length {max_prompt_length}")
    return kept, len(rows) - len(kept)


def load_models(cfg: Config, run: Run) -> tuple[ActorCritic, torch.nn.Module, torch.nn.Module]:
    """(policy and critic, frozen reference, frozen reward model); dropout is off in all of them."""
    needed, key = cfg.max_prompt_length + cfg.max_new_tokens, "max_prompt_length + max_new_tokens"
    reference, critic = cfg.reference or cfg.parent, cfg.critic or cfg.reward_model
    kinds = (
        (cfg.parent, "lm"),
        (critic, "reward"),
        (reference, "lm"),
        (cfg.reward_model, "reward"),
    )
    for (
        name,
        kind,
    ) in kinds:  # all that does not fit together is refused before any weights are read
        check_context(name, kind, needed, key)
        if not same_ids(load_tokenizer(name), load_tokenizer(cfg.parent)):
            raise InputError(
                f"{name}: its tokenizer is not that of {cfg.parent}; policy, reward model and critic must share one"
            )
    if cfg.ptx_data:
        check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    sizes = [load_config(name).vocab_size for name, _ in kinds]
    if len(set(sizes)) > 1:
        raise InputError(
            f"vocabularies of policy, critic, reference and reward model differ: {sizes}; use models of one lineage"
        )
    if sizes[0] < load_tokenizer(cfg.parent).vocab_size:
        raise InputError(
            f"{cfg.parent}: its embeddings lack our control tokens; start from a model that went through stages.sft"
        )
    judges = (frozen(run.accelerator, load_model(name, kind)) for name, kind in kinds[2:])
    return ActorCritic(load_model(cfg.parent, "lm"), load_model(critic, "reward")), *judges


def main(cfg: Config) -> None:
    if bool(cfg.ptx_data) != (cfg.ptx_coef > 0):
        raise InputError(
            f"ptx_data {cfg.ptx_data}, ptx_coef {cfg.ptx_coef}: PTX needs both, or neither"
        )
    if cfg.eval_steps:
        raise InputError(
            f"eval_steps {cfg.eval_steps}: rl evaluates on its own rollouts; tools.compare judges the result"
        )
    run = Run(cfg, "rl", "lm")
    tokenizer = load_tokenizer(cfg.parent)
    raw, reference, reward_model = load_models(cfg, run)
    bad = BadRows(cfg.on_bad_row)
    prompts, left_out = short_enough(
        read_rows(cfg.train_data, partial(parse, tokenizer), bad), cfg.max_prompt_length
    )
    run.say(
        f"{len(prompts):,} prompts, {left_out} left out as longer than {cfg.max_prompt_length} tokens"
    )
    if cfg.lora_r:
        add_lora(raw.policy, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
        add_lora(raw.critic, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    critic_rate = (
        cfg.learning_rate if cfg.critic_learning_rate is None else cfg.critic_learning_rate
    )
    groups = parameter_groups(raw.policy.parameters(), cfg.learning_rate, cfg.weight_decay)
    policy_groups = len(groups)
    groups += parameter_groups(raw.critic.parameters(), critic_rate, cfg.weight_decay)
    model, optimizer = run.prepare(raw, adamw(groups, cfg.adam_beta2, cfg.adam_eps))
    model.eval()  # no dropout in RL: old log-probs must be those that training computes

    episodes = run.global_batch * cfg.num_minibatches
    if episodes > len(prompts):
        raise InputError(
            f"a rollout takes {episodes} prompts, {cfg.train_data} has {len(prompts)}: use smaller batches"
        )
    shards = Shards(cfg.ptx_data, "train", cfg.max_length) if cfg.ptx_data else None
    if shards and not same_ids(load_tokenizer(cfg.ptx_data), tokenizer):
        raise InputError(
            f"ptx_data {cfg.ptx_data}: its ids are not those of {cfg.parent}; prepare it with that tokenizer"
        )
    order = Order([1] * len(prompts), episodes, cfg.seed, drop_last=True)
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, order.per_epoch * episodes, episodes)
    models = [
        lineage(path).get("parent_hash") for path in (cfg.reference, cfg.reward_model, cfg.critic)
    ]
    data = fingerprint([prompts, shards and shards.meta, models])
    first_step, kept = run.start_or_resume(raw, optimizer, data, kl_coef=cfg.kl_coef, history=[])
    bar, history, speaker = run.progress(steps, first_step, unit="rollout"), kept["history"], None
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step == steps:
            break
        kl_coef, lap = kept["kl_coef"], Laps()
        speaker = sampler(run.accelerator, raw.policy, run.dtype, speaker)
        chosen = [prompts[row] for row in order.rows(step)]
        with run.autocast():
            part = rollout(
                model,
                reference,
                reward_model,
                chosen[run.rank :: run.processes],
                max_new_tokens=cfg.max_new_tokens,
                temperature=cfg.temperature,
                stop_ids=[tokenizer.eot_id],
                pad_id=tokenizer.pad_id,
                seed=hash((cfg.seed, step, 0)) % 2**31,
                kl_coef=kl_coef,
                gamma=cfg.gamma,
                gae_lambda=cfg.gae_lambda,
                score_clip=cfg.score_clip,
                missing_stop_penalty=cfg.missing_stop_penalty,
                batch_size=256,
                score_batch_size=cfg.per_device_train_batch_size,
                sampler=speaker,
                part=(run.rank, run.processes),
                progress=run.poll,
                lap=lap,
            )
        # Every process gets all episodes: what is whitened, drawn and logged is the same, however
        # many there are.
        parts = gather_object([[field.cpu() for field in part]])
        batch = joined(
            [Trajectory(*(field.to(run.device) for field in fields)) for fields in parts]
        )
        try:
            metrics = describe(batch)
        except NonFiniteError as error:
            run.skip(step, error)
            continue
        lap("scoring")
        history.append(metrics)
        factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
        set_learning_rate(optimizer, factor)
        if step < cfg.critic_warmup_steps:
            for group in optimizer.param_groups[:policy_groups]:
                group["lr"] = 0.0
        metrics |= learn(
            run,
            model,
            optimizer,
            batch,
            shards and partial(texts, run, shards, cfg, step),
            tokenizer.eot_id,
            cfg,
            step,
        )
        lap("training")
        metrics |= {"kl_coef": kl_coef, "lr": factor * cfg.learning_rate} | lap.seconds
        if cfg.target_kl:
            kept["kl_coef"] = next_kl_coef(
                kl_coef, metrics["kl"], cfg.target_kl, cfg.kl_horizon, episodes
            )
        bar.update()
        if (step + 1) % cfg.logging_steps == 0 or step + 1 == steps:
            run.log(step + 1, metrics)
            run.log_samples(
                step + 1,
                episode_samples(batch, tokenizer, cfg.samples),
                shown=int((step + 1) % 10 == 0),
            )

    if not history:
        raise Failure(
            f"rl: all {steps} rollouts were left out as not finite; nothing was learned, nothing is published"
        )
    last = history[-max(1, min(5, steps // 4)) :]
    mean = {
        name: sum(row[name] for row in last) / len(last) for name in ("score", "kl", "stop_rate")
    }
    rise = f"score {history[0]['score']:+.2f} -> {mean['score']:+.2f}"
    text = f"{rise} at KL {mean['kl']:.1f} nats, {mean['stop_rate']:.0%} complete"
    stage = run.finish(
        steps,
        (mean["score"] > history[0]["score"], text),
        episodes=steps * episodes,
        data={"skipped": bad.counts},
    )
    with whole(run.accelerator, raw):
        if run.main:
            policy, critic = (
                merged_state(model) if cfg.lora_r else None for model in (raw.policy, raw.critic)
            )
            if cfg.lora_r:
                save_adapter(
                    raw.policy, run.folder / "adapter", cfg.parent, cfg.lora_r, cfg.lora_alpha
                )
            # The critic first: the stage counts as finished from its own manifest on.
            publish(
                run.folder / "critic",
                raw.critic,
                tokenizer,
                {**stage, "kind": "reward"},
                weights=critic,
            )
            publish(run.folder, raw.policy, tokenizer, stage, weights=policy)
    run.forget()


if __name__ == "__main__":
    cli(Config, main)
