"""The best weights by held-out training classes, `--validation-share`; and runs that test nothing, `--test-share 0`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pages import Page
from torch import Tensor, nn

from train import checkpoint, embed, export, loop, pictures, report, results, run, scoring, search
from train.best import Best
from train.config import Config, ConfigError
from train.scoring import VALIDATION
from train.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
GOOD = {5: 10.0, 10: 30.0, 12: 20.0}
"""MAP@R of the validation classes, by step: that of step 10 is the best."""


@pytest.fixture
def scripted(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of the validation classes are those of GOOD."""
    original = scoring.Scoring._of

    def scores(self: scoring.Scoring, embeddings: Tensor, part: str, steps: int) -> dict[str, float]:
        found = original(self, embeddings, part, steps)
        return found | {"map@r": GOOD[steps]} if part == VALIDATION and steps in GOOD else found

    monkeypatch.setattr(scoring.Scoring, "_of", scores)


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"batch_size": 4, "steps": STEPS, "validation_share": 0.5} | changes)


def weights(path: Path) -> Any:
    return checkpoint.load(path, kinds=checkpoint.WEIGHTS)


# ---- the best weights -----------------------------------------------------------------------------------------------


def test_the_best_are_the_first_with_the_highest_score_and_the_network_stays_as_it_is() -> None:
    network, best = nn.Linear(2, 1), Best("map@r")
    for step, score, expected in ((1, 5.0, True), (2, 5.0, False), (3, 7.0, True), (4, 6.0, False)):
        with torch.no_grad():
            network.weight.fill_(step)
        assert best.offer(step, {"map@r": score, "recall@1": -step}, network) is expected
    assert best.step == 3 and best.scores["recall@1"] == -3
    with pytest.raises(ZeroDivisionError), best.used(network):
        assert network.weight.tolist() == [[3.0, 3.0]]
        raise ZeroDivisionError
    assert network.weight.tolist() == [[4.0, 4.0]]
    again = Best("map@r")
    again.load_state_dict(best.state_dict())
    assert miniatures.same(again.state_dict(), best.state_dict())


def test_the_test_is_by_the_weights_that_are_best_on_held_out_training_classes(
    shapes: Path, tmp_path: Path, scripted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run.run(settings(shapes, tmp_path / "whole"))
    said = capsys.readouterr().out
    with pytest.raises(loop.Interrupted):
        run.run(settings(shapes, tmp_path / "stopped"), asked_to_stop=miniatures.after(10))
    then = checkpoint.load(tmp_path / "stopped" / "checkpoint.pt")["model"]
    kept, last = weights(tmp_path / "whole" / "best.pt"), checkpoint.load(tmp_path / "whole" / "checkpoint.pt")
    assert kept["step"] == 10 and miniatures.same(kept["model"], then) and not miniatures.same(last["model"], then)
    assert miniatures.same(last["best"]["model"], then) and miniatures.same(kept["config"], last["config"])

    assert [(p["step"], p["map@r"]) for p in metrics["history"]["validation"]] == list(GOOD.items())
    assert [p["step"] for p in metrics["history"]["evaluation"]] == [10, 12], "the test classes at the end alone"
    by_best, by_last = metrics["history"]["evaluation"]
    assert metrics["map@r"] == by_best["map@r"] and metrics["last"]["map@r"] == by_last["map@r"]
    found = metrics["validation"]
    assert (found["step"], found["by"], found["best"]["map@r"], found["last"]["map@r"]) == (10, "map@r", 30.0, 20.0)
    assert found["before"] != metrics["before"] and found["before"].keys() == metrics["before"].keys()
    assert (metrics["data"]["train_classes"], metrics["data"]["validation_classes"]) == (2, 2)
    assert metrics["config"]["validation_share"] == 0.5 and metrics["data"]["test_classes"] == 4

    assert said.count("step    10: validation ") == 1 and ", map@r 30.0, the best so far\n" in said
    assert "step    12: validation " in said and "map@r 20.0\n" in said
    assert "validation classes, %" in said and "trained, axbn, best: step 10" in said
    assert said.index("test classes, %") < said.index("trained, axbn, last: step 12") < said.index("validation classes")


def test_another_score_may_decide(shapes: Path, tmp_path: Path, scripted: None) -> None:
    metrics = run.run(settings(shapes, tmp_path, best="recall@1"))
    points = metrics["history"]["validation"]
    best = max(points, key=lambda point: (point["recall@1"], -point["step"]))
    assert metrics["validation"]["step"] == best["step"] and metrics["validation"]["by"] == "recall@1"


def test_if_the_last_weights_are_the_best_they_are_scored_once(shapes: Path, tmp_path: Path, no_pictures: None) -> None:
    metrics = run.run(settings(shapes, tmp_path, eval_every=0))
    assert [p["step"] for p in metrics["history"]["evaluation"]] == [12] == [metrics["validation"]["step"]]
    assert miniatures.same(weights(tmp_path / "best.pt")["model"], checkpoint.load(tmp_path / "checkpoint.pt")["model"])
    assert list(results.tables(metrics)["test classes"]) == [
        "backbone alone", "untrained head", "trained, axbn, best: step 12"
    ]  # fmt: skip


def test_without_validation_there_is_nothing_of_it(shapes: Path, tmp_path: Path, no_pictures: None) -> None:
    metrics = run.run(settings(shapes, tmp_path, validation_share=0.0))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml", "checkpoint.pt", "metrics.json", "curves.png", "neighbours.png", "log.csv", "tensorboard"
    }  # fmt: skip
    assert "best" not in state and set(state["history"]) == {"loss", "evaluation", "drift", "memory"}
    assert not {"validation", "last", "not_tested"} & metrics.keys() and "validation_images" not in metrics["data"]
    assert set(state["before"]) == {"frozen", "untrained_head"}


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.singly
@pytest.mark.parametrize("stop", [1, 5, 7, 11])
@pytest.mark.parametrize("changes", [{}, {"features": "frozen", "test_share": 0.0}])
def test_a_continued_run_has_the_same_best_weights(
    stop: int, changes: dict[str, Any], shapes: Path, tmp_path: Path, scripted: None
) -> None:
    run.run(settings(shapes, tmp_path / "straight", **changes))
    part = settings(shapes, tmp_path / "parts", resume=True, **changes)
    with pytest.raises(loop.Interrupted):
        run.run(part, asked_to_stop=miniatures.after(stop))
    assert (tmp_path / "parts" / "best.pt").exists() == (stop >= 5)
    run.run(part)
    ends = [[load(tmp_path / name) for name in ("straight", "parts")] for load in (
        lambda path: checkpoint.load(path / "checkpoint.pt"), lambda path: weights(path / "best.pt"),
        lambda path: json.loads((path / "metrics.json").read_text()),
    )]  # fmt: skip
    assert all(miniatures.same(*pair) for pair in ends) and ends[1][0]["step"] == 10


