"""Where a model directory is: here, verified, or on the Hub; and who its parent was. Imports no
torch."""

import json
from pathlib import Path
from typing import Any

from common.config.schema import fingerprint
from common.program.errors import InputError
from common.program.files import MANIFEST, sha256, verify
from common.text.tokenizer import Tokenizer

# What stage.json holds, where a reader relies on it.
WRITTEN: dict[str, Any] = {
    **dict.fromkeys(("stage", "parent", "about", "commit"), str),
    **dict.fromkeys(("wall_time", "step", "tokens_seen"), (int, float)),
    "config": dict,
}
UNREAD = "weights are read from safetensors only, as a pickle can run code"


READ = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # the files of a model


def locate(path: str, weights: bool = True) -> Path:
    """The directory of a model: a local one as it is, verified (its weights only if `weights`); any
    other name is a Hub id, fetched without any pickle. Raises InputError where there is none."""
    if not path:
        raise InputError("a model directory is wanted, and the name given is empty")
    if Path(path).is_dir():
        verify(Path(path), weights)
        return Path(path)
    if Path(path).is_file():
        raise InputError(
            f"{path}: is a file; a model is a directory of config.json and model.safetensors "
            f"({UNREAD})"
        )
    if path.count("/") > 1 or path.startswith((".", "/", "runs/")):
        raise InputError(f"{path}: no such directory; run the stage that makes it first")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=READ))
    except Exception as error:  # its errors differ by release; the first line tells
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(
            f"{path}: neither a directory here nor a model that the Hub would give ({reason})"
        ) from None


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a model directory, or of a folder of shards. Raises InputError where there
    is none."""
    return Tokenizer.load(locate(path, weights=False))


def content_of_model(path: str) -> str:
    """What tells one content of a model directory from another: the sha256 of its manifest, or,
    where it has none, of the files that are read; the commit of a Hub model."""
    folder = locate(path, weights=False)
    if not Path(path).is_dir():
        return folder.name  # of the snapshot
    if (folder / MANIFEST).exists():
        return sha256(folder / MANIFEST)
    files = (file for name in READ for file in folder.glob(name) if file.is_file())
    return fingerprint([[file.name, sha256(file)] for file in sorted(files)])


def lineage(path: str | None) -> dict[str, Any]:
    """What a child notes about its parent: path and the hash of its manifest."""
    if path is None:
        return {"parent": None}
    manifest = Path(path) / MANIFEST
    return {"parent": path, "parent_hash": sha256(manifest) if manifest.exists() else None}


def read_stage(path: str | Path) -> dict[str, Any]:
    """stage.json of a stage directory; empty for a directory that is not one of ours.

    Others may write a file of that name too: what we would not have written there is left out.
    """
    try:
        stage = json.loads((Path(path) / "stage.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(stage, dict):
        return {}
    return {
        key: value for key, value in stage.items() if isinstance(value, WRITTEN.get(key, object))
    }
