"""The hand-off: publish a stage directory in transformers' own layout, verify it, load it.

A directory counts once its manifest.json (size and sha256 of every file) is there: it is written last, and removed
before anything it vouches for is touched.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.config import Failure, InputError
from common.hf import UNREAD, export_config, export_weights, import_config, import_weights, read_config, read_weights
from common.model import GPT, GPTConfig, RewardModel
from common.tokenizer import Tokenizer

Kind = Literal["lm", "reward"]
MANIFEST = "manifest.json"
NAMES = {"lm": "language model", "reward": "reward model"}
SPARE = 64 * 2**20  # bytes that a save leaves free on the disk
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "tiktoken", "peft", "trl", "deepspeed", "datasets")


def publish(
    folder: str | Path,
    model: GPT | RewardModel,
    tokenizer: Tokenizer,
    stage: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model, tokenizer and stage.json to `folder`, crash-safe. `weights`: the model's state when gathered elsewhere."""
    from safetensors.torch import save

    folder = Path(folder)
    end, padding = (tokenizer.eot_id, tokenizer.pad_id) if tokenizer.has_control else (None, None)
    config = export_config(model, {"eos_token_id": end, "pad_token_id": padding})
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {
        "stage.json": dump(stage),  # first: with it and no manifest the directory counts as cut short
        "config.json": dump(config),
        "model.safetensors": save(export_weights(model, weights), metadata={"format": "pt"}),
    }
    if isinstance(model, GPT):
        # Plain sampling is what the model was trained for; greedy and truncation are the caller's choice.
        files["generation_config.json"] = dump({**tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, sum(map(len, files.values())))
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
        tokenizer.save(folder, max_length=model.config.max_length)
        vouch(folder)


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


def load_config(path: str, kind: Kind | None = None) -> GPTConfig:
    """Shape of the model of a stage or transformers directory; no weights are read. A wrong kind is an InputError."""
    folder = locate(path, weights=False)
    raw = read_config(folder)
    found: Kind = "reward" if "SequenceClassification" in str(raw.get("architectures")) else "lm"
    if kind and found != kind:
        hint = f"; did you mean its parent {parent}?" if (parent := read_stage(path).get("parent")) and kind == "lm" else ""
        raise InputError(f"{path} holds a {NAMES[found]}, a {NAMES[kind]} is wanted here{hint}")
    return import_config(raw, str(folder))


def check_context(path: str, kind: Kind, length: int, key: str) -> None:
    """Raise InputError when the model there is not of this kind, or sees fewer than `length` tokens."""
    if length > (context := load_config(path, kind).max_length):
        raise InputError(f"{key} {length}: the model's context is {context} ({path})")


def load_model(path: str, kind: Kind = "lm", dropout: float = 0.0) -> GPT | RewardModel:
    """The model of a stage or transformers directory, fp32 on the CPU, in eval mode. A wrong kind is an InputError."""
    folder, config = locate(path), load_config(path, kind)
    config = GPTConfig(**{**config.__dict__, "dropout": dropout})
    model = GPT(config) if kind == "lm" else RewardModel(config)
    import_weights(model, read_weights(folder), str(folder))
    if isinstance(model, RewardModel):
        model.shift.fill_(read_config(folder).get("score_shift", 0.0))
    return model.eval()


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
