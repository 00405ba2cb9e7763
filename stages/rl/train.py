"""PPO: improve the assistant by the reward model's scores, tied to the SFT model by a KL penalty.

    accelerate launch -m stages.rl.train --config configs/demo/rl.yaml

One step is: sample answers to a batch of prompts (the rollout); score them, and take a KL penalty
off at every token (the rewards); tell how much better than expected each token was (the
advantages); a few epochs of updates. Policy and critic are separate networks: the policy starts
from the SFT model, the critic from the reward model (Stiennon 2020, InstructGPT). The maths of the
algorithms is in stages/rl/algorithms/, what they share in stages/rl/maths.py.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

if not __package__:  # run as a file, for which Python looks for modules in its folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.config.schema import InputPath, RowsPath, cli, fingerprint, stage_config
from common.config.training import (
    NonNegative,
    Positive,
    ReadsRows,
    SchedulerType,
    TrainConfig,
)
from common.handoff.locate import lineage, load_tokenizer
from common.handoff.publish import Kind, check_context, load_config, load_model
from common.handoff.report import Gate
from common.model.lora import add_lora
from common.program.errors import Failure, InputError
from common.rows.batches import Order
from common.rows.shards import Shards
from common.rows.sources import BadRows, Row, read_rows
from common.text.chat import prompt_ids, rows_to_prompt
from common.text.tokenizer import Tokenizer, same_ids
from common.train.log import Laps
from common.train.optimizers import adamw, parameter_groups, schedule, set_learning_rate, steps_for
from common.train.placement import frozen, sampler
from common.train.run import Run
from common.train.update import NonFiniteError
from stages.rl.algorithms import ALGORITHMS
from stages.rl.experience import Experience, describe, episode_samples, rewards
from stages.rl.learn import LearnConfig, Texts, learn
from stages.rl.maths import next_kl_coef
from stages.rl.models import ActorCritic, Models
from stages.rl.rollout import ROLLOUT_ROWS, Sampling, roll_out_together

# What a line on the terminal shows of a rollout; metrics.jsonl has every figure.
SHOWN = ("score", "kl", "stop_rate", "length", "rollout_entropy", "explained_variance")


@stage_config
class Config(ReadsRows, LearnConfig):
    """Improve an assistant by reinforcement learning."""

    parent: InputPath
    """The policy to start from: the SFT model."""
    reference: InputPath | None = None
    """The model that KL is measured from; null = parent."""
    reward_model: InputPath
    """Directory of the reward model."""
    critic: InputPath | None = None
    """Directory that the critic starts from; null = the reward model."""
    train_data: RowsPath
    """Prompts: rows with `prompt`, or SFT rows whose answers are ignored."""
    max_prompt_length: Positive = 96
    """Longer prompts are left out, and counted."""
    max_new_tokens: Positive = 80
    """Longest answer."""
    rollout_batch_size: Positive = ROLLOUT_ROWS
    """Answers sampled at once on one process, at most: fewer need less memory. What is sampled does
    not depend on it."""
    max_steps: Positive | None = None
    """Number of rollouts; wins over num_train_epochs. Without either 40. Schedule and warm-up count
    rollouts too."""
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
    score_clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Scores are clipped to +- this, after the shift; null = off."""
    missing_stop_penalty: NonNegative = 1.0
    """Taken off the score of an answer that was cut off."""
    ptx_data: InputPath | None = None
    """Shards whose language-model loss is mixed in (InstructGPT's PPO-ptx)."""
    logging_steps: Positive = 1
    """Rollouts between two lines of metrics."""
    save_steps: Positive | None = 10
    """Rollouts between two saves of what a resume needs (null: only when told to stop)."""
    samples: Annotated[int, Field(ge=0)] = 16
    """Episodes of each rollout kept in samples.jsonl."""

    def __post_init__(self) -> None:
        """Without max_steps and num_train_epochs 40 rollouts are made."""
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "max_steps", 40)  # the one way to fill in a frozen dataclass
        TrainConfig.__post_init__(self)


