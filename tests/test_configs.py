"""Every shipped config is accepted by the module that its recipe gives it to."""

import importlib
from pathlib import Path

import pytest
import yaml

from common.config import load

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    (recipe.parent / f"{name}.yaml", step["module"])
    for recipe in sorted(ROOT.glob("configs/*/pipeline.yaml"))
    for name, step in yaml.safe_load(recipe.read_text())["steps"].items()
]


@pytest.mark.parametrize(("file", "module"), STEPS, ids=lambda value: getattr(value, "stem", value))
def test_config_fits_its_module(file, module, tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text(file.read_text().replace("${", "x{"))  # variables are the pipeline's to fill in
    cfg = load(importlib.import_module(module).Config, ["--config", str(given)])
    written = yaml.safe_load(given.read_text())
    assert {key for key in written if getattr(cfg, key) is None} <= {key for key, value in written.items() if value is None}
