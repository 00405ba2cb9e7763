"""What hf.py must know of a family of transformers' models to read and write its directories."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from common.model.shape import GPTConfig
from common.program.errors import InputError

Names = Mapping[str, str | tuple[str, ...]]  # our modules -> theirs
HEADS = {"head": "lm_head", "score": "score"}  # called alike in every family


class Family(NamedTuple):
    """A family: which of our shapes it stands for, its config.json, its names of weights."""

    model_type: str
    """Its name in config.json."""
    architectures: tuple[str, str]
    """transformers' classes: the language model, the classifier (our reward model)."""
    fits: Callable[[GPTConfig], bool]
    """Whether our models of this shape are published as this family."""
    import_config: Callable[[dict[str, Any]], GPTConfig]
    """From config.json to our shape. Raises InputError for what our GPT cannot compute; KeyError,
    TypeError and the like for what is no such config.json."""
    export_config: Callable[[GPTConfig], dict[str, Any]]
    """From our shape to config.json, less what all families have."""
    prefix: str
    """What names of weights begin with, but for those of the heads; some uploads lack it."""
    names: Names
    """Our modules -> theirs; {} is the number of a block. A tuple: ours is their concatenation
    along the outputs, in this order: queries, keys, values; gate, value."""
    transposed: tuple[str, ...] = ()
    """Endings of our modules whose matrices are stored as (inputs, outputs)."""
    always_biased: tuple[str, ...] = ()
    """Parts of a block that have a bias in this family even where ours have none: zeros, then."""
    query_divisor: Callable[[GPTConfig], float] | None = None
    """What queries are stored divided by; None: by nothing."""
    ignored: tuple[str, ...] = ()
    """Endings of tensors in their files that are no weights."""


def refuse(raw: dict[str, Any], **allowed: tuple) -> None:
    """Raise InputError where config.json has one of these keys with another value than those
    allowed, the first of which is what this GPT computes."""
    for key, values in allowed.items():
        if key in raw and raw[key] not in values:
            given = f"{key} {raw[key]!r} is not supported"
            raise InputError(f"{given}; this GPT computes {values[0]!r}")
