"""Programs on the same work, side by side: alternating runs, medians, their ratio, and how near the
machine's limit they come.

Every benchmark's last line is JSON; `ratio` is ours over the peer's, higher is better.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


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


def side_by_side(
    benchmark: str,
    unit: str,
    sides: Mapping[str, Callable[[], float]],
    *,
    runs: int,
    flops_per_unit: float | Callable[[str], float] = 0.0,
    lower_is_better: bool = False,
    warm_up: bool = True,
    alone: bool = False,
    **extra: Any,
) -> dict[str, Any]:
    """Time `sides` in turn, `runs` counted rounds after one uncounted; print medians, and the JSON
    line.

    Names are "ours bf16", "ours fp32", "<peer> bf16", "<peer> fp32" (or without a precision); each
    call returns one figure in `unit`. The first of ours is our default; it is compared with the
    best of the peers, and fp32 with fp32. A side that raises Missing is skipped by name.
    flops_per_unit: model FLOPs behind one unit (of a side), from which follows the share of the
    GEMM peak at its precision, timed when the runs are done. warm_up: whether a round without count
    comes first; alone: no peers. `extra` goes into the line as it is then.
    """
    digits = 3 if lower_is_better else 1
    found: dict[str, list[float]] = {}
    missed = {name for name in sides if alone and not name.startswith("ours")}
    for number in range(0 if warm_up and runs else 1, max(runs, 1) + 1):
        for name, run in sides.items():
            if name in missed:
                continue
            try:
                figure = run()
            except Missing as missing:
                print(f"{name}: skipped, {missing}", flush=True)
                missed.add(name)
                continue
            found.setdefault(name, [])
            print(
                f"{'warm-up' if not number else f'run {number}'}  {name:20} {figure:12,.{digits}f} {unit}",
                flush=True,
            )
            if number:
                found[name].append(figure)
    medians = {name: statistics.median(figures) for name, figures in found.items()}
    ours = next(name for name in medians if name.startswith("ours"))
    peers = {name: figure for name, figure in medians.items() if not name.startswith("ours")}
    better = min if lower_is_better else max
    peer = better(peers, key=peers.get) if peers else None
    over = (lambda a, b: b / a) if lower_is_better else (lambda a, b: a / b)
    line: dict[str, Any] = {
        "benchmark": benchmark,
        "ratio": round(over(medians[ours], peers[peer]), 3) if peer else None,
        "ours": medians[ours],
        "peer": peers[peer] if peer else None,
        "unit": unit,
        "peer_name": peer,
    }
    plain = [name for name in peers if name.endswith("fp32")]
    if "ours fp32" in medians and plain:
        line["ratio_fp32"] = round(over(medians["ours fp32"], peers[plain[0]]), 3)
    peaks = {
        precision: gemm_peak(precision) for precision in {precision_of(name) for name in medians}
    }
    shares = {}
    for name, figure in medians.items():
        flops = flops_per_unit(name) if callable(flops_per_unit) else flops_per_unit
        shares[name] = round(
            flops * (1 / figure if lower_is_better else figure) / peaks[precision_of(name)], 4
        )
        print(
            f"{name:20} {figure:12,.{digits}f} {unit}"
            + (f"  {shares[name]:6.1%} of the GEMM peak" if flops else "")
        )
    line |= (
        {"peak_fraction": shares[ours], "peak_fractions": shares} if any(shares.values()) else {}
    )
    line |= {"all": found, "runs": runs}
    line |= {
        "gemm_gflops": {precision: round(peak / 1e9) for precision, peak in peaks.items()},
        **extra,
        **machine(),
    }
    print(json.dumps(line), flush=True)
    return line


def precision_of(name: str) -> str:
    return "bf16" if name.endswith("bf16") else "fp32"


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [
            row.split(":")[1].strip()
            for row in cpuinfo.read_text().splitlines()
            if "model name" in row
        ]
        if cpuinfo.exists()
        else []
    )
    return {
        "machine": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": commit,
    }
