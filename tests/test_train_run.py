"""Whole runs on drawn shapes, and once on real emoji: what they leave, that they train, and what may not end them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import SCORES, command, settings

from train import checkpoint, loop, losses, run
from train.arguments import parse
from train.augment import evaluation_view
from train.config import METHODS, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.long
def test_a_terminal_that_lacks_characters_ends_no_run(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "Bäume"
    data.symlink_to(shapes)
    arguments = command(
        "--data", f"folder:{data}", "--out", tmp_path / "ö", "--steps", 1, "--backbone", "convnet", "--image-size", 32,
        "--batch-size", 8, "--samples-per-class", 2, "--memory-size", 16, "--threads", 1,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"folder B\\xe4ume, train: " in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("closed", ["stdout", "stderr", "reader", "full", "reader of both"])
def test_a_closed_output_ends_no_run(closed: str, shapes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(shapes, tmp_path / "data"))
    (data / "note.txt").touch()  # which a line says is left out, on standard error
    arguments = command(
        "--data", f"folder:{data}", "--out", tmp_path / "out", "--steps", 4, "--eval-every", 1, "--backbone",
        "convnet", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size", 16, "--threads", 1,
    )  # fmt: skip
    words = "".join(f" '{word}'" for word in [sys.executable, "-u", "-m", "train", *arguments])
    redirected = {
        "stdout": " >&-", "stderr": " 2>&-", "reader": " | head -1", "full": " 2>/dev/full",
        "reader of both": " 2>&1 | true",
    }[closed]  # fmt: skip
    subprocess.run(["sh", "-c", words + redirected], check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 4


def test_more_classes_per_batch_than_there_are(shapes: Path, tmp_path: Path, tiny: None) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 16 with --samples-per-class 2 needs 8 training classes .* 4"):
        run.run(settings(shapes, tmp_path / "out", batch_size=16))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_it_promises(
    method: str, shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run.run(settings(shapes, tmp_path, method=method))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["steps"] == 12 and metrics["seed"] == 0 and metrics["seconds"] > 0
    for scores in (metrics, metrics["before"], metrics["untrained_head"]):
        assert all(0 <= scores[name] <= 100 for name in SCORES)
    assert [entry["step"] for entry in metrics["history"]["evaluation"]] == [5, 10, 12]
    assert metrics["history"]["evaluation"][-1]["map@r"] == metrics["map@r"]
    assert [entry["step"] for entry in metrics["history"]["loss"]] == [10, 12]
    assert {entry["age"] for entry in metrics["history"]["drift"]} == {1, 2, 3}
    memory = metrics["history"]["memory"]
    assert [entry["step"] for entry in memory] == [10, 12]
    names = {"step", "fill", "age", "gap_before", "gap_after"}
    of_pairs, of_filter = {"positives", "negatives"}, {"gain"}
    names |= {"batch": set(), "xbm": of_pairs, "oracle": of_pairs}.get(method, of_pairs | of_filter)
    assert all(set(entry) == names for entry in memory)
    assert method != "xbn" or memory[-1]["gap_after"] < 1e-3 < memory[-1]["gap_before"]
    assert metrics["data"]["train_classes"] == metrics["data"]["test_classes"] == 4
    assert metrics["config"]["memory_size"] == 24 and "out" not in metrics["config"]
    assert (tmp_path / "curves.png").exists() and (tmp_path / "neighbours.png").exists()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    printed = capsys.readouterr().out
    assert "backbone alone" in printed and f"trained, {method}" in printed and str(tmp_path / "curves.png") in printed


@pytest.mark.parametrize("augment", ["mild", "photo", "none"])
def test_the_search_example_sees_a_picture_as_the_run_was_tested(
    augment: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    from examples import search

    run.run(settings(shapes, tmp_path, augment=augment, steps=1))
    searcher = search.Searcher(tmp_path, shapes)
    image = torch.arange(48 * 64 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 48, 64)
    assert torch.equal(searcher.trained.view(image), evaluation_view(32, augment)(image))


def test_the_search_example_leaves_hidden_files_alone_and_says_where_it_shows(
    shapes: Path, tmp_path: Path, tiny: None
) -> None:
    from examples import search

    run.run(settings(shapes, tmp_path / "run", steps=1))
    folder = Path(shutil.copytree(shapes, tmp_path / "folder"))
    (folder / "._picture.png").write_text("what macOS leaves beside a picture")
    (folder / ".thumbnails").mkdir()
    Image.new("RGB", (4, 4)).save(folder / ".thumbnails" / "1.png")
    searcher = search.Searcher(tmp_path / "run", folder)
    assert len(searcher.paths) == 8 * 4  # classes, images of each
    query = searcher.paths[0]
    search.show(query, searcher.nearest(query), tmp_path / "found")
    assert (tmp_path / "found").exists()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_trains(
    name: str, shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps on one batch bring its loss down, and a whole run writes down which loss it was."""
    reduction = {"reduction": "mean"} if name == "contrastive" else {}  # avg_nonzero leaves out pairs that become right
    config = settings(shapes, tmp_path, loss=name, method="batch", lr=0.01, backbone_lr=1.0, steps=30, **reduction)
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    images, labels = trainer.batches[0]
    values = [trainer.train_step([(images, labels)]) for _ in range(config.steps)]
    assert all(map(math.isfinite, values)) and (min(values) >= 0 or name in ("dcl", "dclw"))
    assert np.mean(values[-5:]) < 0.85 * np.mean(values[:5])

    metrics = run.run(settings(shapes, tmp_path, loss=name))
    assert f"axbn, {name.replace('_', '-')} loss, on cpu" in capsys.readouterr().out
    assert all(math.isfinite(point["loss"]) for point in metrics["history"]["loss"])
    stored = checkpoint.load(tmp_path / "checkpoint.pt")["config"]
    assert stored == metrics["config"] and stored["loss"] == name
    assert losses.defaults(name).items() <= stored.items()


