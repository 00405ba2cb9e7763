"""Whole runs of main() against the same runs written out in plain PyTorch, one unpadded answer at a
time: whatever key does not get to the maths shows in the weights."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.handoff.publish import load_model
from common.rows.shards import Shards
from common.text.chat import prompt_ids
from stages.rl import learn as learning
from stages.rl import train
from stages.rl.train import Config, main
from tests import by_hand

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WORDS = ["Name an animal.", "Hi", "The red fox and the blue bird", "Is it?", "Go on", "a"]
# None of them at its default, and each so that it acts. An update is of 2 episodes.
KEYS = {
    "gamma": 0.9,
    "gae_lambda": 0.6,
    "clip_range": 0.05,
    "clip_range_value": 0.02,
    "vf_coef": 0.3,
    "kl_coef": 0.3,
    "target_kl": 10.0,
    "kl_horizon": 40,
    "missing_stop_penalty": 0.7,
    "score_clip": 0.3,
    "temperature": 0.8,
    "num_ppo_epochs": 3,
    "num_minibatches": 3,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "cosine",
    "critic_learning_rate": 3e-3,
    "critic_warmup_steps": 1,
    "adam_eps": 1e-3,
    "ptx_coef": 0.4,
    "ptx_batch_size": 3,
    "max_length": 12,
    "max_new_tokens": 7,
    "max_prompt_length": 32,
}
EPISODES, UPDATES, EOT = 6, 9, 295  # of a rollout; the id of <|endoftext|>
FACTORS = (0.5, 1.0, 0.85, 0.55)  # half-way up; then a cosine towards .4: .4 + .6 (.75, .25)


@pytest.fixture
def models(tiny_gpt, tiny_reward, stage_dir, tokenizer):
    """Directories of four different models; the policy ends some of its answers."""
    policy = tiny_gpt(seed=1, tie_embeddings=False)
    with torch.no_grad():
        policy.head.weight[tokenizer.eot_id] *= 3
    assert tokenizer.eot_id == EOT
    return {
        "parent": stage_dir(policy),
        "reference": stage_dir(tiny_gpt(seed=3)),
        "reward_model": stage_dir(tiny_reward(seed=2, shift=0.1)),
        "critic": stage_dir(tiny_reward(seed=4, shift=0.3)),
    }


@pytest.fixture
def ptx_data(tokenizer, tmp_path):
    folder = tmp_path / "shards"
    tokenizer.save(folder)
    tokens = np.random.default_rng(0).integers(0, 290, 2000).astype(np.uint16)
    tokens[::7] = EOT
    tokens.tofile(folder / "train-00000.bin")
    (folder / "shards.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 300}))
    return str(folder)


@pytest.fixture
def setting(models, tmp_path):
    """setting(**keys) -> a Config over 24 prompts."""
    rows = [{"prompt": f"{word} {n}"} for n in range(4) for word in WORDS]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**keys) -> Config:
        given = {"train_data": str(file), "output_dir": str(tmp_path / "rl")}
        return Config(**models | given | {"mixed_precision": "no", "samples": 0} | keys)

    return make


def rows_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


class Run:
    """What main() drew: the ids of its rollouts, the order of its minibatches, its text."""

    def __init__(self, monkeypatch) -> None:
        self.rollouts, self.minibatches, self.texts = [], [], []
        roll_out, order, batch = train.roll_out_together, learning.minibatches, Shards.batch

        def rolled(*args):
            self.rollouts.append(roll_out(*args))
            return self.rollouts[-1]

        def ordered(*args):
            for rows in order(*args):
                self.minibatches.append(rows)
                yield rows

        def read(shards, *place):
            self.texts.append((place, batch(shards, *place)))
            return self.texts[-1][1]

        monkeypatch.setattr(train, "roll_out_together", rolled)
        monkeypatch.setattr(learning, "minibatches", ordered)
        monkeypatch.setattr(Shards, "batch", read)


class Answer:
    """One answer, and what the models said of it at the time of the rollout."""

    def __init__(self, rollout, row, models, kl_coef):
        policy, critic, reference, reward_model = models
        self.start = int(rollout.prompt_lengths_B[row])
        self.size = int(rollout.mask_BT[row].sum())
        self.ids = rollout.ids_BS[row, : self.start + self.size].tolist()
        self.stopped = self.ids[-1] == EOT
        assert self.stopped == bool(rollout.stopped_B[row]) and EOT not in self.ids[self.start : -1]
        with torch.no_grad():
            self.old, self.values = self.logprobs(policy), self.valued(critic)
            score = float(reward_model.values(torch.tensor([self.ids]))[0, -1])
            self.kl = self.old - self.logprobs(reference)
        self.score = score
        clip, penalty = KEYS["score_clip"], KEYS["missing_stop_penalty"]
        rewards = [-kl_coef * float(kl) for kl in self.kl]
        rewards[-1] += min(clip, max(-clip, score)) - (0 if self.stopped else penalty)
        self.reward = sum(rewards)
        after = [*self.values.tolist()[1:], 0.0]
        gamma, decay = KEYS["gamma"], KEYS["gamma"] * KEYS["gae_lambda"]
        deltas = [
            r + gamma * b - a for r, a, b in zip(rewards, self.values.tolist(), after, strict=True)
        ]
        self.advantages = torch.tensor(
            [
                sum(decay ** (i - t) * deltas[i] for i in range(t, self.size))
                for t in range(self.size)
            ]
        )
        self.returns = self.advantages + self.values

    def logprobs(self, model):
        return by_hand.logprobs(model, self.ids, KEYS["temperature"])[self.start - 1 :]

    def valued(self, critic):
        return critic.values(torch.tensor([self.ids[:-1]]))[0, self.start - 1 :]

    def loss(self, policy, critic, mean, std):
        """Summed over the answer's tokens."""
        ratio, advantages = (self.logprobs(policy) - self.old).exp(), (self.advantages - mean) / std
        clip, held = KEYS["clip_range"], KEYS["clip_range_value"]
        worse = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
        values = self.valued(critic)
        near = torch.min(torch.max(values, self.values - held), self.values + held)
        errors = torch.max((values - self.returns) ** 2, (near - self.returns) ** 2)
        return (KEYS["vf_coef"] * errors / 2 - worse).sum()


