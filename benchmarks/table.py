"""The tables on the screen: a line per row, or a line per case with a column per implementation."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]  # of a table, and of its JSON file

HEADER = (
    f"{'M':>9}  {'implementation':24}{'ms':>9}{'quartiles':>19}{'x ours':>8}{'peak MB':>9}{'active':>8}"
    f"{'GB/s':>7}{'GFLOP/s':>9}{'% of roof':>17}{'error':>10}"
)

ROOF = """% of roof: the least time for the bytes and the operations that no way can do without, over the time it took.
Bytes: of the bank read once, and written once where it is moved, as fast as a copy goes, else as fast as reading does.
Operations: of the similarities of all pairs, and of the gradient of those that have a weight, in the dtype of the
problem. Above 100: a bank that stays in the caches; a contrastive loss whose pairs without a weight are found with
fewer bits (on a CPU by products of bytes, on a GPU by the screen).
*: launched one by one, as it waits for the device; the host's time is in it."""

LEGEND = f"""
x ours: times as long as this library (its first row). peak MB: most memory a call holds besides the bank.
active: pairs of batch and bank that have a weight, in % of all, on average over the first rounds.
GB/s, GFLOP/s: of the bytes and operations of the roof. FMA, tensor: arithmetic binds; memory: bandwidth does.
{ROOF}
error: against the float64 reference, relative, of the worst output. A pair within rounding of the margin has a weight
in one and none in the other: 1e-3 or so, where it happens.
pytorch-metric-learning: its step moves no bank, measures no moments and does not rank the batch against itself."""


def unit(ceiling: str) -> str:
    return "GB/s" if ceiling in ("read", "copy") else "GFLOP/s"


def described(machine: dict[str, float]) -> str:
    """The ceilings of a machine."""
    return ", ".join(f"{name} {value:,.4g} {unit(name)}" for name, value in machine.items())


def line(row: Row, base_ms: float | None) -> str:
    """One row of the table; `base_ms` is the time of this library."""
    start = f"{row['memory']:9,}  {row['implementation']:24}"
    if row["ms"] is None:
        return start + "needs more memory than there is"
    quartiles = f"{_number(row['ms_low'])} - {_number(row['ms_high'])}"
    ratio = f"{row['ms'] / base_ms:.2f}" if base_ms else "-"
    roof = f"{row['roofline']:.0f} ({row['bound']})"
    active = "-" if row["active"] is None else f"{row['active']:.3g}"
    return (
        f"{start}{_number(row['ms']) + _mark(row):>9}{quartiles:>19}{ratio:>8}{row['peak_mb']:9.1f}{active:>8}"
        f"{row['gbs']:7.1f}{row['gflops']:9.1f}{roof:>17}{row['error']:10.1e}"
    )


def _number(ms: float) -> str:
    """Three or four digits."""
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _mark(row: Row) -> str:
    return "*" if row["how"] == "events" else ""


def cell(row: Row) -> str:
    """Microseconds and the share of the roof; a word where nothing was measured."""
    if "ms" not in row:
        return next((word for word in ("out of memory", "error", "skipped") if word in row), "-").split(" ")[0]
    us = 1e3 * row["ms"]
    share = f" {row['roofline']:.0f}%" if "roofline" in row else ""
    return f"{us:.{0 if us >= 100 else 1}f}{_mark(row)}{share}"


def pivot(title: str, rows: list[Row], index: list[str], key: str, order: list[str]) -> list[str]:
    """The cells of `rows`: a line per combination of the `index` fields, a column per value of `key`; those whose first
    word is in `order` come first, in that order."""

    def place(name: str) -> tuple[int, str]:
        word = name.split(" ")[0]
        return (order.index(word) if word in order else len(order), name)

    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "-") for name in index), {})[row[key]] = row
    if not groups:
        return []
    columns = sorted({row[key] for row in rows}, key=place)
    table = [[*index, *columns]]
    for group, of in sorted(groups.items(), key=lambda item: str(item[0])):
        table.append([*map(_short, group), *(cell(of[name]) if name in of else "-" for name in columns)])
    return ["", title, *aligned(table)]


def aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(word.rjust(w) for word, w in zip(line, widths, strict=True)) for line in table]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
