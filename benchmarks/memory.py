"""What a process holds. No imports of ours: peers in environments of their own use it too."""

import re
from pathlib import Path


def peak_mb(process: int | str = "self") -> float:
    """The most memory that a process has held until now, in MB; nan where the system does not
    tell."""
    return _status_mb(process, "VmHWM")


def held_mb(process: int | str = "self") -> float:
    """The memory that a process holds now, in MB; nan where the system does not tell."""
    return _status_mb(process, "VmRSS")


def _status_mb(process: int | str, line: str) -> float:
    """What Linux says in this line of a process's status."""
    status = Path(f"/proc/{process}/status")
    found = re.search(rf"{line}:\s+(\d+)", status.read_text()) if status.exists() else None
    return float(found[1]) * 1024 / 1e6 if found else float("nan")
