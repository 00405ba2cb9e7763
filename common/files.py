"""Files that a hand-off consists of: written whole or not at all, checksums over them, and what they say of their origin.

Without torch, so that preparing data does not wait for it.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.config import Failure, InputError
from common.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SPARE = 64 * 2**20  # bytes that a save leaves free on the disk
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "tiktoken", "peft", "trl", "deepspeed", "datasets")
UNREAD = "weights are read from safetensors only, as a pickle can run code"


def vouch(folder: Path) -> None:
    """Write the manifest over every file that a hand-off consists of; from here on the directory counts."""
    names = {"config.json", "generation_config.json", "model.safetensors", "stage.json", "shards.json", "chat_template.jinja"}
    names |= {file.name for pattern in ("tokenizer*.json", "*.bin") for file in folder.glob(pattern)}
    names |= {f"adapter/{f.name}" for f in folder.glob("adapter/*")}
    write_manifest(folder, [folder / name for name in sorted(names) if (folder / name).exists()])


def write_manifest(folder: Path, files: Sequence[Path]) -> None:
    """Size and sha256 of each file, by its path inside `folder`."""
    manifest = {str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}
    write_atomically(folder / MANIFEST, dump(manifest))


def verify(folder: Path, weights: bool = True) -> None:
    """Raise InputError unless every file is as the manifest says. Directories of other makers have none, and pass.

    Without `weights` gigabytes of them are not hashed, where only the other files are read.
    """
    if (folder / "stage.json").exists() and not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: the save was cut short (no {MANIFEST}); run its stage again")
    if not (folder / MANIFEST).exists():
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (ValueError, AttributeError, TypeError, KeyError):  # ValueError: broken JSON, or no UTF-8
        raise InputError(f"{folder / MANIFEST}: damaged; run the stage again") from None
    for name, (size, digest) in wanted.items():
        file = folder / name
        if not file.exists():
            raise InputError(f"{file}: missing, though {MANIFEST} lists it; run the stage again")
        hashed = weights or file.suffix != ".safetensors"
        if file.stat().st_size != size or (hashed and sha256(file) != digest):
            raise InputError(f"{file}: damaged (size or sha256 differs from {MANIFEST}); run the stage again")


def locate(path: str, weights: bool = True) -> Path:
    """A local directory as it is, verified; anything else is a Hub id, fetched without any pickle."""
    if Path(path).is_dir():
        verify(Path(path), weights)
        return Path(path)
    if Path(path).is_file():
        raise InputError(f"{path}: is a file; a model is a directory of config.json and model.safetensors ({UNREAD})")
    if path.count("/") > 1 or path.startswith((".", "/", "runs/")):
        raise InputError(f"{path}: no such directory; run the stage that makes it first")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:  # its errors differ by release; the first line tells
        reason = str(error).strip().splitlines()[0][:160]
        raise InputError(f"{path}: neither a directory here nor a model that the Hub would give ({reason})") from None


def load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(locate(path, weights=False))


def read_stage(path: str | Path) -> dict[str, Any]:
    """stage.json of a stage directory; empty for a directory that is not one of ours."""
    file = Path(path) / "stage.json"
    return json.loads(file.read_text()) if file.exists() else {}


def lineage(path: str | None) -> dict[str, Any]:
    """What a child notes about its parent: path and the hash of its manifest."""
    if path is None:
        return {"parent": None}
    manifest = Path(path) / MANIFEST
    return {"parent": path, "parent_hash": sha256(manifest) if manifest.exists() else None}


def provenance() -> dict[str, Any]:
    """Git commit, library versions, machine: what a figure needs to be repeated."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    dirty = bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip())
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = None  # of those alone that compute: reading text needs no torch
    if torch := sys.modules.get("torch"):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"
    return {"commit": commit, "dirty": dirty, "versions": versions, "device": device}


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_atomically(file: Path, content: bytes) -> None:
    """All of `content` or the file as it was: temporary file, fsync, rename."""
    temporary = file.with_name(file.name + ".tmp")
    with writing(file):
        try:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full, say, is a Failure: one line and no traceback."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise Failure(f"{path}: could not be written ({why}); when it can be, the same command goes on") from None


def check_room(folder: Path, size: int) -> None:
    """Raise OSError when the disk has no room for `size` bytes, and some to spare."""
    if (free := shutil.disk_usage(folder).free) < size + SPARE:
        raise OSError(f"{(size + SPARE) / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free")
