"""The two pictures of a run: curves over time, and test images with their nearest neighbours."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from . import evaluate, fonts, losses
from .augment import View, to_tensor
from .data import Dataset
from .scoring import tested_on

BLUE, ORANGE, GREEN, RED, GREY = (
    "#0072b2",
    "#d55e00",
    "#00795c",
    "#c1272d",
    "#767676",
)  # for colour-blind eyes, too
STALENESS = {"uncorrected": ("rows as first stored", GREY), "in_memory": ("rows in the memory", BLUE)}
GAPS = {"gap_before": ("as the step finds the memory", GREY), "gap_after": ("after it is moved", BLUE)}
DIAMOND: dict[str, Any] = {"marker": "D", "linestyle": "none", "mfc": "white", "ms": 7, "mew": 1.6}
QUERIES, NEIGHBOURS = 10, 8
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "savefig.dpi": 130,
    "text.parse_math": False,  # names of classes and folders may hold dollars
}


def curves(path: Path, metrics: dict[str, Any]) -> None:
    """Loss, retrieval scores, what the memory holds, and how far its rows are from where they ought to be."""
    history, config = metrics["history"], metrics["config"]
    with matplotlib.rc_context(STYLE | {"font.family": fonts.families()}):
        figure = Figure(figsize=(16, 7.2), layout="constrained")
        loss, scores, pairs, over_time, by_age, gap = figure.subplots(2, 3).flat
        title = f"{metrics['method']}, {config['backbone']} on {metrics['data']['name']}, seed {metrics['seed']}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        _loss(loss, history["loss"], config)
        _scores(scores, metrics)
        for axes, draw in ((over_time, _staleness_over_time), (by_age, _staleness_by_age)):
            draw(axes, history["drift"])
            if not history["drift"]:
                _say(axes, "not measured: the run was too short")
        _pairs(pairs, history["memory"])
        _gap(gap, history["memory"])
        for axes in (loss, scores, pairs, over_time, gap):
            axes.set_xlim(0, config["steps"])
            axes.set_xlabel("step")
        figure.savefig(path)


def _loss(axes: Axes, points: list[dict[str, float]], config: dict[str, Any]) -> None:
    axes.set_title("Training loss")
    _curve(axes, points, "loss", color=BLUE)
    if all(point["loss"] >= 0 for point in points):  # else by DCL, which may be below
        axes.set_ylim(bottom=0)
    terms = [f"{config['batch_weight']:g} batch"]
    if config["method"] != "batch":
        terms.append(f"{config['memory_weight']:g} memory")
    axes.set_ylabel(f"{losses.title(config['loss'])}, {' + '.join(terms)}")


def _scores(axes: Axes, metrics: dict[str, Any]) -> None:
    """Of the test images by step; with validation of the held-out classes, and of the test images at the end."""
    tested, validation = metrics["history"]["evaluation"], metrics.get("validation")
    points = tested if validation is None else metrics["history"]["validation"]
    if not points:
        axes.set_title("Retrieval")
        _say(axes, textwrap.fill(metrics["not_tested"], 36))
        axes.set_yticks([])
        return
    axes.set_title(f"Retrieval on {tested_on(metrics['config']) if validation is None else 'validation classes'}")
    before = (metrics if validation is None else validation)["before"]
    shown = points if validation is None else [*points, *tested]
    top = 1.15 * max(*(p["recall@1"] for p in shown), before["recall@1"], 1.0)
    near = abs(points[-1]["recall@1"] - points[-1]["map@r"]) < 0.08 * top
    for name, colour in (("recall@1", BLUE), ("map@r", ORANGE)):
        label = {"recall@1": "Recall@1", "map@r": "MAP@R"}[name]
        axes.plot(*_columns(points, "step", name), "o-", color=colour, ms=4)
        axes.annotate(f"{label} {points[-1][name]:.1f}", (points[-1]["step"], points[-1][name]),
                      (-4, -15 if near and name == "map@r" else 7),
                      textcoords="offset points", ha="right", color=colour, fontweight="bold")  # fmt: skip
        axes.axhline(before[name], color=colour, ls=":", lw=1.2)
        axes.annotate(f"backbone alone {before[name]:.1f}", (0, before[name]), (4, 4),
                      textcoords="offset points", color=colour, fontsize=9)  # fmt: skip
    axes.set_ylabel("%")
    axes.set_ylim(0, top)
    if validation is not None:
        _best(axes, validation, tested, tested_on(metrics["config"]))


def _best(axes: Axes, validation: dict[str, Any], tested: list[dict[str, float]], title: str) -> None:
    """The step with the best weights, and what they and the last ones score on what is tested: points of ``tested``."""
    step = validation["step"]
    axes.axvline(step, color=GREY, ls="--", lw=1.2, label=f"best weights, step {step}")
    if tested:
        _tested(axes, tested)
        axes.plot([], [], **DIAMOND, color=GREY, label=f"{title}, at the end")
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=2, fontsize=9, borderaxespad=0.4, frameon=True, framealpha=1, edgecolor="white")


def _tested(axes: Axes, points: list[dict[str, float]]) -> None:
    """A diamond for each score, those of the first point with their values."""
    first = points[0]
    right = first["step"] > axes.get_xlim()[1] / 2
    for name, colour in (("recall@1", BLUE), ("map@r", ORANGE)):
        axes.plot(*_columns(points, "step", name), **DIAMOND, color=colour, clip_on=False, zorder=3)
        axes.annotate(f"{first[name]:.1f}", (first["step"], first[name]), (-8 if right else 8, -3), fontsize=9,
                      color=colour, textcoords="offset points", ha="right" if right else "left")  # fmt: skip


def _staleness_over_time(axes: Axes, points: list[dict[str, float]]) -> None:
    axes.set_title("Staleness of the memory")
    steps = sorted({p["step"] for p in points})
    for name, (label, colour) in STALENESS.items():
        means = [np.mean([p[name] for p in points if p["step"] == step]) for step in steps]
        axes.plot(steps, means, "o-", ms=3, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cosine distance to a fresh embedding")
    axes.legend(loc="best")


def _staleness_by_age(axes: Axes, points: list[dict[str, float]]) -> None:
    axes.set_title("The same, by age of the rows")
    late = [p for p in points if p["step"] > max(q["step"] for q in points) / 2]
    ages = sorted({p["age"] for p in late})
    for name, (_, colour) in STALENESS.items():
        means = [np.mean([p[name] for p in late if p["age"] == age]) for age in ages]
        axes.plot(ages, means, "o-", ms=4, color=colour)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps since stored (mean over the second half of training)")
    axes.set_ylabel("cosine distance to a fresh embedding")


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _pairs(axes: Axes, points: list[dict[str, float]]) -> None:
    axes.set_title("Rows of the memory that count")
    for name, colour in (("positives", GREEN), ("negatives", RED)):
        _curve(axes, [p for p in points if name in p], name, color=colour, label=name)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("per image of the batch")
    axes.legend(loc="best")


def _gap(axes: Axes, points: list[dict[str, float]]) -> None:
    axes.set_title("Moments: memory and batch")
    points = [p for p in points if "gap_before" in p]
    for name, (label, colour) in GAPS.items():
        _curve(axes, points, name, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance of mean and standard deviation")
    axes.legend(loc="best")


def _curve(axes: Axes, points: list[dict[str, float]], name: str, **style: Any) -> None:
    """A line by step; a single point, which makes no line, is a dot."""
    axes.plot(*_columns(points, "step", name), marker="o" if len(points) == 1 else "", ms=4, **style)


def _columns(points: list[dict[str, float]], *names: str) -> list[list[float]]:
    return [[point[name] for point in points] for name in names]


def neighbours(path: Path, data: Dataset, queries: NDArray[np.int64], found: NDArray[np.int64], view: View) -> None:
    """A few test images, as ``view`` shows them, each with its nearest neighbours: positions [n] and [n, >= 1]."""
    part = data.test
    answers = evaluate.answers(part.labels, data.queries, data.gallery)
    asked = np.arange(len(answers)) if data.queries is None else data.queries
    to_find = dict(zip(asked.tolist(), answers.tolist(), strict=True))
    columns = min(NEIGHBOURS, found.shape[1])
    shown = np.concatenate([queries, found[: len(queries), :columns].ravel()]).tolist()
    lines = data.credit_of(part.sources[image] for image in shown)
    credit = ["Pictures:", *_by_two(lines)] if lines else []
    style: dict[Any, Any] = {name: STYLE[name] for name in ("font.size", "savefig.dpi", "text.parse_math")}
    with matplotlib.rc_context(style | {"font.family": fonts.families()}):
        figure = Figure(figsize=(3.1 + 0.92 * (columns + 1), 1.35 + 0.92 * len(queries) + 0.16 * len(credit)))
        width, height = figure.get_size_inches()
        figure.text(0.2 / width, 1 - 0.3 / height, "Nearest test images", fontsize=14, fontweight="bold", va="center")
        trained_on = not set(data.train.classes).isdisjoint(part.classes)
        right = f"of {len(queries)} test images chosen at random"
        right += "" if trained_on else "; their classes were not trained on"
        figure.text(0.2 / width, 1 - 0.58 / height, right, va="center", color="#444444")
        for row, query in enumerate(queries.tolist()):
            bottom = height - 1.95 - 0.92 * row
            label = textwrap.fill(part.classes[part.labels[query]], 24, max_lines=3, placeholder=" …")
            text = f"{label}\n({to_find[query]} to find)"
            figure.text(2.35 / width, (bottom + 0.42) / height, text, ha="right", va="center", fontsize=9)
            for column, image in enumerate([query, *found[row, :columns].tolist()]):
                left = 2.5 + 0.92 * column + (0.3 if column else 0)
                axes = figure.add_axes((left / width, bottom / height, 0.84 / width, 0.84 / height))
                axes.imshow(view(to_tensor(part.images[image])).permute(1, 2, 0).numpy())
                _frame(axes, None if column == 0 else bool(part.labels[image] == part.labels[query]))
                if row == 0:
                    axes.set_title("query" if column == 0 else str(column), fontsize=10, pad=3)
        for i, line in enumerate(reversed(credit)):
            figure.text(0.2 / width, (0.08 + 0.16 * i) / height, line, fontsize=6.5, color="#444444")
        figure.savefig(path)


def _by_two(lines: tuple[str, ...]) -> list[str]:
    """The credit lines, two on each line."""
    return ["    ".join(lines[i : i + 2]) for i in range(0, len(lines), 2)]


def pick_queries(data: Dataset) -> NDArray[np.int64]:
    """The first queries that have something to find, in the order of a hash, of QUERIES different classes: [n]."""
    labels = data.test.labels
    where = np.arange(len(labels)) if data.queries is None else data.queries
    where = where[evaluate.answers(labels, data.queries, data.gallery) > 0]
    order = sorted(where.tolist(), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    first: dict[int, int] = {}
    for i in order:
        first.setdefault(int(labels[i]), i)
    return np.array(list(first.values())[:QUERIES], np.int64)


def _frame(axes: Axes, right: bool | None) -> None:
    """A border, and for neighbours a badge: a green tick, or a red cross."""
    axes.set_xticks([])
    axes.set_yticks([])
    colour = {None: "#444444", True: GREEN, False: RED}[right]
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.0 if right is None else 2.0)
    if right is not None:
        badge = {"boxstyle": "circle,pad=0.12", "facecolor": colour, "edgecolor": "white", "linewidth": 0.8}
        axes.text(0.9, 0.1, "✓" if right else "✗", transform=axes.transAxes, ha="center", va="center",
                  color="white", fontsize=8, fontweight="bold", bbox=badge)  # fmt: skip
