"""The pictures of a run: its curves, and images with their neighbours and the names of their classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_runs import settings

from train import fonts, pictures, run
from train.augment import evaluation_view
from train.config import Config
from train.data import Dataset, Part

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_curves_name_the_loss() -> None:
    axes = Figure().subplots()
    pictures._loss(axes, [{"step": 1, "loss": 2.0}], Config(loss="multi_similarity", batch_weight=0.5).settings())
    assert axes.get_ylabel() == "multi-similarity loss, 0.5 batch + 1 memory"
    pictures._loss(axes, [{"step": 1, "loss": 2.0}], Config(method="batch").settings())
    assert axes.get_ylabel() == "contrastive loss, 1 batch"


def test_the_curve_of_a_loss_below_zero_is_in_the_picture() -> None:
    for values, bottom in (([2.0, 0.5], 0.0), ([-7.0, -8.0], None)):
        axes = Figure().subplots()
        points = [{"step": step, "loss": loss} for step, loss in enumerate(values)]
        pictures._loss(axes, points, Config(loss="dcl").settings())
        low, high = axes.get_ylim()
        assert low <= min(values) < max(values) <= high and bottom in (None, low)


def test_a_single_point_of_a_curve_is_seen() -> None:
    of_memory = {"step": 4, "positives": 1.0, "negatives": 2.0, "gap_before": 0.2, "gap_after": 0.1}
    draw_loss = partial(pictures._loss, config=Config().settings())
    for draw, point in (
        (draw_loss, {"step": 4, "loss": 2.0}),
        (pictures._pairs, of_memory),
        (pictures._gap, of_memory),
    ):
        for count, marker in ((1, "o"), (2, "")):
            axes = Figure().subplots()
            draw(axes, [point] * count)
            assert {line.get_marker() for line in axes.get_lines()} == {marker}


def test_curves_without_a_measurement_say_so(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drift = {"step": 4, "age": 2, "uncorrected": 0.2, "in_memory": 0.1}
    metrics = run.run(settings(shapes, tmp_path, steps=4))
    monkeypatch.undo()
    said: list[str] = []
    monkeypatch.setattr(pictures, "_say", lambda axes, words: said.append(words))
    monkeypatch.setattr(pictures.Figure, "savefig", lambda *_: None)
    for points, times in (([], 2), ([drift], 0)):
        metrics["history"]["drift"] = points
        said.clear()
        pictures.curves(tmp_path / "x.png", metrics)
        assert said == times * ["not measured: the run was too short"]


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    part = Part([np.zeros((8, 8, 3), np.uint8)] * 4, np.array([0, 0, 1, 1]), ("$\\frac{$", "a $5"), ("", "", "", ""))
    data = Dataset("$\\frac{$", part, part, mirror=True)
    nearest = np.array([[1, 2], [3, 0]])
    pictures.neighbours(tmp_path / "x.png", data, np.array([0, 2]), nearest, evaluation_view(8))
    assert (tmp_path / "x.png").exists()


def test_fonts_of_other_scripts_come_after_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts.font_manager, "get_font_names", lambda: ["Comic Sans MS", "Malgun Gothic", "Yu Gothic"])
    assert fonts.families() == ["DejaVu Sans", "Yu Gothic", "Malgun Gothic"]
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda *_, **__: drawn.append(matplotlib.rcParams["font.family"]))
    monkeypatch.setattr(fonts, "families", lambda: ["DejaVu Sans", "Another"])
    part = Part([np.zeros((8, 8, 3), np.uint8)] * 4, np.array([0, 0, 1, 1]), ("猫", "犬"), ("", "", "", ""))
    nearest = np.array([[1, 2], [3, 0]])
    pictures.neighbours(
        Path("x.png"), Dataset("動物", part, part, mirror=True), nearest[:, 0], nearest, evaluation_view(8)
    )
    assert drawn == [["DejaVu Sans", "Another"]]
