"""The PPO stage: RLHF.md's invariants on the real main() with tiny random models, and on learn()
alone."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from common.config.schema import load
from common.handoff.publish import load_model
from common.model.sample import sample
from common.program.errors import InputError
from common.rows.shards import Shards
from common.rows.sources import Row
from common.text.tokenizer import Tokenizer
from common.train import run as run_module
from common.train.optimizers import adamw, parameter_groups
from common.train.run import Run
from stages.rl import learn as learning
from stages.rl import train
from stages.rl.algorithms import ALGORITHMS, ppo
from stages.rl.experience import Experience, describe, rewards
from stages.rl.learn import Texts, learn
from stages.rl.models import ActorCritic, Models
from stages.rl.rollout import Rollout, Sampling, roll_out
from stages.rl.train import Config, main, parse, short_enough

EOT = 7  # an id that separates the documents in these tests' pretraining rows
QUESTIONS = [
    "Name an animal.",
    "What is two plus three?",
    "Hi",
    "The red fox and the blue bird",
    "Is it?",
    "Go on",
    "ok",
    "a",
]


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def talkative(tiny_gpt, tokenizer):
    """talkative(family, ...) -> a policy that ends some answers at once and others never, so that
    lengths are ragged."""

    def make(family="llama", **settings):
        model = tiny_gpt(family, tie_embeddings=False, **settings)
        with torch.no_grad():
            model.head.weight[tokenizer.eot_id] *= 3
        return model

    return make


@pytest.fixture
def setting(tmp_path, talkative, tiny_reward, stage_dir):
    """setting(family, **keys) -> a Config of tiny models and 24 prompts: 8 episodes a rollout, in 2
    x 2 x 2."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{question} {n}"} for n in range(3) for question in QUESTIONS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(family="llama", dropout=0.0, **keys) -> Config:
        defaults = {
            "parent": stage_dir(talkative(family, seed=1, dropout=dropout)),
            "reward_model": stage_dir(tiny_reward(family, seed=2, shift=0.5, dropout=dropout)),
            "train_data": str(prompts),
            "output_dir": str(tmp_path / "rl"),
            "mixed_precision": "no",
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_minibatches": 2,
            "num_ppo_epochs": 2,
            "max_prompt_length": 32,
            "max_new_tokens": 10,
            "temperature": 0.7,
            "learning_rate": 2e-3,
            "samples": 2,
        }
        return Config(**defaults | keys)

    return make


def metrics(cfg: Config) -> list[dict]:
    with open(f"{cfg.output_dir}/metrics.jsonl") as file:  # noqa: PTH123
        return [json.loads(line) for line in file]


def same_weights(one: str, other: str) -> bool:
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


PLACES = {  # where main(), Run, learn() and PPO's loss look up what they call
    "roll_out_together": train,
    "rewards": train,
    "load_models": train,
    "update": run_module,
    "losses": learning,
    "policy_loss": ppo,
    "value_loss": ppo,
}


def spy(monkeypatch, name: str, note) -> None:
    """Let <name> run as it is where it is called, and note(args, result) of each call."""
    real = getattr(PLACES[name], name)

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        note(args, result)
        return result

    monkeypatch.setattr(PLACES[name], name, watched)


@pytest.mark.parametrize(
    ("family", "dropout", "precision"),
    [("llama", 0.0, "no"), ("gpt2", 0.3, "no"), ("llama", 0.0, "bf16")],
)
def test_first_minibatch_of_every_rollout_has_ratio_one(
    family, dropout, precision, setting, monkeypatch
):
    """Invariant 1, at temperature .7, with a parent that was trained with dropout, and in bf16: old
    log-probs are to be taken in the numerics of training, whatever those are."""
    rollouts: list[list] = []  # of each, [log-ratios, result] by micro-batch
    spy(monkeypatch, "roll_out_together", lambda args, result: rollouts.append([]))
    spy(
        monkeypatch,
        "policy_loss",
        lambda args, result: rollouts[-1].append(((args[0] - args[1]).detach(), result)),
    )
    main(setting(family, dropout, mixed_precision=precision))
    assert [len(micro_batches) for micro_batches in rollouts] == [
        8,
        8,
        8,
    ]  # 2 epochs x 2 minibatches x 2 micro-batches
    for micro_batches in rollouts:
        for log_ratio, result in micro_batches[:2]:
            assert log_ratio.exp().tolist() == pytest.approx([1.0] * len(log_ratio), abs=1e-5)
            assert float(result.approx_kl) == pytest.approx(0, abs=1e-6)
            assert int(result.clipped) == 0
    assert (
        max(float(log_ratio.abs().max()) for log_ratio, _ in rollouts[0][2:]) > 1e-2
    )  # and then it learns


