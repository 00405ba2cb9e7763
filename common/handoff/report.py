"""What a stage says of itself: its origin and what made it."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.program.files import write_manifest

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "tiktoken",
    "peft",
    "trl",
    "deepspeed",
    "datasets",
)


def provenance() -> dict[str, Any]:
    """Git commit, library versions, machine: what a figure needs to be repeated."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    commit = (
        subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        or None
    )
    dirty = bool(
        subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    )
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = None  # of those alone that compute: reading text needs no torch
    if torch := sys.modules.get("torch"):
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"cpu x {torch.get_num_threads()}"
        )
    return {"commit": commit, "dirty": dirty, "versions": versions, "device": device}


def vouch(folder: Path) -> None:
    """Write the manifest over every file that a hand-off consists of; from here on the directory
    counts."""
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "stage.json",
        "shards.json",
        "chat_template.jinja",
    }
    names |= {
        file.name for pattern in ("tokenizer*.json", "*.bin") for file in folder.glob(pattern)
    }
    names |= {f"adapter/{f.name}" for f in folder.glob("adapter/*")}
    write_manifest(folder, [folder / name for name in sorted(names) if (folder / name).exists()])