def check_keys(cfg: Config) -> None:
    """InputError for keys that do not fit together."""
    if bool(cfg.ptx_data) != (cfg.ptx_coef > 0):
        raise InputError(
            f"ptx_data {cfg.ptx_data}, ptx_coef {cfg.ptx_coef}: PTX needs both, or neither"
        )
    if cfg.eval_steps:
        raise InputError(
            f"eval_steps {cfg.eval_steps}: rl evaluates on its own rollouts; "
            "tools.compare judges the result"
        )
    critics = ("critic", "critic_learning_rate", "critic_warmup_steps")
    given = [f"{key} {value}" for key in critics if (value := getattr(cfg, key))]
    if given and not ALGORITHMS[cfg.algorithm].NEEDS_CRITIC:
        raise InputError(f"{', '.join(given)}: {cfg.algorithm} has no critic; leave it out")


def sources(cfg: Config) -> dict[str, tuple[str, Kind]]:
    """Directory and kind of each model by its role."""
    found: dict[str, tuple[str, Kind]] = {"policy": (cfg.parent, "lm")}
    if ALGORITHMS[cfg.algorithm].NEEDS_CRITIC:
        found["critic"] = (cfg.critic or cfg.reward_model, "reward")
    return found | {
        "reference": (cfg.reference or cfg.parent, "lm"),
        "reward model": (cfg.reward_model, "reward"),
    }


