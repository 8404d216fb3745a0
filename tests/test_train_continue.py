"""A run that is stopped or killed goes on to the same numbers, and never with other settings or other data."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from tiny_runs import SCORES, TinyBackbone, command, settings

from train import checkpoint, loop, run
from train.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.singly
@pytest.mark.parametrize(
    ("method", "update"), [("axbn", "inplace"), ("axbn", "deferred"), ("xbm", "inplace"), ("oracle", "inplace")]
)
@pytest.mark.parametrize("stop", [1, 4, 6])  # 4: an evaluation is due
def test_a_continued_run_ends_where_an_uninterrupted_one_does(
    method: str, update: str, stop: int, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    straight = run.run(settings(shapes, tmp_path / "straight", method=method, update=update, eval_every=4))
    part = settings(shapes, tmp_path / "parts", method=method, update=update, eval_every=4, resume=True)
    with pytest.raises(loop.Interrupted):
        run.run(part, asked_to_stop=miniatures.after(stop))
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == stop
    torch.manual_seed(100)  # whatever happened in between
    continued = run.run(part)
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")]
    assert ends[0]["step"] == 12
    assert miniatures.same(*ends)
    for name in (*SCORES, "before", "history"):
        assert miniatures.same(straight[name], continued[name])


@pytest.mark.singly
@pytest.mark.parametrize("changes", [{"freeze": 0.0}, {"freeze": 0.5}, {"features": "frozen"}])
@pytest.mark.parametrize("pretrained", [(False, True), (True, False), (True, True)])
def test_a_continued_run_keeps_the_weights_that_it_began_with(
    changes: dict[str, Any], pretrained: tuple[bool, bool], shapes: Path, tmp_path: Path, tiny: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also if pretrained ones have come to the machine since, have gone or are others."""
    straight, parts = (settings(shapes, tmp_path / name, **changes) for name in ("straight", "parts"))
    for now in range(2):

        def build(config: Config, now: int = now) -> Any:
            backbone = TinyBackbone()
            with torch.no_grad():
                backbone.conv.weight.add_(now)
            return backbone, 12, run.model.Normalisation((0.0,) * 3, (255.0,) * 3), (pretrained[now], f"weights {now}")

        monkeypatch.setattr("train.backbones._torchvision", build)
        if now == 0:
            run.run(straight)
            with pytest.raises(loop.Interrupted):
                run.run(parts, asked_to_stop=miniatures.after(6))
    assert run.run(replace(parts, resume=True))["backbone"] == "resnet18: weights 0"
    assert miniatures.same(*(checkpoint.load(config.folder / "checkpoint.pt") for config in (straight, parts)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_in_16_bits_trains_and_continues_exactly(
    precision: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    changes = {"precision": precision, "optimizer": "adam", "schedule": "step", "augment": "photo", "eval_every": 4}
    straight = run.run(settings(shapes, tmp_path / "straight", **changes))
    part = settings(shapes, tmp_path / "parts", resume=True, **changes)
    with pytest.raises(loop.Interrupted):
        run.run(part, asked_to_stop=miniatures.after(5))
    run.run(part)
    ends = [checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("straight", "parts")]
    assert miniatures.same(*ends)
    assert bool(ends[0]["scaler"]) == (precision == "float16")
    assert all(value.dtype == torch.float32 for name, value in ends[0]["model"].items() if "batches" not in name)
    assert all(math.isfinite(point["loss"]) for point in straight["history"]["loss"])
    full = run.run(settings(shapes, tmp_path / "full", **changes | {"precision": "float32"}))
    assert full["history"]["loss"] != straight["history"]["loss"]
    assert full["history"]["loss"][0]["loss"] == pytest.approx(straight["history"]["loss"][0]["loss"], rel=0.05)


def test_a_finished_run_is_not_repeated(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run.run(settings(shapes, tmp_path))
    monkeypatch.setattr(run.model, "build", lambda config: pytest.fail("did work"))
    capsys.readouterr()
    for changes in ({}, {"resume": True}, {"eval_every": 3, "threads": 0}):
        assert run.run(settings(shapes, tmp_path, **changes)) == first
        assert "finished" in (printed := capsys.readouterr().out) and "trained, axbn" in printed
    with pytest.raises(ConfigError, match=r"a finished run with other settings \(--lr 0.001 there, 0.5 now\)"):
        run.run(settings(shapes, tmp_path, lr=0.5))


def test_an_unfinished_run_is_neither_lost_nor_mixed_up(shapes: Path, tmp_path: Path, tiny: None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(loop.Interrupted):
        run.run(settings(shapes, tmp_path), asked_to_stop=miniatures.after(3))
    with pytest.raises(ConfigError, match="holds an unfinished run: continue it with --resume, or --overwrite it"):
        run.run(settings(shapes, tmp_path))
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings .*--seed 0 there, 1 now"):
        run.run(settings(shapes, tmp_path, seed=1, resume=True))
    with pytest.raises(ConfigError, match=r"--loss contrastive there, supcon now; .*--temperature None there, 0.1 now"):
        run.run(settings(shapes, tmp_path, loss="supcon", resume=True))
    with pytest.raises(ConfigError, match=r"an unfinished run with other settings \(--neg-margin 0.5 there, 0.4 now\)"):
        run.run(settings(shapes, tmp_path, neg_margin=0.4, resume=True))
    others = tmp_path / "tensorboard" / "mine"
    others.mkdir()
    (others / "events.out.tfevents.0").touch()
    before = set((tmp_path / "tensorboard").rglob("events.*"))
    assert len(before) == 4, "the run's, those of its two curves in one chart, and another's"
    metrics = run.run(settings(shapes, tmp_path, seed=1, overwrite=True))
    assert metrics["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine", "--overwrite removes what runs write and nothing else"
    now = set((tmp_path / "tensorboard").rglob("events.*"))
    assert before & now == set(others.iterdir()) and len(now) == 4, "of the earlier run no curve is left"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda path: shutil.rmtree(path / "corners-05"), "its class names, "),
        (lambda path: (path / "corners-05").rename(path / "corners-11"), "class names, image names"),
        (lambda path: swap(path / "corners-03" / "red.png", path / "corners-08" / "red.png"), "its images \\("),
        (lambda path: (path / "corners-05" / "red.png").rename(path / "corners-05" / "a.png"), "its image names"),
        (
            lambda path: shutil.copy(path / "corners-05" / "red.png", path / "corners-05" / "a.png"),
            "its labels, image names, images",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    change: Callable[[Path], Any], where: str, shapes: Path, tmp_path: Path, tiny: None
) -> None:
    path, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(shapes, path)
    config = settings(path, out, batch_size=4)
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(3))
    before = (out / "checkpoint.pt").read_bytes()
    change(path)
    with pytest.raises(ConfigError, match=rf"an unfinished run on other data: .* has changed since in .*{where}"):
        run.run(replace(config, resume=True))
    assert (out / "checkpoint.pt").read_bytes() == before
    assert run.run(replace(config, overwrite=True))["steps"] == 12


def swap(one: Path, other: Path) -> None:
    """Of two files each gets the content of the other."""
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) != len(second)
    one.write_bytes(second)
    other.write_bytes(first)


def test_a_checkpoint_of_an_earlier_version_goes_on_with_a_note(
    shapes: Path, tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(loop.Interrupted):
        run.run(settings(shapes, tmp_path), asked_to_stop=miniatures.after(3))
    stored = checkpoint.load(tmp_path / "checkpoint.pt")
    del stored["data"], stored["start"]
    checkpoint.save(tmp_path / "checkpoint.pt", stored)
    assert run.run(settings(shapes, tmp_path, resume=True))["steps"] == 12
    assert f"make sure that --data folder:{shapes} has not changed since" in capsys.readouterr().err
    assert set(checkpoint.load(tmp_path / "checkpoint.pt")["data"]) >= {"class names", "labels", "images"}


def test_resume_without_a_run_starts_one(shapes: Path, tmp_path: Path, tiny: None) -> None:
    assert run.run(settings(shapes, tmp_path / "new", resume=True))["steps"] == 12


@pytest.mark.long
def test_ctrl_c_leaves_a_run_that_can_be_continued(shapes: Path, tmp_path: Path) -> None:
    small = command(
        "--data", f"folder:{shapes}", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size",
        16,
    )  # fmt: skip
    arguments = [*small, "--steps", "100000", "--eval-every", "100000", "--threads", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "train", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )  # fmt: skip  # -u: into a pipe it would write by the page, so next to nothing before its end
    assert process.stdout is not None
    for line in process.stdout:
        if "results in" in line:
            break
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "with --resume continues" in error
    assert 0 < checkpoint.load(tmp_path / "checkpoint.pt")["step"] < 100000


@pytest.mark.parametrize(("begun", "instead"), [(True, ""), (True, "--overwrite"), (False, "")])
def test_ctrl_c_outside_of_training_ends_in_a_line(
    begun: bool, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> None:
        if begun:
            (tmp_path / "checkpoint.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_load", interrupted)
    assert run.main(command("--backbone", "convnet", "--image-size", 32, "--out", tmp_path, *instead.split())) == 130
    changed = f"--resume in place of {instead}" if instead else "--resume"
    goes_on = f"; the same command with {changed} continues from {tmp_path}"
    assert capsys.readouterr().err == f"stopped{goes_on if begun else ''}\n"


def test_ctrl_c_before_anything_is_overwritten_is_no_run_to_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(run, "_load", interrupted)
    assert run.main(command("--backbone", "convnet", "--image-size", 32, "--out", tmp_path, "--overwrite")) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.long
def test_a_killed_run_continues_from_its_last_checkpoint_to_the_same_numbers(
    shapes: Path, tmp_path: Path, no_pictures: None
) -> None:
    small = command(
        "--data", f"folder:{shapes}", "--image-size", 32, "--batch-size", 8, "--samples-per-class", 2, "--memory-size",
        16, "--backbone", "convnet", "--steps", 100, "--eval-every", 20, "--threads", 1, "--resume", "--out",
    )  # fmt: skip
    arguments = [sys.executable, "-m", "train", *small, str(tmp_path / "killed")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stored = tmp_path / "killed" / "checkpoint.pt"
    while not (stored.exists() and checkpoint.load(stored)["step"] > 0):
        assert process.poll() is None
    process.kill()
    process.wait(60)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    found = []
    for name in ("whole", "killed"):
        assert run.main([*small, str(tmp_path / name)]) == 0
        history = json.loads((tmp_path / name / "metrics.json").read_text())["history"]
        found.append(history | {"evaluation": [{**point, "seconds": 0} for point in history["evaluation"]]})
    assert found[0] == found[1]