def text_loss(policy, tokens):
    """Mean over the tokens of rows of text; each document alone."""
    terms = []
    for row in tokens.tolist():
        starts = [0, *(n for n in range(1, len(row) - 1) if row[n] == EOT), len(row) - 1]
        for start, end in itertools.pairwise(starts):
            terms.append(by_hand.logprobs(policy, row[start : end + 1]))
    return -torch.cat(terms).mean()


def test_a_whole_run_is_that_written_out_by_hand(setting, ptx_data, monkeypatch):
    cfg, run = setting(ptx_data=ptx_data, **by_hand.KEYS | KEYS), Run(monkeypatch)
    main(cfg)
    kinds = {"parent": "lm", "critic": "reward", "reference": "lm", "reward_model": "reward"}
    models = [load_model(getattr(cfg, key), kind) for key, kind in kinds.items()]
    policy, critic = models[:2]
    starts = copy.deepcopy(policy), copy.deepcopy(critic)
    optimizer = by_hand.AdamW(
        {policy: cfg.learning_rate, critic: KEYS["critic_learning_rate"]},
        by_hand.KEYS["adam_beta2"],
        by_hand.KEYS["weight_decay"],
        KEYS["adam_eps"],
    )
    kl_coef, minibatches, texts = KEYS["kl_coef"], iter(run.minibatches), iter(run.texts)
    seen, clipped, lengths = [], 0, set()
    assert len(run.rollouts) == 4 and len(run.minibatches) == 4 * UPDATES
    for step, rollout in enumerate(run.rollouts):
        answers = [Answer(rollout, row, models, kl_coef) for row in range(len(rollout.ids_BS))]
        assert len(answers) == EPISODES
        seen += [(answer.stopped, abs(answer.score) > KEYS["score_clip"]) for answer in answers]
        lengths |= {answer.size for answer in answers}
        advantages = torch.cat([answer.advantages for answer in answers])
        mean, std = advantages.mean(), advantages.std(correction=0)
        said = rows_of(cfg.output_dir)[step]
        kl = sum(float(answer.kl.sum()) for answer in answers) / EPISODES
        expected = {
            "kl": kl,
            "kl_coef": kl_coef,
            "score": sum(answer.score for answer in answers) / EPISODES,
            "reward": sum(answer.reward for answer in answers) / EPISODES,
        }
        assert {name: said[name] for name in expected} == pytest.approx(
            expected, rel=1e-3, abs=1e-4
        )
        epochs = [[next(minibatches) for _ in range(3)] for _ in range(3)]
        for epoch in epochs:
            assert sorted(row for rows in epoch for row in rows) == list(range(EPISODES))
        norms = []
        for rows in (rows for epoch in epochs for rows in epoch):
            chosen = [answers[row] for row in rows]
            tokens = sum(answer.size for answer in chosen)
            loss = sum(answer.loss(policy, critic, mean, std) for answer in chosen) / tokens
            loss = loss + KEYS["ptx_coef"] * text_loss(policy, next(texts)[1])
            factor = FACTORS[step]
            factors = {policy: 0.0 if step == 0 else factor, critic: factor}
            norms.append(optimizer.step(loss, factors, by_hand.KEYS["max_grad_norm"]))
        assert said["grad_norm"] == pytest.approx(sum(norms) / UPDATES, rel=1e-3)
        clipped += said["clip_fraction"] > 0
        error = max(-0.2, min(0.2, kl / KEYS["target_kl"] - 1))
        assert abs(error) < 0.2  # the target matters, not the clip alone
        kl_coef *= 1 + error * EPISODES / KEYS["kl_horizon"]
    assert by_hand.apart(policy, cfg.output_dir, starts[0]) < 1e-3
    assert by_hand.apart(critic, f"{cfg.output_dir}/critic", starts[1]) < 1e-3
    # Every row of text once, and each of the keys had something to act on.
    assert [place for place, _ in run.texts] == [(3, 3 * n, 3) for n in range(4 * UPDATES)]
    assert len({stopped for stopped, _ in seen}) == len({loud for _, loud in seen}) == 2
    assert clipped and max(lengths) == KEYS["max_new_tokens"]
    rollouts = [run.minibatches[n * UPDATES : (n + 1) * UPDATES] for n in range(3)]
    assert rollouts[0] != rollouts[1] != rollouts[2], "minibatches alike in every rollout"