def test_losses_differ_from_one_another(shapes: Path, tmp_path: Path, tiny: None) -> None:
    """From one seed on, in what they cost and in what the network becomes."""
    ends = {}
    for name in losses.LOSSES:
        metrics = run.run(settings(shapes, tmp_path / name, loss=name, steps=4, eval_every=0))
        bias = checkpoint.load(tmp_path / name / "checkpoint.pt")["model"]["head.bias"]
        ends[metrics["history"]["loss"][-1]["loss"]] = tuple(bias.tolist())
    assert len(ends) == len(set(ends.values())) == len(losses.LOSSES)


@pytest.mark.parametrize("changes", [{}, {"features": "frozen"}])
def test_working_processes_change_nothing(
    changes: dict[str, Any], shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, workers in (("none", 0), ("two", 2)):
        run.run(settings(shapes, tmp_path / name, workers=workers, augment="photo", eval_every=6, **changes))
        assert " images/s prepared, " in (said := capsys.readouterr().out) and ("2 processes" in said) == (
            name == "two"
        )
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("none", "two")]
    assert miniatures.same(*ends)


def test_a_run_writes_its_settings_and_is_found_by_them(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path / "out", steps=2)
    metrics = run.run(config)
    again = parse(["--config", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "out")])
    assert again.settings() == config.settings()
    assert run.run(again) == metrics  # finished
    other = settings(shapes, tmp_path / "out", steps=3, overwrite=True)
    run.run(other)
    assert parse(["--config", str(tmp_path / "out" / "config.yaml")]).steps == 3


def test_two_runs_of_the_same_settings_agree_and_another_seed_does_not(
    shapes: Path, tmp_path: Path, tiny: None
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run.run(settings(shapes, tmp_path / name, seed=seed, eval_every=0))
    one, two, other = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two", "other"))
    assert miniatures.same(one, two)
    assert not miniatures.same(one["model"], other["model"])


@pytest.mark.long
def test_two_methods_on_real_emoji(emoji_cache: Path, tmp_path: Path) -> None:
    """The whole program as a user runs it, with a pretrained network, on the smallest data that mean something."""
    small = command("--max-classes", 40, "--batch-size", 24, "--memory-size", 96, "--steps", 12, "--eval-every", 6)
    common = [*small, *command("--image-size", 32, "--threads", 1, "--cache", emoji_cache, "--resume")]
    metrics = {}
    for method in ("xbm", "axbn"):
        assert run.main([*common, "--method", method, "--out", str(tmp_path / method)]) == 0
        metrics[method] = json.loads((tmp_path / method / "metrics.json").read_text())
    assert metrics["xbm"]["before"] == metrics["axbn"]["before"]
    assert metrics["xbm"]["history"]["loss"] != metrics["axbn"]["history"]["loss"]
    assert len(metrics["axbn"]["data"]["credit"]) == 8
    for picture in ("xbm/curves.png", "axbn/neighbours.png"):
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 5
    stale = metrics["xbm"]["history"]["drift"]
    assert stale and all(entry["in_memory"] == pytest.approx(entry["uncorrected"], abs=1e-6) for entry in stale)
