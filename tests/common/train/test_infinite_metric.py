"""A metric that is not finite, such as the gradient norm of a step that fp16 skips, loses no
work: the state holds it, and stage.json says null."""

import json
import math

import pytest
import torch

from common.config.training import TrainConfig
from common.handoff.report import Gate
from common.train.resume import LOOP, write_state
from common.train.run import Run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_the_state_holds_it(tmp_path):
    loop = {"step": 1, "logs": {}, "last": {"grad_norm": math.inf, "loss": math.nan}}
    write_state(tmp_path, {"weights.safetensors": {"w": torch.zeros(1)}}, loop)
    last = json.loads((tmp_path / "step-1" / LOOP).read_text())["last"]
    assert last["grad_norm"] == math.inf and math.isnan(last["loss"])


def test_the_report_says_null(tmp_path):
    cfg = TrainConfig(output_dir=str(tmp_path / "out"), max_steps=1)
    run = Run(cfg, "sft", "lm")
    run.logs.last = {"grad_norm": math.inf, "loss": 2.0}
    report = run.report(1, Gate(True, ""), {})
    run.forget()
    assert report["metrics"] == {"grad_norm": None, "loss": 2.0}
