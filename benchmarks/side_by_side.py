"""Programs on the same work, side by side: alternating runs, medians, their ratio, and how near the
machine's limit they come.

Every benchmark's last line is JSON; `ratio` is ours over the peer's, higher is better.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.train.placement import has_bf16

ROOT = Path(__file__).resolve().parent.parent


class Missing(Exception):
    """A peer that is not installed: its name and how to get it."""


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="counted runs after one without count; 0: one in all, for a try",
    )
    parser.add_argument("--alone", action="store_true", help="our side only")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; both sides are pinned to so many cores"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("bf16", "fp32"),
        help="default: both where the CPU has bf16",
    )
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; this process pinned; `precisions` filled in: the first is our default."""
    args = parser.parse_args()
    pin(args.threads)
    args.precisions = args.precisions or (["bf16", "fp32"] if has_bf16() else ["fp32"])
    return args


def pin(threads: int) -> None:
    """This process and all that it starts to `threads` cores and as many threads; a GPU is hidden
    from both sides."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def child(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a program to its end; its last line of output is JSON. Raises Missing or RuntimeError
    with what it said."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise ended(command, done.returncode, done.stdout[-1500:] + done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def ended(command: Sequence[str], code: int, output: str) -> RuntimeError:
    """The error for a program that failed, with the end of what it said."""
    return RuntimeError(f"{' '.join(command)} ended with {code}:\n{output}")


def flags(keys: Mapping[str, Any]) -> list[str]:
    """Keys of a config as a command line."""
    return [str(part) for key, value in keys.items() for part in (f"--{key}", value)]


def gemm_peak(precision: str) -> float:
    """FLOP/s of the best of a few matrix products in bf16 or fp32, timed now on the threads that
    torch has."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 512, 2048), (2048, 256, 1024)):
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - begin)
        best = max(best, 2 * rows * inner * columns / statistics.median(times))
    return best


Sides = Mapping[str, Callable[[], float]]  # by name, what runs a side once and returns its figure


def side_by_side(
    benchmark: str,
    unit: str,
    sides: Sides,
    *,
    runs: int,
    flops_per_unit: float | Callable[[str], float] = 0.0,
    warm_up: bool = True,
    alone: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """Time `sides` in turn, `runs` counted rounds after one uncounted; print medians, and the JSON
    line.

    Names are "ours bf16", "ours fp32", "<peer> bf16", "<peer> fp32" (or without a precision); each
    call returns one figure in `unit`. Of seconds ("s", "s/update") the lower figure is the better
    one, of all else the higher. The first of ours is our default; it is compared with the best of
    the peers, and fp32 with fp32. A side that raises Missing is skipped by name.
    flops_per_unit: model FLOPs behind one unit (of a side), from which follows the share of the
    GEMM peak at its precision, timed when the runs are done. warm_up: whether a round without count
    comes first; alone: no peers. `extra` goes into the line as it is then.
    """
    sides = {name: run for name, run in sides.items() if name.startswith("ours") or not alone}
    lower_is_better = re.match(r"s\b", unit) is not None
    written = Writer(unit, 3 if lower_is_better else 1)
    rounds = range(0 if warm_up and runs else 1, max(runs, 1) + 1)
    found = run_rounds(sides, rounds, written)
    medians = {name: statistics.median(figures) for name, figures in found.items()}
    peaks = {precision: gemm_peak(precision) for precision in set(map(precision_of, medians))}
    shares = {}
    for name, figure in medians.items():
        flops = flops_per_unit(name) if callable(flops_per_unit) else flops_per_unit
        flops_per_second = flops * (1 / figure if lower_is_better else figure)
        shares[name] = round(flops_per_second / peaks[precision_of(name)], 4)
        share = f"  {shares[name]:6.1%} of the GEMM peak" if flops else ""
        print(f"{name:20} {written(figure)}{share}")
    line = {"benchmark": benchmark, **verdict(medians, unit, lower_is_better)}
    if any(shares.values()):
        line |= {"peak_fraction": shares[ours_of(medians)], "peak_fractions": shares}
    line |= {"all": found, "runs": runs}
    line["gemm_gflops"] = {precision: round(peak / 1e9) for precision, peak in peaks.items()}
    line |= {**extra, **machine()}
    print(json.dumps(line), flush=True)
    return line


class Writer(NamedTuple):
    """How figures are written."""

    unit: str
    digits: int  # behind the point

    def __call__(self, figure: float) -> str:
        """A figure with its unit."""
        return f"{figure:12,.{self.digits}f} {self.unit}"


def run_rounds(sides: Sides, rounds: Iterable[int], written: Writer) -> dict[str, list[float]]:
    """The figures of each side, run in turn; round 0 does not count. A side that raises Missing is
    left out from there on."""
    found: dict[str, list[float]] = {}
    missed: set[str] = set()
    for number in rounds:
        for name, run in sides.items():
            if name in missed:
                continue
            try:
                figure = run()
            except Missing as missing:
                print(f"{name}: skipped, {missing}", flush=True)
                missed.add(name)
                continue
            called = f"run {number}" if number else "warm-up"
            print(f"{called}  {name:20} {written(figure)}", flush=True)
            found.setdefault(name, []).extend([figure] if number else [])
    return found


def ours_of(names: Iterable[str]) -> str:
    """The first of our sides, which is our default."""
    return next(name for name in names if name.startswith("ours"))


def verdict(medians: Mapping[str, float], unit: str, lower_is_better: bool) -> dict[str, Any]:
    """Our default beside the best of the peers, and fp32 beside fp32."""

    def ratio(ours: float, peer: float) -> float:
        """How many times as good ours is."""
        return round(peer / ours if lower_is_better else ours / peer, 3)

    ours = medians[ours_of(medians)]
    peers = {name: figure for name, figure in medians.items() if not name.startswith("ours")}
    best = (min if lower_is_better else max)(peers, key=lambda name: peers[name]) if peers else None
    line = {
        "ratio": ratio(ours, peers[best]) if best else None,
        "ours": ours,
        "peer": peers[best] if best else None,
        "unit": unit,
        "peer_name": best,
    }
    plain = [figure for name, figure in peers.items() if name.endswith("fp32")]
    if "ours fp32" in medians and plain:
        line["ratio_fp32"] = ratio(medians["ours fp32"], plain[0])
    return line


def precision_of(name: str) -> str:
    """The precision in the name of a side; fp32 where it has none."""
    return "bf16" if name.endswith("bf16") else "fp32"


def machine() -> dict[str, Any]:
    """The machine, the libraries and the commit that the figures are of."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "machine": cpu_name() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
    }


def cpu_name() -> str | None:
    """The CPU's name as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    for row in cpuinfo.read_text().splitlines():
        if "model name" in row:
            return row.split(":")[1].strip()
    return None