@pytest.mark.parametrize("time", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_dies_between_its_two_files_goes_on_from_there(
    time: int, shapes: Path, tmp_path: Path, scripted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written, and the best weights in it are not yet in a file of their own."""
    run.run(settings(shapes, tmp_path / "straight"))
    original, left = checkpoint.save, [time]

    def dies(path: Path, state: dict[str, Any]) -> None:
        left[0] -= path.name == "best.pt"
        if path.name == "best.pt" and left[0] == 0:
            raise SystemExit(9)
        original(path, state)

    monkeypatch.setattr(checkpoint, "save", dies)
    config = settings(shapes, tmp_path / "killed", resume=True)
    with pytest.raises(SystemExit):
        run.run(config)
    monkeypatch.setattr(checkpoint, "save", original)
    state = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")
    assert state["step"] == state["best"]["step"] == (5, 10)[time - 1]
    assert Trained(tmp_path / "killed").step == (5, 10)[time - 1]
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(1))
    assert miniatures.same(weights(tmp_path / "killed" / "best.pt")["model"], state["best"]["model"]), (
        "made up for at once"
    )
    run.run(config)
    for name in ("checkpoint.pt", "best.pt"):
        assert miniatures.same(*(weights(tmp_path / folder / name) for folder in ("straight", "killed")))


def test_best_weights_that_are_gone_or_broken_are_written_again(shapes: Path, tmp_path: Path, scripted: None) -> None:
    config = settings(shapes, tmp_path, resume=True)
    run.run(config)
    before = weights(tmp_path / "best.pt")
    (tmp_path / "metrics.json").unlink()  # killed just before it was written
    (tmp_path / "best.pt").write_text("broken")
    assert run.run(config)["validation"]["step"] == 10
    assert miniatures.same(weights(tmp_path / "best.pt"), before)


def test_a_run_that_starts_again_removes_the_best_weights(shapes: Path, tmp_path: Path, scripted: None) -> None:
    run.run(settings(shapes, tmp_path))
    with pytest.raises(ConfigError, match=r"other settings \(--validation-share 0.5 there, 0.0 now\)"):
        run.run(settings(shapes, tmp_path, validation_share=0.0))
    run.run(settings(shapes, tmp_path, validation_share=0.0, overwrite=True))
    assert not (tmp_path / "best.pt").exists() and Trained(tmp_path).step == 12
    (tmp_path / "best.pt").mkdir()
    with pytest.raises(ConfigError, match=r"best.pt in it is a folder, which no run makes"):
        run.run(settings(shapes, tmp_path))


NEW = ("test_share", "test_of", "validation_share", "best")


def test_a_run_of_an_earlier_version_goes_on_and_is_shown(shapes: Path, tmp_path: Path, no_pictures: None) -> None:
    """Its checkpoint and its metrics do not have the settings that have been added since."""
    config = settings(shapes, tmp_path, validation_share=0.0)
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(3))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    state["config"] = {name: value for name, value in state["config"].items() if name not in NEW}
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert Trained(tmp_path).step == 3 and not set(NEW) & Trained(tmp_path).stored.keys(), "nor does its digest change"
    for name, value, now in (("test_share", 0.4, "None there, 0.4 now"), ("validation_share", 0.5, "0.0 there, 0.5")):
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} {now}"):
            run.run(replace(config, resume=True, **{name: value}))
    metrics = run.run(replace(config, resume=True))
    assert metrics["steps"] == 12
    metrics["config"] = {name: value for name, value in metrics["config"].items() if name not in NEW}
    checkpoint.write_metrics(tmp_path, metrics)
    assert run.run(config) == metrics and list(results.tables(metrics)) == ["test classes"]
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.long
def test_a_killed_run_keeps_its_best_weights(shapes: Path, tmp_path: Path, no_pictures: None) -> None:
    words = (
        "--data", f"folder:{shapes}", "--image-size", 32, "--batch-size", 4, "--samples-per-class", 2, "--memory-size",
        16, "--backbone", "convnet", "--steps", 120, "--eval-every", 2, "--validation-share", 0.5, "--threads", 1,
        "--resume", "--out",
    )  # fmt: skip
    arguments = [str(word) for word in words]
    killed = tmp_path / "killed"
    for least in (1, 50):
        command = [sys.executable, "-m", "train", *arguments, str(killed)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((killed / "best.pt").exists() and checkpoint.load(killed / "checkpoint.pt")["step"] >= least):
            assert process.poll() is None
        process.kill()
        process.wait(60)
        assert Trained(killed).step <= checkpoint.load(killed / "checkpoint.pt")["step"]
    for name in ("whole", "killed"):
        assert run.main([*arguments, str(tmp_path / name)]) == 0
    for name in ("checkpoint.pt", "best.pt"):
        assert miniatures.same(*(weights(tmp_path / folder / name) for folder in ("whole", "killed")))


# ---- making use of them ---------------------------------------------------------------------------------------------


def test_the_best_weights_are_used_unless_others_are_asked_for(
    shapes: Path, tmp_path: Path, scripted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    its = tmp_path / "run"
    run.run(settings(shapes, its))
    assert (Trained(its).step, Trained(its, "best").step, Trained(its, "last").step) == (10, 10, 12)
    for which, step in (([], 10), (["--weights-of", "best"], 10), (["--weights-of", "last"], 12)):
        assert embed.main([str(its), str(shapes), "--out", str(tmp_path / "all"), *which]) == 0
        assert json.loads((tmp_path / "all.json").read_text())["step"] == step
    query = str(next(shapes.rglob("*.png")))
    found = [
        str(its),
        str(shapes),
        query,
        "--embeddings",
        str(tmp_path / "all"),
        "--out",
        str(tmp_path / "search.html"),
    ]
    assert search.main([*found, "--weights-of", "last"]) == 0
    capsys.readouterr()
    assert search.main(found) == 2
    assert f"of {its.resolve()} at step 12, not of {its.resolve()} at step 10" in capsys.readouterr().err
    digest, best = Trained(its).digest(), checkpoint.load(its / "best.pt", kinds=checkpoint.WEIGHTS)
    earlier = {name: torch.zeros_like(t) for name, t in best["model"].items()}
    checkpoint.save(its / "best.pt", best | {"step": 8, "model": earlier})  # as a kill between the two writes leaves it
    assert Trained(its).step == 10 and Trained(its).digest() == digest
    (its / "best.pt").write_text("text")
    assert export.main([str(its)]) == 2 and "cannot read best.pt" in capsys.readouterr().err
    (its / "best.pt").unlink()
    found_in = [Trained(its, which) for which in (None, "best", "last")]
    assert [network.step for network in found_in] == [10, 10, 12], "the checkpoint has them, too"
    kept = [network.digest() for network in found_in]
    assert kept[:2] == [digest] * 2 and kept[2] != digest
    state = checkpoint.load(its / "checkpoint.pt")
    checkpoint.save(its / "checkpoint.pt", state | {"best": {"step": 10}})
    assert export.main([str(its)]) == 2 and "cannot read checkpoint.pt (model is missing)" in capsys.readouterr().err
    checkpoint.save(its / "checkpoint.pt", state | {"best": {"step": None, "scores": {}, "model": {}}})
    assert Trained(its).step == 12
    assert export.main([str(its), "--weights-of", "best"]) == 2
    said = f"--weights-of best: RUN {its} has no best weights: it has no --validation-share, or no scores yet"
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_the_weights_that_are_exported(shapes: Path, tmp_path: Path, scripted: None) -> None:
    run.run(settings(shapes, tmp_path))
    for which, step in (([], 10), (["--weights-of", "last"], 12)):
        assert export.main([str(tmp_path), "--out", str(tmp_path / "out"), *which]) == 0
        assert json.loads((tmp_path / "out" / export.ABOUT).read_text())["step"] == step


def test_a_page_and_a_picture_have_validation_and_test_apart(shapes: Path, tmp_path: Path, scripted: None) -> None:
    metrics = run.run(settings(shapes, tmp_path))
    assert report.main([str(tmp_path)]) == 0
    text = Page(tmp_path / "report.html").text
    assert "Recall@1, test classes" in text and "Scores on the test classes, %" in text
    assert "Scores on the validation classes, %" in text and "trained, axbn, best: step 10" in text
    axes = Figure().subplots()
    pictures._scores(axes, metrics)
    assert axes.get_title() == "Retrieval on validation classes"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "best weights, step 10", "test classes, at the end"
    ]  # fmt: skip
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"] == [[5, 10, 12]] * 2
    tested = [line for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in tested] == [[10, 12]] * 2
    assert tested[0].get_ydata().tolist() == [metrics["recall@1"], metrics["last"]["recall@1"]]


# ---- nothing tested -------------------------------------------------------------------------------------------------


@pytest.mark.singly
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("features", ["live", "frozen"])
def test_a_run_may_test_nothing(
    share: float, features: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    figures: list[Figure] = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda figure, path: figures.append(figure) or path.touch())
    changes = {"validation_share": share, "features": features, "test_share": 0.0, "eval_every": 5}
    its, config = tmp_path / "run", settings(shapes, tmp_path / "run", **changes)
    metrics = run.run(config)
    nothing = "nothing is tested: --test-share 0 leaves all images to training"
    assert metrics == json.loads((its / "metrics.json").read_text())
    assert metrics["not_tested"] == nothing and "map@r" not in metrics and metrics["before"] == {}
    assert metrics["history"]["evaluation"] == [] and ("validation" in metrics) == (share > 0)
    assert metrics["data"]["train_classes"] == (8 if share == 0 else 6) and metrics["data"]["test_images"] == 0
    said = capsys.readouterr().out
    assert nothing in said and ", no test" in said and ("validation classes, %" in said) == (share > 0)
    assert "test classes" not in said and "neighbours.png" not in said
    assert {path.name for path in its.iterdir()} == {
        "config.yaml", "checkpoint.pt", "metrics.json", "curves.png", "log.csv", "tensorboard",
        *(["best.pt"] if share else []),
    }  # fmt: skip
    (figure,) = figures
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.2 for axes in figure.axes), "no panel is squeezed"
    shown = [text.get_text().replace("\n", " ") for text in figure.axes[1].texts]
    assert (nothing in shown) == (share == 0)

    assert run.run(config) == metrics, "it is finished"
    assert report.main([str(its)]) == 0
    text = Page(its / "report.html").text
    assert nothing.capitalize() in text and "Nearest neighbours" not in text
    assert ("Recall@1, validation classes" in text) == (share > 0)
    assert embed.main([str(its), str(shapes), "--out", str(tmp_path / "all")]) == 0
    assert np.load(tmp_path / "all.npy").shape == (32, 8)


def test_known_classes_may_be_tested_with_other_images(
    shapes: Path, tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run.run(settings(shapes, tmp_path, test_of="images", validation_share=0.25))
    assert metrics["data"] | {"credit": 0} == metrics["data"] | {
        "train_classes": 6, "validation_classes": 2, "test_classes": 8, "test_images": 16, "credit": 0
    }  # fmt: skip
    assert "test images, %" in capsys.readouterr().out
    axes = Figure().subplots()
    pictures._scores(axes, {name: value for name, value in metrics.items() if name != "validation"})
    assert axes.get_title() == "Retrieval on test images"