def test_without_learning_rate_nothing_moves(setting):
    """Invariant 2, over a whole run."""
    cfg = setting(learning_rate=0.0, weight_decay=0.1)
    main(cfg)
    assert same_weights(cfg.output_dir, cfg.parent)
    assert same_weights(f"{cfg.output_dir}/critic", cfg.reward_model)
    rows = metrics(cfg)
    assert len(rows) == 3
    for row in rows:
        assert row["kl"] == 0
        assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert row["clip_fraction"] == 0
        assert row["grad_norm"] > 0


def test_reference_and_reward_model_stay_as_they_are(setting, monkeypatch):
    """Invariant 6, and that policy and critic do not."""
    loaded, before = [], []

    def note(args, models):
        loaded.extend(models)
        before.extend(copy.deepcopy(model.state_dict()) for model in models)

    spy(monkeypatch, "load_models", note)
    cfg = setting()
    main(cfg)
    for model, state in zip(loaded[1:], before[1:], strict=True):
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not same_weights(cfg.output_dir, cfg.parent)
    assert not same_weights(f"{cfg.output_dir}/critic", cfg.reward_model)
    assert load_model(f"{cfg.output_dir}/critic", "reward").shift == 0.5
    assert any(row["kl"] != 0 for row in metrics(cfg)[1:])


def test_critic_starts_from_the_reward_model(setting):
    cfg = setting()
    model, reference, reward_model = train.load_models(cfg, Run(cfg, "rl", "lm"))
    policy, critic = model.policy.state_dict(), model.critic.state_dict()
    stored = load_model(cfg.reward_model, "reward").state_dict()
    assert critic.keys() == stored.keys()
    assert all(torch.equal(critic[name], stored[name]) for name in stored)
    assert any(not torch.equal(critic[name], policy[name]) for name in critic if name in policy)
    shared = [
        {p.data_ptr() for p in m.parameters()}
        for m in (model.policy, model.critic, reference, reward_model)
    ]
    assert sum(map(len, shared)) == len(set.union(*shared)), (
        "two of the four networks share a tensor"
    )
    assert not any(p.requires_grad for m in (reference, reward_model) for p in m.parameters())


def test_same_seed_same_weights(setting, tmp_path):
    cfgs = [
        setting(output_dir=str(tmp_path / name), max_steps=2, seed=seed)
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    ]
    for cfg in cfgs:
        main(cfg)
    assert same_weights(cfgs[0].output_dir, cfgs[1].output_dir)
    assert not same_weights(cfgs[0].output_dir, cfgs[2].output_dir)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, 40), ({"num_train_epochs": 2}, None), ({"num_train_epochs": 2, "max_steps": 3}, 3)],
)
def test_forty_rollouts_where_nothing_is_said(keys, expected):
    cfg = Config(parent="a", reward_model="b", train_data="c", output_dir="d", **keys)
    assert cfg.max_steps == expected


def test_learning_rate_counts_rollouts(setting, monkeypatch):
    rates: list[tuple[float, float]] = []

    def note(args, result):
        policy, *_, critic = args[2].param_groups
        rates.append((policy["lr"], critic["lr"]))

    spy(monkeypatch, "update", note)
    main(setting(max_steps=5, warmup_steps=1, learning_rate=0.02, critic_learning_rate=0.04))
    updates = 4  # 2 epochs x 2 minibatches
    factors = [
        0.5,
        1.0,
        0.75,
        0.5,
        0.25,
    ]  # half-way up, then linear towards 0 at the sixth rollout that never comes
    assert [policy for policy, _ in rates] == pytest.approx(
        [0.02 * f for f in factors for _ in range(updates)]
    )
    assert [critic for _, critic in rates] == pytest.approx(
        [0.04 * f for f in factors for _ in range(updates)]
    )


def test_critic_warm_up_leaves_the_policy_alone(setting):
    cfg = setting(max_steps=2, critic_warmup_steps=2, weight_decay=0.1)
    main(cfg)
    assert same_weights(cfg.output_dir, cfg.parent)
    assert not same_weights(f"{cfg.output_dir}/critic", cfg.reward_model)
    cfg = setting(max_steps=2, critic_warmup_steps=1)
    main(cfg)
    assert not same_weights(cfg.output_dir, cfg.parent)


