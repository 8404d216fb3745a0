"""The table on the screen."""

from __future__ import annotations

from typing import Any

HEADER = (
    f"{'M':>9}  {'implementation':24}{'ms':>9}{'quartiles':>19}{'x ours':>8}{'peak MB':>9}{'GB/s':>7}{'GFLOP/s':>9}"
    f"{'% of roof':>17}{'error':>10}"
)

LEGEND = """
x ours: times as long as this library (its first row). peak MB: most memory a call holds besides the bank.
GB/s, GFLOP/s: of the bank read once, and written once where it is moved; of the similarities of all pairs, and the
gradient of those that have a weight, in the dtype of the problem.
% of roof: the least time for that on this machine, over the time it took. FMA, tensor: arithmetic binds; memory:
bandwidth does. Above 100: a bank that stays in the caches; pairs that eight bits tell to have no weight (avx512_vnni).
error: against the float64 reference, relative, of the worst output.
pytorch-metric-learning: its step moves no bank, measures no moments and does not rank the batch against itself."""


def line(row: dict[str, Any], base_ms: float | None) -> str:
    """One row of the table; `base_ms` is the time of this library."""
    start = f"{row['memory']:9,}  {row['implementation']:24}"
    if row["ms"] is None:
        return start + "needs more memory than there is"
    quartiles = f"{_number(row['ms_low'])} - {_number(row['ms_high'])}"
    ratio = f"{row['ms'] / base_ms:.2f}" if base_ms else "-"
    roof = f"{row['roofline']:.0f} ({row['bound']})"
    return (
        f"{start}{_number(row['ms']):>9}{quartiles:>19}{ratio:>8}{row['peak_mb']:9.1f}{row['gbs']:7.1f}"
        f"{row['gflops']:9.1f}{roof:>17}{row['error']:10.1e}"
    )


def _number(ms: float) -> str:
    """Three or four digits."""
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"
