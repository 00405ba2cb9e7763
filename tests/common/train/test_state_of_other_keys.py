"""Which states a run goes on from."""

from pathlib import Path

import pytest

from common.config.schema import stage_config
from common.config.training import TrainConfig
from common.program.errors import InputError
from common.train.resume import check_same_run, identity, with_new_keys


@stage_config
class Config(TrainConfig):
    """A stage that has gained a key."""

    algorithm: str = "ppo"
    """The key."""


def test_a_key_that_the_config_has_gained_counts_with_its_default(tmp_path):
    cfg = Config(output_dir=str(tmp_path), max_steps=3)
    noted = identity(cfg, 16)
    del noted["algorithm"]
    check_same_run(Path("state"), with_new_keys(noted, cfg, identity(cfg, 16)), identity(cfg, 16))
    other = Config(output_dir=str(tmp_path), max_steps=3, algorithm="grpo")
    with pytest.raises(InputError, match="algorithm = ppo, this one has grpo"):
        check_same_run(
            Path("state"), with_new_keys(noted, other, identity(other, 16)), identity(other, 16)
        )
    noted["kl_coef"] = 0.1  # a key that is gone is still a difference
    with pytest.raises(InputError, match=r"kl_coef = 0\.1"):
        check_same_run(
            Path("state"), with_new_keys(noted, cfg, identity(cfg, 16)), identity(cfg, 16)
        )