def test_adaptive_coefficient_moves_once_a_rollout(setting, monkeypatch):
    used = []
    spy(monkeypatch, "rewards", lambda args, result: used.append(args[1]))
    cfg = setting(max_steps=4, kl_coef=0.2, target_kl=0.5, kl_horizon=80)
    main(cfg)
    rows = metrics(cfg)
    assert [row["kl_coef"] for row in rows] == used
    assert used[0] == 0.2
    assert used[1] == pytest.approx(
        0.2 * (1 - 0.2 * 8 / 80)
    )  # KL starts at 0, 8 episodes a rollout
    for row, now, later in zip(rows, used, used[1:], strict=False):
        error = min(0.2, max(-0.2, row["kl"] / 0.5 - 1))
        assert later == pytest.approx(now * (1 + error * 8 / 80))


@pytest.fixture
def episodes(talkative, tiny_reward, tiny_gpt, tokenizer):
    """(model, experience of 16 ragged episodes)."""
    model = ActorCritic(talkative(seed=1), tiny_reward(seed=2))
    prompts = [tokenizer.encode(f"{question} {n}") for n in range(2) for question in QUESTIONS]
    models = Models(model, model.policy, tiny_gpt(seed=3), tiny_reward(seed=4))
    sampling = Sampling(12, 1.0, [tokenizer.eot_id], tokenizer.pad_id, evaluated_rows=16)
    batch = roll_out(models, prompts, sampling, seed=1)
    assert len(set(batch.mask_BT.sum(1).tolist())) > 3, (
        "lengths must be ragged for these tests to mean anything"
    )
    rewards_BT = rewards(batch, kl_coef=0.1, score_clip=None, missing_stop_penalty=0.0)
    advantages = ppo.gae(rewards_BT, batch.values_BT, batch.mask_BT, 1.0, 0.95)
    return model, Experience(batch, rewards_BT, *advantages)


def taught(setting, episodes, ptx=None, optimizer=None, **keys) -> tuple[ActorCritic, dict]:
    """A copy of the model after learn() on the episodes by gradient descent, and what learn()
    returned."""
    defaults = {
        "temperature": 1.0,
        "num_minibatches": 1,
        "num_ppo_epochs": 1,
        "max_grad_norm": 1e9,
        "vf_coef": 0.5,
    }
    cfg = setting(**defaults | keys)
    model, experience = copy.deepcopy(episodes[0]), episodes[1]
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model)
    )
    return model, learn(Run(cfg, "rl", "lm"), model, optimizer, experience, ptx, cfg, step=0)


def differences(one: torch.nn.Module, other: torch.nn.Module) -> list[float]:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return [float((a - b).detach().abs().max()) for a, b in pairs]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_sixteen_episodes_equal_four_times_four(setting, episodes, kind):
    """Invariant 4: the same weights, though the micro-batches hold different numbers of tokens."""
    make = {
        "sgd": None,
        "adamw": lambda model: adamw(parameter_groups(model.parameters(), 1e-3, 0.0), eps=1e-5),
    }[kind]
    keys = {"num_ppo_epochs": 2, "optimizer": make}
    whole, said = taught(
        setting, episodes, per_device_train_batch_size=16, gradient_accumulation_steps=1, **keys
    )
    parts, said_too = taught(
        setting, episodes, per_device_train_batch_size=4, gradient_accumulation_steps=4, **keys
    )
    moved = differences(whole, episodes[0])
    assert max(moved) > 1e-3
    assert max(differences(whole, parts)) < 5e-3 * max(
        moved
    )  # AdamW makes much of a gradient's last bits
    assert said == pytest.approx(said_too, rel=1e-3, abs=1e-5)


