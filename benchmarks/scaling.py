"""What more threads gain: `--threads 1,2,4`."""

from __future__ import annotations

from typing import Any

from .comparisons import OURS
from .table import Row, aligned


def add_efficiency(rows: list[Row]) -> None:
    """Gives every row of this library `efficiency`, in %: with s the least number of threads and n its own,
    s x time at s / (n x time at n)."""
    for group in _groups(rows).values():
        base = min(group, key=lambda row: int(row["threads"]))
        for row in group:
            if row["ms"] is not None and base["ms"] is not None:
                row["efficiency"] = 100 * base["threads"] * base["ms"] / (row["threads"] * row["ms"])


def efficiency_table(rows: list[Row]) -> str:
    """A line for each memory and implementation, a column for each number of threads."""
    threads = sorted({row["threads"] for row in rows})
    least = f"{threads[0]} x time at {threads[0]}" if threads[0] > 1 else "time at 1"
    lines = [["M", "implementation", *(f"{n} thread{'s' * (n > 1)}" for n in threads)]]
    for (memory, name), group in _groups(rows).items():
        of = {row["threads"]: row for row in group}
        lines.append([f"{memory:,}", name, *(f"{of[n]['efficiency']:.0f}" if "efficiency" in of.get(n, {}) else "-"
                                             for n in threads)])  # fmt: skip
    return "\n".join(["", f"efficiency in %: {least} / (n x time at n)", *aligned(lines)])


def _groups(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["implementation"].startswith(OURS):
            groups.setdefault((row["memory"], row["implementation"]), []).append(row)
    return groups
