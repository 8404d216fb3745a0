"""The pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .drift import AGES, PHASES, staleness
from .plan import VALIDATION
from .statistics import Estimate, estimate

if TYPE_CHECKING:
    from .study import Findings

STYLE: Any = {"font.size": 10, "savefig.dpi": 110, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25}  # fmt: skip
COLOURS = {"batch": "#777777", "xbm": "#c0392b", "xbn": "#2e86c1", "axbn": "#1e8449", "ema": "#b9770e"}
TITLES = {"map@r": "MAP@R", "recall@1": "Recall@1", "recall@10": "Recall@10"}
EFFECTS = {"memory_size": "memory size", "batch_size": "batch size", "warmup_steps": "warm-up steps",
           "process_noise": "axbn: process / measurement noise", "ema_momentum": "ema: momentum"}  # fmt: skip


def final(path: Path, findings: Findings) -> None:
    """Scores on the test classes: every seed a dot, the mean with its interval."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
            for x, (method, runs) in enumerate(findings.plan.final(findings.chosen).items()):
                values = findings.scores(runs, name)
                found = estimate(values)
                axes.plot([x] * len(values), values, "o", ms=3, alpha=0.5, color=COLOURS[method])
                _bar(axes, x, found, COLOURS[method])
            axes.set_xticks(range(len(findings.plan.methods)), findings.plan.methods)
            axes.set_xlim(-0.5, len(findings.plan.methods) - 0.5)
            axes.set_title(f"{title}, % of test images")
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
    """Distance to the network of the day, a row for each phase: as stored, and as it is in the memory."""
    plan = findings.plan
    methods = [method for method in plan.methods if method != "batch"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(PHASES), 3.6), layout="constrained")
        panels = figure.subplots(1, len(PHASES), squeeze=False)[0]
        for axes, (phase, when) in zip(panels, PHASES.items(), strict=True):
            for method in methods:
                runs = plan.final(findings.chosen)[method]
                found = [staleness(findings.of(runs), plan.base, when, age) for age in AGES.values()]
                shown = [(i, s) for i, s in enumerate(found) if s is not None]
                xs = [i for i, _ in shown]
                if method != "xbm":
                    axes.plot(xs, [s.uncorrected.mean for _, s in shown], ":", color=COLOURS[method], lw=1.2)
                axes.plot(xs, [s.in_memory.mean for _, s in shown], "o-", color=COLOURS[method], ms=4, label=method)
            axes.set_xticks(range(len(AGES)), [name.replace(" ", "\n") for name in AGES])
            axes.set_ylim(bottom=0)
            axes.set_title(f"{phase} of training")
        panels[0].set_ylabel("cosine distance to the row\nembedded again")
        panels[0].legend(frameon=False, title="in memory; dotted: as stored", title_fontsize=8)
        figure.savefig(path)


def effects(path: Path, findings: Findings) -> None:
    """One setting at a time, all others as chosen."""
    plan = findings.plan
    found = {name: rows for name, rows in findings.effects().items() if rows}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(found), 3.6), layout="constrained")
        for axes, (name, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            values = sorted({value for _, value, _ in rows})
            for method in plan.methods:
                points = [
                    (values.index(value), findings.estimate(runs)) for other, value, runs in rows if other == method
                ]
                if points:
                    _line(axes, points, method)
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axes.set_xlabel(EFFECTS[name])
        figure.axes[0].set_ylabel("MAP@R on held-out classes, %")
        figure.axes[0].legend(frameon=False)
        figure.savefig(path)


def _line(axes: Axes, points: Sequence[tuple[float, Estimate]], method: str) -> None:
    """Means in a line, with their intervals where those are of use: of three seeds and more."""
    xs = [x for x, _ in points]
    axes.plot(xs, [found.mean for _, found in points], "o-", ms=4, color=COLOURS[method], label=method)
    for x, found in points:
        if found.count > 2:
            axes.plot([x, x], [found.low, found.high], "-", color=COLOURS[method], alpha=0.5, lw=1.2)


def _bar(axes: Axes, x: float, found: Estimate, colour: str) -> None:
    axes.errorbar(x + 0.16, found.mean, found.high - found.mean, fmt="s", color=colour, ms=5, capsize=4, lw=1.6)