def check_models(cfg: Config) -> None:
    """InputError for models that do not fit together, before any weights are read."""
    needed, key = cfg.max_prompt_length + cfg.max_new_tokens, "max_prompt_length + max_new_tokens"
    for name, kind in sources(cfg).values():
        check_context(name, kind, needed, key)
        if not same_ids(load_tokenizer(name), load_tokenizer(cfg.parent)):
            raise InputError(
                f"{name}: its tokenizer is not that of {cfg.parent}; "
                "policy, reward model and critic must share one"
            )
    if cfg.ptx_data:
        check_context(cfg.parent, "lm", cfg.max_length, "max_length")
    sizes = {role: load_config(name).vocab_size for role, (name, _) in sources(cfg).items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{role} {size}" for role, size in sizes.items())
        raise InputError(f"vocabularies differ: {told}; use models of one lineage")
    if sizes["policy"] < load_tokenizer(cfg.parent).vocab_size:
        raise InputError(
            f"{cfg.parent}: its embeddings lack our control tokens; "
            "start from a model that went through stages.sft"
        )


def load_models(cfg: Config, run: Run) -> tuple[ActorCritic, nn.Module, nn.Module]:
    """(policy and critic, frozen reference, frozen reward model).

    Policy and critic have adapters where the config asks for LoRA. Raises InputError when the
    models do not fit together.
    """
    check_models(cfg)
    named = sources(cfg)
    # Each goes to its device before the next is read: host memory need not hold all four at once.
    judges = [
        frozen(run.accelerator, load_model(*named.pop(role)))
        for role in ("reference", "reward model")
    ]
    loaded = {role: load_model(name, kind) for role, (name, kind) in named.items()}
    model = ActorCritic(loaded["policy"], loaded.get("critic"))
    if cfg.lora_r:
        for module in model.children():
            add_lora(module, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets)
    return model, *judges


def parse(tokenizer: Tokenizer, row: dict[str, Any]) -> list[int]:
    """Ids of the prompt of a row."""
    return prompt_ids(tokenizer, rows_to_prompt(row))


def short_enough(rows: Sequence[Row], max_prompt_length: int) -> tuple[list[list[int]], int]:
    """Ids of the prompts of parsed rows, and how many were left out as too long.

    Raises InputError when all are.
    """
    kept = [row.parsed for row in rows if len(row.parsed) <= max_prompt_length]
    if not kept:
        all_of = f"{rows[0].origin}: this and all {len(rows)} prompts"
        raise InputError(f"{all_of} are longer than max_prompt_length {max_prompt_length}")
    return kept, len(rows) - len(kept)


def read_prompts(
    cfg: Config, run: Run, tokenizer: Tokenizer, episodes: int
) -> tuple[list[list[int]], dict[str, int]]:
    """(ids of the prompts, how many bad rows were skipped by reason).

    Raises InputError when there are fewer prompts than the `episodes` of one rollout.
    """
    bad = BadRows(cfg.on_bad_row)
    rows = read_rows(cfg.train_data, partial(parse, tokenizer), bad)
    prompts, long = short_enough(rows, cfg.max_prompt_length)
    limit = cfg.max_prompt_length
    run.say(f"{len(prompts):,} prompts, {long} left out as longer than {limit} tokens")
    if episodes > len(prompts):
        raise InputError(
            f"a rollout takes {episodes} prompts, {cfg.train_data} has {len(prompts)}: "
            "use smaller batches"
        )
    return prompts, bad.counts


def open_shards(cfg: Config, tokenizer: Tokenizer) -> Shards | None:
    """The pretraining text for PTX; None without it. Raises InputError for another tokenizer's."""
    if not cfg.ptx_data:
        return None
    shards = Shards(cfg.ptx_data, "train", cfg.max_length)
    if not same_ids(load_tokenizer(cfg.ptx_data), tokenizer):
        raise InputError(
            f"ptx_data {cfg.ptx_data}: its ids are not those of {cfg.parent}; "
            "prepare it with that tokenizer"
        )
    return shards


def read_texts(run: Run, cfg: Config, shards: Shards, eot_id: int, step: int, update: int) -> Texts:
    """This process's pretraining text for one update of a rollout: a pure function of the numbers
    of both."""
    rows, updates = cfg.ptx_batch_size, cfg.num_ppo_epochs * cfg.num_minibatches
    first = ((step * updates + update) * run.processes + run.rank) * rows
    tokens = shards.batch(cfg.seed, first, rows).to(run.device)
    ids = tokens[:, :-1]
    return Texts(ids, documents_RL=(ids == eot_id).cumsum(1), targets_RL=tokens[:, 1:])


def data_hash(cfg: Config, prompts: list[list[int]], shards: Shards | None) -> str:
    """Fingerprint of all that a resumed run must find as it was, beside config and parent."""
    models = [
        lineage(path).get("parent_hash") for path in (cfg.reference, cfg.reward_model, cfg.critic)
    ]
    return fingerprint([prompts, shards and shards.meta, models])


def make_optimizer(cfg: Config, model: ActorCritic) -> torch.optim.Optimizer:
    """AdamW over policy and critic, each with its own peak learning rate."""
    own = cfg.critic_learning_rate
    rates = {"policy": cfg.learning_rate, "critic": cfg.learning_rate if own is None else own}
    groups = []
    for role, module in model.named_children():
        for group in parameter_groups(module.parameters(), rates[role], cfg.weight_decay):
            groups.append(group | {"role": role})
    return adamw(groups, cfg.adam_beta2, cfg.adam_eps)


def set_learning_rates(
    cfg: Config, optimizer: torch.optim.Optimizer, step: int, steps: int
) -> float:
    """Set those of rollout number `step` (from 0); returns the factor on their peaks.

    The policy's are 0 while only the critic learns.
    """
    factor = schedule(cfg.lr_scheduler_type, step, steps, cfg.warmup_steps, cfg.min_lr_ratio)
    set_learning_rate(optimizer, factor)
    for group in optimizer.param_groups:
        if group["role"] == "policy" and step < cfg.critic_warmup_steps:
            group["lr"] = 0.0
    return factor


def judge(history: Sequence[Mapping[str, float]], steps: int) -> Gate:
    """Whether the score rose, and from what to what; its end is the mean of the last rollouts.

    Raises Failure when nothing was learned.
    """
    if not history:
        raise Failure(
            f"rl: all {steps} rollouts were left out as not finite; "
            "nothing was learned, nothing is published"
        )
    last = history[-max(1, min(5, steps // 4)) :]
    score, kl, stop_rate = (
        sum(row[name] for row in last) / len(last) for name in ("score", "kl", "stop_rate")
    )
    first = history[0]["score"]
    rise = f"score {first:+.2f} -> {score:+.2f}"
    return Gate(score > first, f"{rise} at KL {kl:.1f} nats, {stop_rate:.0%} complete")


def main(cfg: Config) -> None:
    """The recipe. Each step: prompts, rollout, rewards, advantages, update, log."""
    check_keys(cfg)
    run = Run(cfg, "rl", "lm")
    algorithm, tokenizer = ALGORITHMS[cfg.algorithm], load_tokenizer(cfg.parent)
    raw, reference, reward_model = load_models(cfg, run)
    episodes = run.global_batch * cfg.num_minibatches  # of a rollout
    prompts, skipped = read_prompts(cfg, run, tokenizer, episodes)
    shards = open_shards(cfg, tokenizer)
    order = Order([1] * len(prompts), episodes, cfg.seed, drop_last=True)
    steps = steps_for(cfg.max_steps, cfg.num_train_epochs, order.per_epoch * episodes, episodes)
    model, optimizer = run.prepare(raw, make_optimizer(cfg, raw))
    model.eval()  # no dropout in RL: old log-probs must be those that training computes
    sampling = Sampling(
        cfg.max_new_tokens,
        cfg.temperature,
        stop_ids=[tokenizer.eot_id],
        pad_id=tokenizer.pad_id,
        evaluated_rows=cfg.per_device_train_batch_size,
        sampled_rows=cfg.rollout_batch_size,
    )
    data = data_hash(cfg, prompts, shards)
    first_step, kept = run.start_or_resume(raw, optimizer, data, kl_coef=cfg.kl_coef, history=[])
    bar, policy = run.progress(steps, first_step, unit="rollout"), None
    for step in range(first_step, steps + 1):
        run.checkpoint(step, kept)
        if step == steps:
            break
        lap, kl_coef = Laps(), kept["kl_coef"]
        chosen = [prompts[row] for row in order.rows(step)]
        policy = sampler(run.accelerator, raw.policy, run.dtype, policy)
        models = Models(model, policy, reference, reward_model)
        seed = hash((cfg.seed, step, 0)) % 2**31
        rollout = roll_out_together(run, models, chosen, sampling, seed, lap)
        rewards_BT = rewards(rollout, kl_coef, cfg.score_clip, cfg.missing_stop_penalty)
        advantages = algorithm.advantages(rewards_BT, rollout.values_BT, rollout.mask_BT, cfg)
        experience = Experience(rollout, rewards_BT, *advantages)
        try:
            metrics = describe(experience)
        except NonFiniteError as error:
            run.skip(step, error)
            continue
        lap("scoring")
        factor = set_learning_rates(cfg, optimizer, step, steps)
        texts = partial(read_texts, run, cfg, shards, tokenizer.eot_id, step) if shards else None
        metrics |= learn(run, model, optimizer, experience, texts, cfg, step)
        lap("training")
        metrics |= {"kl_coef": kl_coef, "lr": factor * cfg.learning_rate} | lap.seconds
        kept["history"].append(metrics)
        if cfg.target_kl:
            kept["kl_coef"] = next_kl_coef(
                kl_coef, metrics["kl"], cfg.target_kl, cfg.kl_horizon, episodes
            )
        bar.update()
        if (step + 1) % cfg.logging_steps == 0 or step + 1 == steps:
            run.log(step + 1, metrics, shown=SHOWN)
            samples = episode_samples(rollout, tokenizer, cfg.samples)
            run.log_samples(step + 1, samples, shown=int((step + 1) % 10 == 0))
    facts = {"episodes": steps * episodes, "data": {"skipped": skipped}}
    run.publish(steps, judge(kept["history"], steps), tokenizer, raw.policy, raw.critic, **facts)


if __name__ == "__main__":
    cli(Config, main)
