"""Every shipped config is accepted by the module that its recipe gives it to."""

import importlib
from pathlib import Path

import pytest
import yaml

from common.config.schema import load

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    (recipe.parent / f"{name}.yaml", step["module"])
    for recipe in sorted(ROOT.glob("configs/*/pipeline.yaml"))
    for name, step in yaml.safe_load(recipe.read_text())["steps"].items()
]


def config_of(module: str) -> type:
    """The Config of what `python -m module` runs."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.Config


@pytest.mark.parametrize(("file", "module"), STEPS, ids=lambda value: getattr(value, "stem", value))
def test_config_fits_its_module(file, module, tmp_path):
    given = tmp_path / "given.yaml"
    given.write_text(
        file.read_text().replace("${", "x{")
    )  # variables are the pipeline's to fill in
    cfg = load(config_of(module), ["--config", str(given)])
    written = yaml.safe_load(given.read_text())
    assert {key for key in written if getattr(cfg, key) is None} <= {
        key for key, value in written.items() if value is None
    }


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("configs/accelerate/*.yaml")), ids=lambda file: file.stem
)
def test_accelerate_reads_its_configs(file):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(file))
    assert read.num_machines == (2 if file.stem == "multi_node" else 1)
    assert (read.distributed_type == "DEEPSPEED") == (
        "zero" in file.stem or file.stem == "multi_node"
    )