def test_gradients_are_not_clipped_below_the_norm_of_the_config(setting, monkeypatch):
    """With plain descent in AdamW's place the length of a step is that of the clipped gradient."""
    lengths = []
    for norm in (0.05, 0.1):
        monkeypatch.setattr(train, "adamw", lambda groups, *_: descent(groups))
        folder = f"{setting().output_dir}{norm}"
        cfg = setting(output_dir=folder, max_steps=1, max_grad_norm=norm, **ONE_UPDATE)
        main(cfg)
        pairs = ((cfg.parent, folder, "lm"), (cfg.critic, f"{folder}/critic", "reward"))
        moved = [by_hand.distance(load_model(a, kind), load_model(b, kind)) for a, b, kind in pairs]
        lengths.append(math.hypot(*moved))
    assert lengths == pytest.approx([0.05, 0.1], rel=1e-2)


ONE_UPDATE = {
    "learning_rate": 1.0,
    "num_minibatches": 1,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 6,
    "max_new_tokens": 7,
    "max_prompt_length": 32,
}


def descent(groups: list[dict]) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([{"params": group["params"], "lr": 1.0} for group in groups])
    for made, group in zip(optimizer.param_groups, groups, strict=True):
        made |= {"peak_lr": 1.0, "role": group["role"]}
    return optimizer


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_rollout_is_sampled_from_the_policy_as_it_is_then(setting, monkeypatch, precision):
    """Also where a copy in half precision is what is sampled from."""
    compared = []
    real = train.roll_out_together

    def watched(run, models, *rest):
        now = models.actor_critic.policy.state_dict()
        copied = models.sampler.state_dict()
        compared.append({name: tensor.clone() for name, tensor in copied.items()})
        for name, tensor in copied.items():
            assert torch.equal(tensor, now[name].to(tensor.dtype)), f"{name} is an old one"
        return real(run, models, *rest)

    monkeypatch.setattr(train, "roll_out_together", watched)
    main(setting(mixed_precision=precision, max_steps=3, **ONE_UPDATE | {"learning_rate": 0.01}))
    first, second, third = (step["head.weight"] for step in compared)
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)])
def test_noise_is_new_in_every_rollout_and_for_every_seed(setting, tmp_path, monkeypatch, seeds):
    """The same prompts, and a policy that does not move: the answers are other ones all the same,
    but for the same seed."""
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n")
    file.write_text(file.read_text() * 6)
    drawn = []
    for n, seed in enumerate(seeds):
        run = Run(monkeypatch)
        keys = ONE_UPDATE | {"learning_rate": 0.0, "seed": seed, "max_steps": 2}
        main(setting(train_data=str(file), output_dir=str(tmp_path / f"rl{n}"), **keys))
        drawn += [rollout.ids_BS[:, :8].tolist() for rollout in run.rollouts]
    assert drawn[0] != drawn[1] and drawn[2] != drawn[3]
    assert (drawn[:2] == drawn[2:]) == (seeds[0] == seeds[1])


