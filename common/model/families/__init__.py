"""Families of transformers' models that our GPT reads and writes, one file each.

A new one is a file beside these and its line in FAMILIES; where it computes something new, the
choice goes into GPTConfig and the block of gpt.py.
"""

from common.model.families import gpt2, gpt_neo, llama, ministral
from common.model.families.family import Family
from common.model.shape import GPTConfig

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (gpt2, gpt_neo, llama, ministral)
}


def family_of(config: GPTConfig) -> Family:
    """The first family that our models of this shape are published as."""
    return next(family for family in FAMILIES.values() if family.fits(config))
