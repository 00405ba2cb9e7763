"""Keys of those configs, too, that train nothing: preparing text, collecting comparisons."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from common.config import stage_config

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


def refuse_overwriting(cfg: Any) -> None:
    """ValueError when the folder that the stage is to write is one that it reads."""
    if not Path(cfg.output_dir).is_dir():
        return
    for key, value in vars(cfg).items():
        if key != "output_dir" and isinstance(value, str) and os.path.realpath(value) == os.path.realpath(cfg.output_dir):
            raise ValueError(f"output_dir {cfg.output_dir}: is {key} too, which would be overwritten; name another directory")


@stage_config
class ReadsRows:
    """What becomes of bad rows."""

    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (broken JSON, wrong columns or types, unknown role, no answer) ends the stage; or it is
    skipped and counted by reason, and the first few are named. Without any that can be used the stage ends all the same."""
