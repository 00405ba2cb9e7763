"""What a run says as it goes: lines on the terminal, metrics.jsonl, samples.jsonl, a progress
bar; and the clocks whose readings are among the metrics."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.program.files import writing
from common.program.terminal import printable

LOGS = ("metrics.jsonl", "samples.jsonl")


class Laps:
    """Seconds that the parts of a step take, by name, as metrics: lap("sampling") ends the part
    that began at the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self.last
        self.last = now


class Speed:
    """Tokens a second since the last line of the log. Call `restart` after work that is no
    training, such as an evaluation."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Note that one more update has seen so many tokens, over all processes."""
        self.tokens += tokens

    def lap(self) -> float:
        """Tokens a second since the last restart or lap."""
        speed = self.tokens / (time.perf_counter() - self.since)
        self.restart()
        return speed


class Log:
    """The log of a stage. Only that of the main process writes; the others keep silent."""

    def __init__(
        self, stage: str, folder: Path, main: bool, tracker: Callable[..., None] | None = None
    ) -> None:
        self.stage, self.folder, self.main, self.tracker = stage, folder, main, tracker
        self.last: dict[str, float] = {}  # newest metrics, by name
        self.bar: tqdm | None = None

    def progress(
        self, total: int, done: int = 0, unit: str = "step", label: str | None = None
    ) -> tqdm:
        """A progress bar on the main process, where someone watches; log lines appear above it, or
        alone in a file."""
        watched = self.main and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc=label or self.stage,
            disable=not watched,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        return self.bar

    def close(self) -> None:
        """End the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.close()

    def say(self, line: Any) -> None:
        """One line on the terminal, above the progress bar."""
        if self.main:
            tqdm.write(printable(str(line)), file=sys.stdout)
            sys.stdout.flush()

    def log(
        self, step: int, metrics: Mapping[str, float], shown: Sequence[str] | None = None
    ) -> None:
        """One line to the terminal, one to metrics.jsonl, and to the trackers.

        `shown`: names of the metrics that the terminal shows, in this order (None: all of them);
        the file and the trackers get all.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        self.last |= metrics
        if not self.main:
            return
        names = metrics if shown is None else [name for name in shown if name in metrics]
        figures = "  ".join(f"{name} {number(metrics[name])}" for name in names)
        self.say(f"{self.stage} {step:>5}  {figures}")
        self.append("metrics.jsonl", {"step": step, **metrics})
        if self.tracker:
            self.tracker(metrics, step=step)

    def log_samples(self, step: int, samples: Sequence[dict[str, Any]], shown: int = 1) -> None:
        """Samples taken while training: all to samples.jsonl, the first few to the terminal."""
        if not self.main:
            return
        for i, row in enumerate(samples):
            self.append("samples.jsonl", {"step": step, **row})
            if i < shown:
                self.say(
                    "  " + "  ".join(f"{name}: {quoted(value)}" for name, value in row.items())
                )

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add one row to a log file. Raises Failure when it cannot be written."""
        with writing(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def empty(self) -> None:
        """Begin the log files of a new run; what an earlier one wrote is gone."""
        for name in LOGS if self.main else ():
            (self.folder / name).unlink(missing_ok=True)  # a link's target is not ours
            (self.folder / name).touch()

    def sizes(self) -> dict[str, int]:
        """Bytes of each log file."""
        return {name: (self.folder / name).stat().st_size for name in LOGS} if self.main else {}

    def cut_back(self, sizes: Mapping[str, int]) -> None:
        """Drop the lines written after a save that noted `sizes`: they are about to be written
        again."""
        for name, size in sizes.items() if self.main else ():
            file = self.folder / name
            file.touch()
            if file.stat().st_size < size:
                warnings.warn(
                    f"{file}: lines are missing that were there when the state was saved",
                    stacklevel=2,
                )
                size = file.read_bytes().rfind(b"\n") + 1
            os.truncate(file, size)


def number(value: float) -> str:
    """Short and aligned enough to read in a log line."""
    if not math.isfinite(value):  # a gradient norm that fp16's loss scale has overflown
        return str(value)
    if value == int(value) and abs(value) < 1e5:
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"


def quoted(value: Any) -> str:
    """A value of a sample on one line: text in quotes, with its line ends escaped."""
    return repr(value) if isinstance(value, str) else str(value)