def prompts_of(rollout) -> list[tuple[int, ...]]:
    rows = zip(rollout.ids_BS.tolist(), rollout.prompt_lengths_B.tolist(), strict=True)
    return [tuple(ids[:size]) for ids, size in rows]


def test_prompts_come_in_another_order_for_every_seed_and_rollout(setting, tokenizer, tmp_path):
    chosen = []
    for seed in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            run = Run(patch)
            keys = ONE_UPDATE | {"seed": seed, "max_steps": 4}
            main(setting(output_dir=str(tmp_path / f"rl{seed}"), **keys))
        chosen.append([prompts_of(rollout) for rollout in run.rollouts])
    texts = [f"{word} {n}" for n in range(4) for word in WORDS]
    every = {tuple(prompt_ids(tokenizer, [{"role": "user", "content": t}])) for t in texts}
    for rollouts in chosen:  # an epoch is four rollouts: every prompt once
        assert {prompt for prompts in rollouts for prompt in prompts} == every
    assert chosen[0] != chosen[1]


def test_minibatches_are_a_function_of_seed_step_and_epoch(setting):
    lengths = [5, 9, 2, 7, 7, 3, 8, 4, 6, 1, 12, 10]
    cfgs = [setting(seed=seed, num_minibatches=3) for seed in (3, 4)]
    orders = [
        tuple(map(tuple, learning.minibatches(lengths, cfg, step, epoch)))
        for cfg in cfgs
        for step in range(2)
        for epoch in range(2)
    ]
    assert len(set(orders)) == 8
    assert all([len(rows) for rows in order] == [4, 4, 4] for order in orders)


@pytest.mark.parametrize(
    ("scores", "passed", "text"),
    [
        ([1.0, 0.0, 0.0, 0.5], False, "score +1.00 -> +0.50"),  # it fell
        ([0.0, *[0.2] * 15, 2.0, 1.0, 0.0, -3.0], True, "score +0.00 -> +0.04"),  # mean of 5
        ([0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, -1.0, -1.0], False, "score +0.00 -> -1.00"),
    ],
)
def test_the_gate_compares_the_last_rollouts_with_the_first(scores, passed, text):
    history = [{"score": score, "kl": 2.0, "stop_rate": 0.5} for score in scores]
    gate = train.judge(history, len(scores))
    assert (gate.passed, gate.text) == (passed, f"{text} at KL 2.0 nats, 50% complete")


@pytest.mark.parametrize("alpha", [5.0, 40.0])
def test_lora_keys_get_to_the_adapters(setting, monkeypatch, alpha):
    """From weights that are given to the adapters, what is published is W + alpha / r B A, in the
    chosen layers only."""
    keys = {"lora_r": 2, "lora_alpha": alpha, "lora_targets": ["down"], "max_steps": 1}
    real = train.load_models

    def filled(*args):
        models = real(*args)
        for name, parameter in models[0].named_parameters():
            if "lora_" in name:
                torch.nn.init.constant_(parameter, 0.1)
        return models

    monkeypatch.setattr(train, "load_models", filled)
    cfg = setting(**ONE_UPDATE | {"learning_rate": 0.0} | keys)
    main(cfg)
    before, after = load_model(cfg.parent).state_dict(), load_model(cfg.output_dir).state_dict()
    for name, weight in before.items():
        added = alpha / 2 * 2 * 0.1**2 if name.endswith("down.weight") else 0.0  # r terms of .1 .1
        torch.testing.assert_close(after[name] - weight, torch.full_like(weight, added))
