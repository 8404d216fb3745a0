"""What goes wrong in a study is told in a line: other data, damaged results, runs that cannot begin, killed workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from studies import arguments, small_plan

from train import checkpoint, loop
from train.compare import findings, plan, study, work
from train.compare.plan import TEST, VALIDATION
from train.config import ConfigError
from train.data import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT = '{"config": {}, "failure": null, "seconds": 1, "scores": %s, "drift": [%s]}'


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are done in this process, as in a working one."""
    monkeypatch.setattr(work, "_stop", type("Never", (), {"is_set": staticmethod(lambda: False)}), raising=False)
    monkeypatch.setattr(work, "_data", {})


def coloured(images: Path, classes: int) -> str:
    """A folder data set of so many classes."""
    for c in range(classes):
        (images / f"c{c}").mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (20 * c, 99 * i, 0)).save(images / f"c{c}" / f"{i}.png")
    return f"folder:{images}"


@pytest.mark.long
def test_a_damaged_result_and_too_few_classes_are_told_in_a_line(
    emoji_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_plan().map()[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{run.name}.json").write_text("{ no")
    assert study.main(arguments(emoji_cache, tmp_path)) == 2
    assert f"cannot read {run.name}.json" in (error := capsys.readouterr().err) and "delete it" in error
    too_many = [*arguments(emoji_cache, tmp_path / "other"), "--batch-size", "400", "--memory-sizes", "400"]
    assert study.main([*too_many, "--memory-size", "400", "--batch-sizes", "400"]) == 2
    assert "--batch-size 400 with --samples-per-class 2 needs 200 training classes" in capsys.readouterr().err
    assert not any((tmp_path / "other").iterdir()), "nothing is left"


def test_a_study_does_not_go_on_with_other_data(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop.Trainer, "run", lambda self, *_, **__: self.history["evaluation"].append({"map@r": 1.0}))
    (tmp_path / "runs").mkdir()
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    runs = small_plan(base=base, map_seeds=4).many(VALIDATION, "xbm")
    workshop = work.Workshop(tmp_path / "runs", 1, 1, "cpu")
    for run in runs[:2]:
        assert work._do(workshop, run)
    coloured(tmp_path / "images", 18)
    work._data.clear()
    with pytest.raises(
        ConfigError, match=rf"--out {tmp_path} holds runs on other data: .* class names, .*; train: 18 images"
    ):
        work._do(workshop, runs[2])
    assert capsys.readouterr().err == ""
    (tmp_path / "data.json").unlink()  # as earlier versions left it
    assert work._do(workshop, runs[2])
    assert "runs of an earlier version, which did not store what data it had" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "it is not a dictionary but of type list"),
        ("{}", "config is missing"),
        ('{"config": {}, "scores": 1}', "scores is of type int"),
        (RESULT % ("{}", ""), "recall@1 is missing"),
        (RESULT % ('{"recall@1": 1, "map@r": "x"}', ""), "map@r is of type str"),
        (RESULT % ("null", "1"), "drift is not a dictionary but of type int"),
        (RESULT % ("null", '{"step": 1}'), "age is missing"),
        (RESULT % ('{"recall@1": 1, "map@r": 1, "recall@x": 1}', ""), "recall@x is no score"),
        (RESULT % (f'{{"recall@1": {10**400}, "map@r": 1}}', ""), "recall@1 is a number of 1329 bits"),
        ((RESULT % ("null", "")).replace("{", '{"network": 1, ', 1), "network is of type int"),
    ],
)
def test_a_damaged_result_is_named(content: str, why: str, tmp_path: Path) -> None:
    run, workshop = small_plan().map()[0], work.Workshop(tmp_path, 1, 1, "cpu")
    workshop.path(run).write_text(content)
    with pytest.raises(ConfigError, match=rf"cannot read {workshop.path(run).name} \({why}\); delete it"):
        work.read(workshop, run)


