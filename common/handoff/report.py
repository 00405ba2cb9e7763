"""What a stage says of itself when it ends: its gate, its stage.json, the manifest over its files.

Imports no torch, so that preparing text does not wait for it.
"""

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from common.config.schema import to_dict
from common.program.files import MANIFEST, dump, write_atomically, write_jsonl, write_manifest
from common.program.terminal import printable

STAGE = "stage.json"
LIBRARIES = (
    *("torch", "transformers", "accelerate", "tokenizers", "tiktoken"),
    *("peft", "trl", "deepspeed", "datasets"),
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What the directory of a model consists of, beside its manifest and an adapter/.
MODEL = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER, STAGE)


class Gate(NamedTuple):
    """Whether a stage did what it should, and in one line what it did."""

    passed: bool
    text: str

    def line(self, stage: str) -> str:
        """The line that ends a stage on the terminal."""
        return printable(f"gate {stage}: {'PASS' if self.passed else 'FAIL'}  {self.text}")


def stage_report(stage: str, cfg: Any, gate: Gate, seconds: float, **facts: Any) -> dict[str, Any]:
    """The content of stage.json: config, seed, gate, seconds of wall time, and where it was made.

    `facts` are the stage's own: kind, step, parent, metrics, data, ...
    """
    config = to_dict(cfg)
    return {
        "stage": stage,
        **facts,
        "config": config,
        **({"seed": config["seed"]} if "seed" in config else {}),
        "gate": {"passed": bool(gate.passed), "text": gate.text},
        "wall_time": round(seconds, 2),
        **provenance(),
    }


def write_stage_report(folder: Path, report: dict[str, Any]) -> None:
    """Write stage.json of a folder that holds no model; `publish` writes that of one that does."""
    write_atomically(folder / STAGE, dump(report))


def provenance() -> dict[str, Any]:
    """Git commit, library versions, machine: what a figure needs to be repeated."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        """What git says; nothing where it is not installed. It writes nothing: killed in a status,
        it would leave an index.lock that stops every later git command."""
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "-uno")),
        "versions": versions,
        "device": device_name(),
    }


def device_name() -> str | None:
    """The GPU, or the threads of the CPU; None where torch is not imported, as nothing computes."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu x {torch.get_num_threads()}"


def vouch(folder: Path, names: Sequence[str] = (*MODEL, "adapter/*")) -> None:
    """Write the manifest over the files of these names; from here on the directory counts."""
    write_manifest(folder, sorted(file for name in names for file in folder.glob(name)))


def publish_rows(
    folder: Path, files: Mapping[str, Sequence[dict]], report: Mapping[str, Any]
) -> None:
    """Write rows to the files of these names, stage.json, and the manifest over all.

    A full disk leaves the old files. They are gone, their manifest first, before a new one has its
    name, so that a cut leaves no mixture of two runs.
    """
    for name, rows in files.items():
        write_jsonl(folder / f".new.{name}", rows)
    for name in (MANIFEST, *files):
        (folder / name).unlink(missing_ok=True)
    for name in files:
        (folder / f".new.{name}").replace(folder / name)
    write_stage_report(folder, dict(report))
    vouch(folder, (*files, STAGE))
