"""The pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .drift import AGES, PHASES, staleness
from .findings import Findings, in_words, values_of
from .plan import CENTRED, VALIDATION, moves, uncentred
from .statistics import FEW, Estimate, estimate

STYLE: Any = {"font.size": 10, "savefig.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25}  # fmt: skip
COLOURS = {"batch": "#777777", "xbm": "#c0392b", "xbn": "#2e86c1", "axbn": "#1e8449", "ema": "#b9770e",
           "oracle": "#6c3483"}  # fmt: skip
DASHED = (0, (4, 2))
"""Lines of methods with centred gradients."""
LEAST_SPAN = 4
"""Percentage points that an axis shows."""
TITLES = {"map@r": "MAP@R", "recall@1": "Recall@1", "recall@10": "Recall@10"}
EFFECTS = {"memory_size": "memory size", "batch_size": "batch size", "warmup_steps": "warm-up steps",
           "process_noise": "axbn: process / measurement noise", "ema_momentum": "ema: momentum"}  # fmt: skip


def final(path: Path, findings: Findings) -> None:
    """Scores on the test classes: every seed a dot, the mean with its interval; a cross at 0 if a run broke down."""
    tested = findings.tested()
    rows = {"own": "each at its own\nlearning rate", "common": f"all at learning\nrate {findings.plan.base.lr:g}"}
    with matplotlib.rc_context(STYLE):
        width = max(12, 2 * len(findings.plan.methods))  # names beside one another have room
        figure = Figure(figsize=(width, 3.2 * len(tested)), layout="constrained")
        grid = figure.subplots(len(tested), len(TITLES), squeeze=False, sharey="col")
        for row, (which, by_method) in zip(grid, tested.items(), strict=True):
            for axes, (name, title) in zip(row, TITLES.items(), strict=True):
                for x, (method, runs) in enumerate(by_method.items()):
                    values = findings.scores(runs, name)
                    colour = COLOURS[uncentred(method)]
                    axes.plot([x] * len(values), values, "o", ms=3, alpha=0.5, color=colour)
                    broken = findings.broken(runs)
                    axes.plot([x] * broken, [0] * broken, "x", ms=7, color=colour)
                    _bar(axes, x, estimate(values), _style(method))
                axes.set_xticks(range(len(by_method)), [method.replace("-", "\n") for method in by_method])
                axes.set_xlim(-0.5, len(by_method) - 0.5)
                axes.set_title(f"{title}, % of test images")
            row[0].set_ylabel(rows[which])
        figure.savefig(path)


def lr_map(path: Path, findings: Findings) -> None:
    """Learning rate against score, a panel for each memory size."""
    plan = findings.plan
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(plan.memory_sizes), 3.9), layout="constrained")
        panels = figure.subplots(1, len(plan.memory_sizes), sharey=True, squeeze=False)[0]
        for axes, memory_size in zip(panels, plan.memory_sizes, strict=True):
            for method in plan.methods:
                size = memory_size if method != "batch" else plan.base.memory_size
                points = [
                    (lr, findings.estimate(plan.many(VALIDATION, method, lr=lr, memory_size=size))) for lr in plan.lrs
                ]
                _line(axes, points, method)
            axes.set_xscale("log")
            axes.set_xticks(plan.lrs, [f"{lr:g}" for lr in plan.lrs])
            axes.minorticks_off()
            axes.set_xlabel("learning rate")
            axes.set_title(f"memory of {memory_size:,}")
        panels[0].set_ylabel("MAP@R on held-out classes, %")
        panels[0].legend(frameon=False)
        figure.savefig(path)


def drift(path: Path, findings: Findings) -> None:
    """Distance to the current network, a panel for each phase: as stored, and as it is in the memory."""
    plan = findings.plan
    methods = [method for method in plan.methods if method != "batch"]
    if not methods:
        return path.unlink(missing_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(PHASES), 3.6), layout="constrained")
        panels = figure.subplots(1, len(PHASES), squeeze=False)[0]
        for axes, (phase, when) in zip(panels, PHASES.items(), strict=True):
            for method in methods:
                runs = plan.common(findings.chosen)[method]
                found = [staleness(findings.of(runs), plan.base, when, age) for age in AGES.values()]
                shown = [(i, s) for i, s in enumerate(found) if s is not None]
                xs = [i for i, _ in shown]
                if moves(method):
                    colour = COLOURS[uncentred(method)]
                    axes.plot(xs, [s.uncorrected.mean for _, s in shown], ":", color=colour, lw=1.2)
                axes.plot(xs, [s.in_memory.mean for _, s in shown], ms=4, label=method, **_style(method))
            axes.set_xticks(range(len(AGES)), [name.replace(" ", "\n") for name in AGES])
            axes.set_ylim(bottom=0)
            axes.set_title(f"{phase} of training")
        panels[0].set_ylabel("cosine distance to the row\nembedded again")
        lines, names = panels[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False,
                      title="in the memory; dotted: as first stored")  # fmt: skip
        figure.savefig(path)


def effects(path: Path, findings: Findings) -> None:
    """One setting at a time, all others as chosen."""
    plan = findings.plan
    found = findings.effects()
    if not found:
        return path.unlink(missing_ok=True)  # that of a larger study
    columns = min(len(found), 3)  # more would be too small on a page
    lines_of_panels = -(-len(found) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 3.2 * lines_of_panels), layout="constrained")
        panels = figure.subplots(lines_of_panels, columns, squeeze=False).flat
        for axes in panels[len(found) :]:
            axes.remove()
        for axes, (name, rows) in zip(panels, found.items(), strict=False):
            values = values_of(rows)
            for method in plan.methods:
                points = [
                    (values.index(value), findings.estimate(runs)) for other, value, runs in rows if other == method
                ]
                if points:
                    _line(axes, points, method)
            axes.set_xticks(range(len(values)), [in_words(value) for value in values])
            low, high = axes.get_ylim()
            room = max(0.0, LEAST_SPAN - (high - low)) / 2  # or noise looks like an effect
            axes.set_ylim(low - room, high + room)
            axes.set_xlabel(EFFECTS[name])
        for axes in panels[: len(found) : columns]:
            axes.set_ylabel("MAP@R on held-out classes, %")
        lines = {name: line for axes in figure.axes
                 for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        shown = [name for name in plan.methods if name in lines]
        figure.legend([lines[name] for name in shown], shown, loc="outside lower center", ncols=len(shown),
                      frameon=False)  # fmt: skip
        figure.savefig(path)


def _line(axes: Axes, points: Sequence[tuple[float, Estimate]], method: str) -> None:
    """Means in a line, with their intervals where there are seeds enough for them."""
    xs = [x for x, _ in points]
    axes.plot(xs, [found.mean for _, found in points], ms=4, label=method, **_style(method))
    for x, found in points:
        if found.count >= FEW:
            axes.plot([x, x], [found.low, found.high], "-", color=COLOURS[uncentred(method)], alpha=0.5, lw=1.2)


def _style(method: str) -> dict[str, Any]:
    """Centred methods have the colour of the others, dashed lines and hollow dots."""
    style = {"color": COLOURS[uncentred(method)], "marker": "o", "linestyle": "-"}
    return style | ({"linestyle": DASHED, "markerfacecolor": "white"} if method.endswith(CENTRED) else {})


def _bar(axes: Axes, x: float, found: Estimate, style: dict[str, Any]) -> None:
    style = style | {"marker": "s", "linestyle": "none"}
    axes.errorbar(x + 0.16, found.mean, found.high - found.mean, ms=5, capsize=4, lw=1.6, **style)