def test_results_with_other_scores_than_others_are_named(tmp_path: Path) -> None:
    workshop = work.Workshop(tmp_path, 1, 1, "cpu")
    scores = {"recall@1": 1.0, "recall@10": 2.0, "map@r": 3.0}
    whole, without = {"scores": scores}, {"scores": {name: scores[name] for name in ("recall@1", "map@r")}}
    work._require_same_scores(workshop, {"a": whole, "b": {"scores": None}, "c": whole})
    with pytest.raises(ConfigError, match=r"b.json has no recall@10, which others have; delete it"):
        work._require_same_scores(workshop, {"a": whole, "b": without})


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (6, "3 training classes, 2 of them held out for validation: two or more have"),
        (16, "with --samples-per-class 2 needs 40 training classes"),
    ],
)
def test_a_run_that_cannot_be_begun_leaves_nothing(here: None, classes: int, why: str, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", classes), image_size=16)
    base = replace(base, batch_size=80, memory_size=80)
    out = tmp_path / "out"
    with pytest.raises((DataError, ConfigError), match=why), work.Workers(
        work.Workshop(out / "runs", 1, 1, "cpu"), lambda: False
    ) as workers:  # fmt: skip
        workers.workshop.folder.mkdir(parents=True)
        work._do(workers.workshop, small_plan(base=base).run(VALIDATION, "xbm", 0))
    assert not any(out.iterdir())


def test_a_batch_size_with_more_classes_than_there_are_is_named_by_the_first_run(here: None, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    words = [*arguments(tmp_path, tmp_path / "out"), "--batch-sizes", "4,8,16"]
    workshop = study.parse([*words, "--data", base.data, "--image-size", "16"])[2]
    workshop.folder.mkdir(parents=True)
    said = (
        r"--batch-sizes 16 with --samples-per-class 2 needs 8 training classes and there are 6: choose --batch-sizes 12"
    )
    for changes in ({}, {"memory_size": 8}):
        with pytest.raises(ConfigError, match=rf"^{said} or less, .* \(a quarter of the training classes is held out"):
            work._do(workshop, small_plan(base=base).run(VALIDATION, "xbm", 0, **changes))
    assert not any(workshop.folder.iterdir())
    assert work._do(workshop, small_plan(base=base).run(TEST, "xbm", 0)), "there are 8, and the base's batch has 4"


def test_a_file_in_the_place_of_a_run_is_named(here: None, tmp_path: Path) -> None:
    run = small_plan().map()[0]
    (tmp_path / run.name).touch()
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / run.name} failed \(File exists\)"):
        work._do(work.Workshop(tmp_path, 1, 1, "cpu"), run)


def test_a_checkpoint_that_is_a_folder_is_named(here: None, tmp_path: Path) -> None:
    base = replace(small_plan().base, data=coloured(tmp_path / "images", 16), image_size=16)
    run = small_plan(base=base).run(VALIDATION, "xbm", 0)
    (tmp_path / "runs" / run.name / checkpoint.CHECKPOINT).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{run.name}: cannot read checkpoint.pt \(not a file\); delete it"):
        work._do(work.Workshop(tmp_path / "runs", 1, 1, "cpu"), run)


def killed(workshop: work.Workshop, run: plan.Run) -> None:
    """Stands for a run that takes more memory than there is."""
    (workshop.folder / run.name).mkdir()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_by_the_system_ends_the_study_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "_do", killed)
    fork = multiprocessing.get_context("fork")  # the killer is known there
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: fork)
    assert study.main(arguments(tmp_path, tmp_path, jobs=1)) == 1
    error = capsys.readouterr().err
    first = small_plan().map()[0].name
    assert "error: the system has ended a working process, most likely because memory ran out" in error
    assert f"unfinished: {first}. The same command continues" in error and "(--jobs, now 1)" in error
    assert "Traceback" not in error


def test_a_signal_to_all_processes_stops_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch system ends a job that way; the working processes end before they can be asked to."""
    monkeypatch.setattr(work, "_do", killed)
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(work.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(study.run, "stop_signals", lambda: nullcontext(lambda: True))
    assert study.main(arguments(tmp_path, tmp_path, jobs=1)) == 130
    assert capsys.readouterr().err.endswith("stopped; the same command continues from here\n")


def test_training_that_breaks_down_counts_as_nothing_found(
    emoji_cache: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_down(*_: Any, **__: Any) -> None:
        raise loop.TrainingError("the loss was nan")

    monkeypatch.setattr(loop.Trainer, "run", breaks_down)
    run = small_plan(base=replace(small_plan().base, cache=emoji_cache)).run(VALIDATION, "xbm", 0)
    (tmp_path / "runs").mkdir()
    result = work._do(work.Workshop(tmp_path / "runs", 1, 1, "cpu"), run)
    assert result is not None and result["scores"] is None and result["failure"] == "the loss was nan"
    assert findings.score(result) == 0
