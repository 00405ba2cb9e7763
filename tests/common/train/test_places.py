"""What accelerate may ask for and the stages cannot do."""

import pytest

from common.program.errors import InputError
from common.train.placement import accelerator


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM"])
def test_other_ways_to_split_a_model_are_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=rf"{name}: not supported.*configs/accelerate/zero3\.yaml"):
        accelerator("no", 1, 1.0)
