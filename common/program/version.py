"""Which version of this project is running."""

import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NAME = "state-of-gpt"
ROOT = Path(__file__).resolve().parents[2]


def version_number() -> str:
    """The number in the checkout's pyproject.toml, else that of the installed package.

    The checkout comes first: its code is what runs, and an installed package may be older.
    """
    try:
        with (ROOT / "pyproject.toml").open("rb") as file:
            return tomllib.load(file)["project"]["version"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "unknown"


def version_line() -> str:
    """For example `state-of-gpt 0.2.0 (commit 0f0e8cf)`; outside a git checkout without the
    commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return f"{NAME} {version_number()}" + (f" (commit {commit})" if commit else "")
