"""`--plot`: time and memory against the size of the bank, with the roofline."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .comparisons import OURS
from .table import Row


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(rows: list[Row], file: Path) -> None:
    """Writes a PNG with a line of two panels for every case in `rows`: milliseconds and extra megabytes against M, both
    logarithmic, one line per implementation. Dashed: the least time this machine needs, for this library's first row.
    """
    from matplotlib.figure import Figure

    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["ms"] is not None:
            cases.setdefault(
                tuple(row[key] for key in ("kernel", "loss", "drift", "dtype", "batch", "dim")), []
            ).append(row)
    figure = Figure(figsize=(11, 4.6 * len(cases)), layout="constrained")
    for axes, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases.values(), strict=True):
        _panel(axes[0], case, "ms", f"{case[0]['kernel']}: milliseconds")
        _panel(axes[1], case, "peak_mb", "memory besides the bank, MB")
        base = next((row["implementation"] for row in case if row["implementation"].startswith(OURS)), None)
        bound = sorted((row["memory"], row["bound_ms"]) for row in case if row["implementation"] == base)
        if bound:
            axes[0].plot(*zip(*bound, strict=True), "k--", label="roofline of this machine")
        axes[0].set_title(_title(case[0]), fontsize=11)
        axes[0].legend(fontsize=10)
    figure.savefig(file, dpi=120, format="png")


def _panel(axis: Any, case: list[Row], key: str, label: str) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in case))
    for name in names:
        points = sorted((row["memory"], row[key]) for row in case if row["implementation"] == name)
        ours = name.startswith(OURS)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2.5 if ours else 1.5, label=name)
    axis.set(xscale="log", yscale="log", xlabel="rows of the memory, M", ylabel=label)
    axis.grid(True, which="major", alpha=0.3)


def _title(row: Row) -> str:
    words = [row["loss"], row["dtype"], row["device"], f"B = {row['batch']}", f"D = {row['dim']}"]
    return ", ".join(word for word in words if word)
