"""Faults planted from reading the code alone, before any test was opened."""

from functools import partial

from tests.mutants.mutant import Mutant

HAND, TRAIN = "tests/stages/rl/test_rl_by_hand.py::", "tests/stages/rl/test_rl_train.py::"
RL_TRAIN = (HAND + "test_a_whole_run_is_that_written_out_by_hand",)
ROLLOUT = ("tests/stages/rl/test_rollout.py",)
REWARD = ("tests/stages/reward/test_reward.py",)
Blind = partial(Mutant, blind=True)

MUTANTS = [
    Blind(
        "reward-penalty-is-k3",
        "stages/rl/experience.py",
        "kl_BT, _, _ = kl_estimates(rollout.logprobs_BT, rollout.ref_logprobs_BT)\n    return",
        "_, _, kl_BT = kl_estimates(rollout.logprobs_BT, rollout.ref_logprobs_BT)\n    return",
        RL_TRAIN,
        "the KL penalty in the reward is k3, which is never negative, and no log-ratio",
    ),
    Blind(
        "minibatches-alike-in-every-rollout",
        "stages/rl/learn.py",
        "default_rng((cfg.seed, step, epoch))",
        "default_rng((cfg.seed, epoch))",
        (HAND + "test_minibatches_are_a_function_of_seed_step_and_epoch",),
        "the same places of every rollout share a minibatch",
    ),
    Blind(
        "early-stop-looks-at-the-first-update",
        "stages/rl/learn.py",
        'mean(statistics[-1], "approx_kl")',
        'mean(statistics[0], "approx_kl")',
        (TRAIN + "test_early_stop_looks_at_the_newest_update",),
        "the first update has approx_kl 0 always, so nothing ever stops",
    ),
    Blind(
        "episodes-come-back-in-the-wrong-order",
        "stages/rl/rollout.py",
        ".rows(order.argsort().tolist())",
        ".rows(order.tolist())",
        ROLLOUT,
        "log-probs and scores stand beside other prompts than their own",
    ),
    Blind(
        "reference-without-temperature",
        "stages/rl/rollout.py",
        "ids_BS, predicts_BS, targets=targets_N, temperature=temperature\n    )\n    scores_B",
        "ids_BS, predicts_BS, targets=targets_N\n    )\n    scores_B",
        ROLLOUT,
        "KL between two temperatures of one model is not 0",
    ),
    Blind(
        "critic-sees-the-token-it-values",
        "stages/rl/models.py",
        "self.critic.values(ids_BS, predicts_BS)",
        "self.critic.values(ids_BS, predicts_BS.roll(1, 1))",
        ROLLOUT,
        "a value of the state behind the token is no baseline for it",
    ),
    Blind(
        "critic-warmup-freezes-the-critic",
        "stages/rl/train.py",
        'group["role"] == "policy" and step',
        'group["role"] == "critic" and step',
        (TRAIN + "test_critic_warm_up_leaves_the_policy_alone",),
        "the policy learns from a critic that does not",
    ),
    Blind(
        "critic-key-ignored",
        "stages/rl/train.py",
        "(cfg.critic or cfg.reward_model",
        "(cfg.reward_model",
        RL_TRAIN,
        "the critic of the config is not the one that is trained",
    ),
    Blind(
        "kl-coef-adapts-from-the-start-always",
        "stages/rl/train.py",
        'kl_coef, metrics["kl"], cfg.target_kl',
        'cfg.kl_coef, metrics["kl"], cfg.target_kl',
        RL_TRAIN,
        "the adaptive coefficient never gets further than one step from the first",
    ),
    Blind(
        "ptx-text-overlaps",
        "stages/rl/train.py",
        "((step * updates + update) * run.processes + run.rank)",
        "((step + update) * run.processes + run.rank)",
        RL_TRAIN,
        "updates of neighbouring rollouts get the same text",
    ),
    Blind(
        "origin-set-on-all-answers",
        "stages/reward/train.py",
        "comparison.policy if own else range(len(mine))",
        "range(len(mine))",
        REWARD,
        "the SFT model's own answers do not average 0",
    ),
    Blind(
        "shift-does-not-shrink-with-the-head",
        "stages/reward/train.py",
        "shift = mean / std",
        "shift = mean",
        REWARD,
        "scores divided by their deviation, less the mean of the undivided ones",
    ),
    Blind(
        "every-pair-weighs-one",
        "stages/reward/train.py",
        "[1 / len(comparison.pairs) for _ in comparison.pairs]",
        "[1.0 for _ in comparison.pairs]",
        REWARD,
        "a prompt with K answers counts K (K - 1) / 2 times",
    ),
    Blind(
        "held-out-comparisons-train-too",
        "stages/reward/collect.py",
        "[row for row in both if question(row) not in held]",
        "both",
        ("tests/stages/reward/test_collect.py",),
        "held-out accuracy is measured on what was learned",
    ),
    Blind(
        "sft-loss-over-all-tokens",
        "stages/sft/train.py",
        "torch.tensor([sum(map(supervised_tokens, micro_batches))])",
        "torch.tensor([sum(len(e.ids) for batch in micro_batches for e in batch)])",
        ("tests/stages/sft/test_sft_by_hand.py",),
        "the mean is over prompt tokens too, which are not in the sum",
    ),
    Blind(
        "every-epoch-in-the-same-order",
        "common/rows/batches.py",
        "batches(self.lengths, self.batch_size, self.seed, epoch)",
        "batches(self.lengths, self.batch_size, self.seed, 0)",
        ("tests/common/rows/test_order.py",),
        "the rows of a batch are the same in every epoch",
    ),
    Blind(
        "generator-not-put-back",
        "common/train/resume.py",
        'torch.set_rng_state(saved[f"{rank}.cpu"])',
        'torch.set_rng_state(saved[f"{rank}.cpu"]), torch.rand(1)',
        ("tests/faults/test_resume_every_step.py::test_stopped_in_every_step[sft]",),
        "dropout after a resume is not that of a run without a break",
    ),
    Blind(
        "accumulation-divides-twice",
        "common/train/update.py",
        "(terms * weights).sum()",
        "(terms * weights / len(micro_batches)).sum()",
        ("tests/common/train/test_optimizers.py",),
        "4 micro-batches of 4 give another update than one of 16",
    ),
    Blind(
        "accumulated-rows-overlap",
        "stages/pretrain/train.py",
        "first = step * run.global_batch + run.rank",
        "first = step * run.cfg.per_device_train_batch_size + run.rank",
        ("tests/stages/pretrain/test_pretrain_by_hand.py",),
        "updates with accumulation see rows of the update before again",
    ),
    Blind(
        "cut-off-answer-gets-an-end-token",
        "common/text/comparisons.py",
        "[tokenizer.eot_id] if ended else []",
        "[tokenizer.eot_id]",
        REWARD,
        "the reward model learns to score an end that never came",
    ),
]
