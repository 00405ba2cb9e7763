"""All planted faults."""

from tests.mutants import blind, reward, rl, sampling, sft_and_pretrain, shared, text

ALL = [
    *blind.MUTANTS,
    *rl.MUTANTS,
    *reward.MUTANTS,
    *sampling.MUTANTS,
    *sft_and_pretrain.MUTANTS,
    *shared.MUTANTS,
    *text.MUTANTS,
]