def test_first_update_of_learn(setting, episodes):
    """Invariant 1 once more, without main: one update over all episodes."""
    _, said = taught(setting, episodes)
    assert said["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert said["clip_fraction"] == 0
    assert said["policy_loss"] == pytest.approx(
        0, abs=1e-5
    )  # ratio 1: minus the mean of whitened advantages
    experience, batch = episodes[1], episodes[1].rollout
    mask = batch.mask_BT
    assert said["entropy"] == pytest.approx(float(batch.entropy_BT[mask].mean()), abs=1e-4)
    errors = (experience.returns_BT - batch.values_BT)[mask]
    assert said["value_loss"] == pytest.approx(float((errors**2).mean()) / 2, rel=1e-4)


def test_one_update_is_the_gradient_of_the_mean_over_all_tokens(setting, episodes):
    """The objective written again, unpadded, one episode at a time: (-A ratio + .5 * half squared
    error) / tokens."""
    model, experience = episodes
    batch = experience.rollout
    moved, _ = taught(setting, episodes, per_device_train_batch_size=4)
    raw = experience.advantages_BT[batch.mask_BT].double()
    mean, std = float(raw.mean()), float(raw.std(correction=0))
    expected = copy.deepcopy(model)
    for row in range(16):
        prompt, size = int(batch.prompt_lengths_B[row]), int(batch.mask_BT[row].sum())
        ids = batch.ids_BS[row, : prompt + size]
        logits = expected.policy(ids[None])[0, prompt - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[prompt:, None])[:, 0]
        ratio = (logprobs - batch.logprobs_BT[row, :size]).exp()
        error = (
            expected.critic.values(ids[None])[0, prompt - 1 : -1]
            - experience.returns_BT[row, :size]
        )
        advantages = (experience.advantages_BT[row, :size] - mean) / std
        ((0.25 * error**2 - advantages * ratio).sum() / len(raw)).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert max(differences(moved, model)) > 1e-3
    assert max(differences(moved, expected)) < 1e-5


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(
    setting, episodes, monkeypatch
):
    """Invariant 8; and returns = raw advantages + values."""
    model, experience = episodes
    batch = experience.rollout
    advantages_BT = (experience.advantages_BT * 3 + 40) * batch.mask_BT
    returns_BT = (advantages_BT + batch.values_BT) * batch.mask_BT
    experience = experience._replace(advantages_BT=advantages_BT, returns_BT=returns_BT)
    policy, value = [], []
    spy(monkeypatch, "policy_loss", lambda args, result: policy.append(args[2]))
    spy(monkeypatch, "value_loss", lambda args, result: value.append((args[1], args[2])))
    taught(setting, (model, experience), num_minibatches=4, per_device_train_batch_size=2)
    used = torch.cat(policy).double()
    assert len(used) == int(batch.mask_BT.sum())
    assert len(policy) == 8
    assert float(used.mean()) == pytest.approx(0, abs=1e-4)
    assert float(used.std(correction=0)) == pytest.approx(1, abs=1e-3)
    raw = torch.cat([returns - values for values, returns in value])
    assert float(raw.mean()) == pytest.approx(float(advantages_BT[batch.mask_BT].mean()), rel=1e-4)
    assert float(raw.mean()) > 30
    kept = advantages_BT[batch.mask_BT]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(
        used.float().sort().values, expected.sort().values, atol=2e-3, rtol=2e-3
    )


def test_padding_is_invisible_to_learning(setting, episodes):
    model, experience = episodes
    batch = experience.rollout
    plain, said = taught(setting, episodes, num_ppo_epochs=2, num_minibatches=2)
    hidden, nan = ~batch.mask_BT, float("nan")
    dirty = experience._replace(
        rollout=batch._replace(
            logprobs_BT=batch.logprobs_BT.masked_fill(hidden, nan),
            values_BT=batch.values_BT.masked_fill(hidden, 1e6),
        ),
        advantages_BT=experience.advantages_BT.masked_fill(hidden, nan),
        returns_BT=experience.returns_BT.masked_fill(hidden, -1e6),
    )
    other, said_too = taught(setting, (model, dirty), num_ppo_epochs=2, num_minibatches=2)
    assert max(differences(plain, other)) == 0
    assert said == said_too


def test_epochs_see_every_episode_once_in_new_company(setting, episodes, monkeypatch):
    model, experience = episodes
    marked = experience._replace(rollout=experience.rollout._replace(scores_B=torch.arange(16.0)))
    parts = []
    spy(
        monkeypatch,
        "losses",
        lambda args, result: parts.append(args[1].experience.rollout.scores_B.tolist()),
    )
    taught(
        setting, (model, marked), num_ppo_epochs=3, num_minibatches=2, per_device_train_batch_size=4
    )
    assert len(parts) == 12
    epochs = [parts[i : i + 4] for i in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(x for part in epoch for x in part) == list(range(16))
    assert len({tuple(sorted(epoch[0] + epoch[1])) for epoch in epochs}) == 3


@pytest.mark.parametrize(("approx_kl", "updates", "epochs"), [(0.014, 8, 4), (0.016, 1, 1)])
def test_early_stop_at_one_and_a_half_times_the_target(
    setting, episodes, monkeypatch, approx_kl, updates, epochs
):
    real, count = ppo.policy_loss, []

    def pretend(new, old, advantages, clip_range):
        result = real(new, old, advantages, clip_range)
        return result._replace(approx_kl=torch.tensor(approx_kl * len(new)))

    monkeypatch.setattr(ppo, "policy_loss", pretend)
    spy(monkeypatch, "update", lambda args, result: count.append(1))
    keys = {"num_ppo_epochs": 4, "num_minibatches": 2, "per_device_train_batch_size": 3}
    _, said = taught(setting, episodes, early_stop_kl=0.01, **keys)
    assert (len(count), said["ppo_epochs"]) == (updates, epochs)
    count.clear()
    _, said = taught(setting, episodes, **keys)  # off by default
    assert (len(count), said["ppo_epochs"]) == (8, 4)


def test_early_stop_looks_at_the_newest_update(setting, episodes, monkeypatch):
    """Over two minibatches an epoch approx_kl is 0, .01, .02, ...: the third update is over 1.5 x
    .01, in the second epoch."""
    real, count = ppo.policy_loss, []

    def pretend(new, old, advantages, clip_range):
        result = real(new, old, advantages, clip_range)
        return result._replace(approx_kl=torch.tensor(0.01 * len(count) * len(new)))

    monkeypatch.setattr(ppo, "policy_loss", pretend)
    spy(monkeypatch, "update", lambda args, result: count.append(1))
    keys = {"num_ppo_epochs": 4, "num_minibatches": 2, "per_device_train_batch_size": 8}
    _, said = taught(setting, episodes, early_stop_kl=0.01, **keys)
    assert (len(count), said["ppo_epochs"]) == (3, 2)
    assert said["approx_kl"] == pytest.approx(0.01, abs=0.004)  # the mean of all that were made


@pytest.mark.parametrize("ptx_rows", [8, 6, 5, 3, 1])
def test_ptx_adds_the_mean_loss_over_pretraining_tokens(setting, episodes, ptx_rows):
    """With flat advantages and no value loss, one step of plain descent is -lr * coef * gradient of
    the mean loss."""
    model, experience = episodes
    flat = experience._replace(advantages_BT=torch.zeros_like(experience.advantages_BT))
    tokens = torch.randint(8, 300, (ptx_rows, 13), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = tokens[:, 5] = EOT  # two documents a row, which must not see each other
    ids = tokens[:, :-1]
    texts = Texts(ids, (ids == EOT).cumsum(1), tokens[:, 1:])
    keys = {"vf_coef": 0.0, "ptx_coef": 0.3, "per_device_train_batch_size": 4}
    moved, said = taught(setting, (model, flat), ptx=lambda n: texts, **keys)

    expected = copy.deepcopy(model.policy)
    logits = torch.cat(
        [expected(tokens[:, :5]), expected(tokens[:, 5:-1])], dim=1
    )  # each document alone
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert said["ptx_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    (0.3 * loss).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert max(differences(moved.policy, model.policy)) > 1e-4
    assert max(differences(moved.policy, expected)) < 1e-6
    assert max(differences(moved.critic, model.critic)) == 0


def test_ptx_through_main(setting, tokenizer, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    np.random.default_rng(0).integers(0, 300, 400).astype(np.uint16).tofile(
        shards / "train-00000.bin"
    )
    (shards / "shards.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 300}))
    plain, mixed = (
        setting(
            output_dir=str(tmp_path / name),
            max_steps=1,
            max_length=16,
            ptx_data=data,
            ptx_coef=coef,
        )
        for name, data, coef in (("plain", None, 0.0), ("mixed", str(shards), 1.0))
    )
    for half in ({"ptx_data": str(shards)}, {"ptx_coef": 1.0}):
        with pytest.raises(InputError, match="PTX needs both"):
            main(setting(**half))
    with pytest.raises(InputError, match="its ids are not those of"):
        other = tmp_path / "other"
        other.mkdir()
        Tokenizer.train_bpe(["other words"], 261).save(other)
        for file in shards.iterdir():
            shutil.copy(file, other)
        main(setting(max_length=16, ptx_data=str(other), ptx_coef=1.0))
    tokenizer.save(shards)
    seen = []
    real = Shards.batch
    monkeypatch.setattr(Shards, "batch", lambda self, *at: (seen.append(at), real(self, *at))[1])
    main(plain)
    main(mixed)
    assert not same_weights(plain.output_dir, mixed.output_dir)
    assert seen == [(0, 16 * n, 16) for n in range(4)]  # new rows for each of the 2 x 2 updates
    assert metrics(mixed)[0]["ptx_loss"] > 0
    assert "ptx_loss" not in metrics(plain)[0]


def test_describe_counts_episodes_and_real_tokens(setting):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    reference = torch.tensor([[-2.0, -2.5, -2.0], [-4.0, 0.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    rewards_BT = torch.tensor([[0.0, -1.0, 3.0], [5.0, 0.0, 0.0]])
    ids, ones = torch.zeros(2, 5, dtype=torch.long), torch.tensor([2, 2])
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    scores, stopped = torch.tensor([3.0, 6.0]), torch.tensor([True, False])
    batch = Rollout(ids, ones, mask, logprobs, reference, entropy, values, scores, stopped)
    # Errors 0, 0, 0, 2: variance 3/4; that of the returns is 7/2.
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
    said = describe(Experience(batch, rewards_BT, rewards_BT, returns))
    assert said["score"] == 4.5
    assert said["reward"] == 3.5
    assert said["kl"] == pytest.approx((1 + 0.5 - 1 + 3) / 2)  # nats an episode
    assert said["length"] == 2
    assert said["stop_rate"] == 0.5
    assert said["rollout_entropy"] == pytest.approx(2.5)
    assert said["explained_variance"] == pytest.approx(1 - 0.75 / 3.5)


def test_published_directory_and_logs(setting, tokenizer):
    cfg = setting(missing_stop_penalty=1.5)
    main(cfg)
    stage = json.loads(open(f"{cfg.output_dir}/stage.json").read())  # noqa: PTH123, SIM115
    assert (stage["stage"], stage["kind"], stage["step"], stage["episodes"]) == ("rl", "lm", 3, 24)
    assert stage["parent"] == cfg.parent
    row = metrics(cfg)[-1]
    wanted = {
        "score",
        "reward",
        "kl",
        "kl_coef",
        "entropy",
        "clip_fraction",
        "approx_kl",
        "explained_variance",
        "length",
        "stop_rate",
        "policy_loss",
        "value_loss",
        "grad_norm",
        "lr",
    }
    assert wanted <= row.keys()
    assert all(math.isfinite(value) for value in row.values())
    with open(f"{cfg.output_dir}/samples.jsonl") as file:  # noqa: PTH123
        samples = [json.loads(line) for line in file]
    assert len(samples) == 6
    assert {"step", "prompt", "answer", "score", "kl", "stopped"} <= samples[0].keys()


TOY = SimpleNamespace(
    NEEDS_CRITIC=False,
    WHITENS_ADVANTAGES=False,
    advantages=lambda rewards_BT, values_BT, mask_BT, cfg: (rewards_BT * mask_BT,) * 2,
    loss=lambda tokens, cfg: (
        -(tokens.advantages_N * tokens.logprobs_N).sum(),
        {"surprise": -tokens.logprobs_N.detach().sum(), "approx_kl": torch.zeros(())},
    ),
)


def test_each_judge_is_placed_before_the_next_model_is_read(setting, monkeypatch):
    """Host memory need not hold all four at once."""
    cfg, events, read, place = setting(), [], train.load_model, train.frozen
    monkeypatch.setattr(train, "load_model", lambda *of: events.append(of[1]) or read(*of))
    monkeypatch.setattr(train, "frozen", lambda *of: events.append("placed") or place(*of))
    train.load_models(cfg, Run(cfg, "rl", "lm"))
    assert events == ["lm", "placed", "reward", "placed", "lm", "reward"]


@pytest.mark.parametrize("lora_r", [0, 2])
def test_an_algorithm_without_a_critic(setting, tokenizer, tmp_path, monkeypatch, lora_r):
    """Another in PPO's place: its own statistics, and no critic loaded, trained or published."""
    monkeypatch.setitem(ALGORITHMS, "ppo", TOY)
    cfg = setting(lora_r=lora_r, max_steps=2, learning_rate=0.02)
    main(cfg)
    assert not same_weights(cfg.output_dir, cfg.parent)
    assert not (tmp_path / "rl" / "critic").exists()
    row = metrics(cfg)[-1]
    assert row["surprise"] > 0 and not {"policy_loss", "value_loss", "clip_fraction"} & row.keys()
    for key in ("critic", "critic_learning_rate", "critic_warmup_steps"):
        value = cfg.reward_model if key == "critic" else 1
        with pytest.raises(InputError, match=f"{key} .*: ppo has no critic"):
            main(setting(**{key: value}))


def test_advantages_that_are_not_whitened_are_used_as_they_are(setting, episodes, monkeypatch):
    experience = episodes[1]
    monkeypatch.setattr(ppo, "WHITENS_ADVANTAGES", False)
    used = []
    spy(monkeypatch, "policy_loss", lambda args, result: used.append(args[2]))
    taught(setting, episodes, num_minibatches=1, per_device_train_batch_size=16)
    raw = experience.advantages_BT[experience.rollout.mask_BT]
    torch.testing.assert_close(used[0].sort().values, raw.sort().values)


def test_lora_trains_adapters_and_publishes_the_sum(setting):
    cfg = setting(lora_r=2, max_steps=2, learning_rate=0.05)
    main(cfg)
    adapter = load_file(f"{cfg.output_dir}/adapter/adapter_model.safetensors")
    a, b = (
        load_file(f"{cfg.parent}/model.safetensors"),
        load_file(f"{cfg.output_dir}/model.safetensors"),
    )
    assert a.keys() == b.keys()
    changed = {name.split(".")[-2] for name in a if not torch.equal(a[name], b[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    key = "model.layers.0.mlp.down_proj"
    low = (adapter[f"base_model.model.{key}.lora_{side}.weight"] for side in "BA")
    delta = (16 / 2) * torch.mm(*low)  # lora_alpha / lora_r
    torch.testing.assert_close(b[f"{key}.weight"] - a[f"{key}.weight"], delta, atol=1e-5, rtol=1e-4)


def test_rollout_batch_size_is_memory_alone(setting, tmp_path, monkeypatch):
    sizes, said = [], []

    def noted(*words, batch_size, **settings):
        sizes.append(batch_size)
        return sample(*words, batch_size=batch_size, **settings)

    monkeypatch.setattr("stages.rl.rollout.sample", noted)
    for size in (3, 256):
        folder = tmp_path / str(size)
        cfg = setting(rollout_batch_size=size, max_steps=1, samples=8, output_dir=str(folder))
        main(cfg)
        said.append((folder / "samples.jsonl").read_text())
    assert sizes == [3, 256] and Config.__pydantic_fields__["rollout_batch_size"].default == 256
    answers = [[json.loads(line)["answer"] for line in text.splitlines()] for text in said]
    assert len(answers[0]) == 8 and answers[0] == answers[1]


def test_long_prompts_are_counted(tokenizer):
    rows = [
        Row({"prompt": "Hi"}, "p.jsonl:1"),
        Row({"prompt": "Name an animal. " * 9}, "p.jsonl:2"),
    ]
    rows = [row._replace(parsed=parse(tokenizer, row.data)) for row in rows]
    kept, left_out = short_enough(rows, 20)
    assert kept == [
        [tokenizer.role_ids["user"], *tokenizer.encode("Hi"), tokenizer.role_ids["assistant"]]
    ]
    assert left_out == 1
    assert short_enough(rows, len(rows[1].parsed))[1] == 0  # it just fits
    with pytest.raises(
        InputError, match=r"p\.jsonl:1: this and all 2 prompts are longer than max_prompt_length 2"
    ):
        short_enough(rows, 2)


def test_mistakes_are_told_before_anything_is_trained(setting, stage_dir, tiny_gpt):
    with pytest.raises(InputError, match="context is 64"):
        main(setting(max_new_tokens=40))
    with pytest.raises(InputError, match="has 24"):
        main(setting(per_device_train_batch_size=16))
    with pytest.raises(InputError, match="vocabular"):
        main(setting(reference=stage_dir(tiny_gpt(vocab_size=301))))
    with pytest.raises(InputError, match="reward model"):
        main(setting(reward_model=stage_dir(tiny_gpt())))
    given = ["--parent", "a", "--reward_model", "b", "--train_data", "c", "--output_dir", "d"]
    with pytest.raises(InputError, match="lr_scheduler_type"):
        load(Config, [*given, "--lr_scheduler_type", "linaer"])
    assert load(Config, given).lr_scheduler_type == "linear"
