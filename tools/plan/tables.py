"""A plan as tables on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.plan.workload import Memory

WORDS = ("step", "bound by", "fits")  # columns of text; all others hold numbers
COSTS = (
    *("step", "params", "steps", "tokens", "FLOPs", "time", "bound by", "$"),
    *("tok/s/GPU", "disk GB: kept", "most"),
)
REMARKS = {"does_not_fit": "Does not fit", "problems": "Would stop", "assumed": "Assumed"}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the costs of each step, the memory of a GPU, and what is wrong or assumed."""
    console.print(cost_table(report))
    console.print(memory_table(report))
    for key, title in REMARKS.items():
        for line in report[key]:
            console.print(f"{title}: {line}", soft_wrap=True)


def table_of(title: str, columns: Sequence[str]) -> Table:
    """An empty table, with numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in WORDS else "right")
    return table


def cost_table(report: dict[str, Any]) -> Table:
    """One row a step, and their sum."""
    table = table_of(report["title"], COSTS)
    for step in report["steps"]:
        speed = step["tokens_per_second_per_gpu"]
        table.add_row(
            step["step"],
            short(step["parameters"]),
            form(step["steps"], ","),
            short(step["tokens"]),
            form(step["flops"], ".2e"),
            lasting(step["seconds"]),
            step["bound_by"] or "?",
            form(step["dollars"], ",.2f"),
            "-" if speed is None else f"{speed:,.0f}",
            gigabytes(step["disk_kept"]),
            gigabytes(step["disk_most"]),
        )
    total = report["total"]
    partly = any(step["seconds"] is None for step in report["steps"])
    table.add_section()
    table.add_row(
        "all (what is known)" if partly else "all",
        "",
        "",
        short(total["tokens"]),
        f"{total['flops']:.2e}",
        lasting(total["seconds"]),
        "",
        f"{total['dollars']:,.2f}",
        "",
        gigabytes(total["disk_kept"]),
        gigabytes(total["disk_most"]),
    )
    return table


def memory_table(report: dict[str, Any]) -> Table:
    """One row for each step and ZeRO stage."""
    title = "Memory of one GPU in GB; not all parts are alive together: `peak` is what must fit"
    table = table_of(title, ("step", "ZeRO", *Memory._fields, "fits"))
    for step in report["steps"]:
        for zero, need in step["memory"].items():
            name = "" if zero else step["step"]
            fits = "yes" if need["peak"] <= report["gpu"]["memory"] else "NO"
            table.add_row(name, str(zero or "none"), *map(gigabytes, need.values()), fits)
        table.add_section()
    return table


def short(value: float | None) -> str:
    """1 234 567 -> "1.23 M"."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value and value >= size:
            count = value / size
            return f"{count:.3g}{letter}" if count < 1000 else f"{count:,.0f}{letter}"
    return form(value, ".3g")


def lasting(time: float | None) -> str:
    """Seconds in the largest unit of which there are at least two."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if time and time >= 2 * unit:
            return f"{time / unit:.1f} {name}"
    return form(time, ".2g", " s")


def form(value: float | None, how: str, unit: str = "") -> str:
    """A number in a format of Python's, or "?"."""
    return "?" if value is None else f"{value:{how}}{unit}"


def gigabytes(size: float) -> str:
    """Bytes as gigabytes."""
    if not size:
        return "-"
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.1g}"
