"""The logs of a run besides TensorBoard's: `log.csv` and Weights & Biases."""

from __future__ import annotations

import csv
import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import miniatures
import pytest
from full_disk import files_end_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import checkpoint, events, logs, loop, run
from train.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

STEPS = 12
TIMES = ("seconds", "per_second")


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"batch_size": 4, "steps": STEPS} | changes)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in found]


# ---- log.csv --------------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_step_and_what_was_measured_after_it(shapes: Path, tmp_path: Path) -> None:
    metrics = run.run(settings(shapes, tmp_path))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [str(step) for step in range(1, STEPS + 1)]
    assert list(found[0]) == [
        "step", "seconds", "train/loss", "train/lr", "train/images_per_second", "train/images_prepared_per_second",
        "drift/uncorrected", "drift/in_memory",
        *(f"memory/{n}" for n in ("fill", "age", "positives", "negatives", "gap_before", "gap_after", "gain")),
        *(f"test/{name}" for name in ("recall@1", "recall@10", "recall@100", "map@r")),
    ]  # fmt: skip
    assert all(row["train/loss"] and float(row["train/lr"]) > 0 for row in found)
    assert sum(float(row["train/loss"]) for row in found[:10]) / 10 == pytest.approx(
        metrics["history"]["loss"][0]["loss"]
    )
    scored = {int(row["step"]): float(row["test/map@r"]) for row in found if row["test/map@r"]}
    assert scored == {point["step"]: point["map@r"] for point in metrics["history"]["evaluation"]}
    drift: dict[int, list[float]] = {}
    for point in metrics["history"]["drift"]:
        drift.setdefault(point["step"], []).append(point["in_memory"])
    means = {int(row["step"]): float(row["drift/in_memory"]) for row in found if row["drift/in_memory"]}
    assert means == {step: pytest.approx(sum(values) / len(values)) for step, values in drift.items()}
    memory = {int(row["step"]): float(row["memory/age"]) for row in found if row["memory/age"]}
    assert memory == {point["step"]: point["age"] for point in metrics["history"]["memory"]}


def test_the_best_weights_have_columns_of_their_own(shapes: Path, tmp_path: Path) -> None:
    metrics = run.run(settings(shapes, tmp_path, validation_share=0.5))
    *others, last = rows(tmp_path)
    assert float(last["best/step"]) == metrics["validation"]["step"]
    assert float(last["best/map@r"]) == metrics["map@r"] and float(last["test/map@r"]) == metrics["last"]["map@r"]
    assert not any(row["best/map@r"] or row["test/map@r"] for row in others), "the test is at the end alone"
    assert [row["step"] for row in [*others, last] if row["validation/map@r"]] == ["5", "10", "12"]
    run.run(settings(shapes, tmp_path / "none", test_share=0.0))
    assert not any("test/" in name for name in rows(tmp_path / "none")[0])


@pytest.mark.singly
@pytest.mark.parametrize("stop", [3, 5, 11])
@pytest.mark.parametrize("lost", [0, 2])
def test_a_run_that_goes_on_has_each_step_once(
    stop: int, lost: int, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was killed some steps after its checkpoint, in the middle of a line."""
    run.run(settings(shapes, tmp_path / "straight"))
    parts = settings(shapes, tmp_path / "parts", resume=True)
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(stop))
    if lost:
        with (tmp_path / "parts" / "log.csv").open("a") as file:
            file.write("".join(f"{stop + 1 + i},1,2\n" for i in range(lost)) + "1")
    run.run(parts)
    assert without_times(rows(tmp_path / "parts")) == without_times(rows(tmp_path / "straight"))


def test_tensorboard_keeps_the_step_of_the_checkpoint(shapes: Path, tmp_path: Path) -> None:
    """It is told which step is the first to be void: the one after."""
    parts = settings(shapes, tmp_path, resume=True)
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(5))
    run.run(parts)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in log.Scalars("test/map@r")] == [5, 10, 12]


def test_a_chart_of_a_run_that_was_killed_has_each_step_once(tmp_path: Path) -> None:
    """Its curves have logs of their own."""
    for first, steps in ((1, (4, 8, 12)), (9, (12, 16))):
        log = events.Events(tmp_path, first)
        for step in steps:
            log.chart("drift", {"uncorrected": step / 100, "in memory": first / 100}, step)
        log.close()
    for curve, values in (("uncorrected", (0.04, 0.08, 0.12, 0.16)), ("in memory", (0.01, 0.01, 0.09, 0.09))):
        log = EventAccumulator(str(tmp_path / f"drift_{curve}"))
        log.Reload()
        assert [(event.step, event.value) for event in log.Scalars("drift")] == [
            (step, pytest.approx(value)) for step, value in zip((4, 8, 12, 16), values, strict=True)
        ]


def test_a_run_that_starts_again_begins_the_table_again(shapes: Path, tmp_path: Path) -> None:
    run.run(settings(shapes, tmp_path))
    run.run(settings(shapes, tmp_path, steps=2, overwrite=True, validation_share=0.5))
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"] and "best/step" in rows(tmp_path)[0]


def test_a_table_of_other_columns_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("loss,step,other\n1.5,1,x\n2.5,2,y\n,,\n7,3,z\n")
    table = logs.Table(path, ["loss", "new"], 3)
    table.write({"step": 3, "loss": 0.1, "new": math.inf})
    table.write({"step": 4, "loss": 1e-30})
    assert path.read_text() == "step,loss,new\n1,1.5,\n2,2.5,\n3,0.1,inf\n4,1e-30,\n"
    path.write_bytes(b"\xff")
    logs.Table(path, ["loss"], 3)
    assert path.read_text() == "step,loss\n"


def test_a_table_that_may_not_be_read_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"log.csv failed \(Permission denied\)"):
        patch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
        logs.Table(path, ["loss"], 2)
    assert path.read_text() == "step,loss\n1,0.5\n"


def test_a_table_that_cannot_be_written_is_named(shapes: Path, tmp_path: Path) -> None:
    table = logs.Table(tmp_path / "log.csv", ["loss"], 1)
    with (
        files_end_after(100),
        pytest.raises(ConfigError, match=rf"writing {tmp_path / 'log.csv'} failed \(File too large\)"),
    ):
        for step in range(100):
            table.write({"step": step, "loss": 0.1})
    (tmp_path / "out" / "log.csv").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"log.csv in it is a folder, which no run makes"):
        run.run(settings(shapes, tmp_path / "out"))


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


class Recorder:
    """Stands for wandb, and for its runs: they take steps that ascend and leave out others."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: dict[str, dict[int, dict[str, float]]] = {}
        self.finished: list[int] = []
        self.fails: dict[str, Exception] = {}

    def init(self, **how: Any) -> Any:
        if "init" in self.fails:
            raise self.fails["init"]
        self.begun.append(how)
        steps = self.logged.setdefault(how["id"], {})

        def log(row: dict[str, float], step: int) -> None:
            if "log" in self.fails:
                raise self.fails["log"]
            assert json.dumps(row)
            if step > max(steps, default=0):
                steps[step] = row

        return SimpleNamespace(log=log, finish=lambda exit_code: self.finished.append(exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    stub = SimpleNamespace(init=recorder.init, __spec__=SimpleNamespace(origin="here"))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return recorder


def test_wandb_gets_the_rows_and_the_settings(shapes: Path, tmp_path: Path, wandb: Recorder) -> None:
    config = settings(shapes, tmp_path / "mine", wandb="shoes", validation_share=0.5)
    run.run(config)
    [how] = wandb.begun
    assert (how["project"], how["name"], how["resume"]) == ("shoes", "mine", "allow")
    assert how["config"] == config.settings() and how["dir"] == str(tmp_path / "mine") and wandb.finished == [0]
    [logged] = wandb.logged.values()
    table = rows(tmp_path / "mine")
    assert list(logged) == list(range(1, STEPS + 1))
    for row in table:
        values = {name: float(value) for name, value in row.items() if value and name != "step"}
        assert logged[int(row["step"])] == pytest.approx(values)


def test_a_run_that_goes_on_is_the_same_run_in_wandb(shapes: Path, tmp_path: Path, wandb: Recorder) -> None:
    config = settings(shapes, tmp_path, wandb="shoes")
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(7))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="an unfinished run"):
        run.run(config)
    run.run(replace(config, resume=True))
    assert {how["id"] for how in wandb.begun} == {state["identity"]} and len(wandb.begun) == 2
    assert wandb.finished == [1, 0] and list(wandb.logged[state["identity"]]) == list(range(1, STEPS + 1))
    run.run(replace(config, overwrite=True))
    assert len(wandb.logged) == 2, "one that starts again is another"
    run.run(replace(config, overwrite=True, wandb=None))
    assert len(wandb.begun) == 3 and "identity" not in checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_run_that_goes_on_without_wandb_for_a_while_is_the_same_run_in_it(
    shapes: Path, tmp_path: Path, wandb: Recorder
) -> None:
    config = settings(shapes, tmp_path, wandb="shoes", resume=True)
    for steps, project in ((4, "shoes"), (3, None)):
        with pytest.raises(loop.Interrupted):
            run.run(replace(config, wandb=project), asked_to_stop=miniatures.after(steps))
    run.run(config)
    assert len(wandb.begun) == 2 and len({how["id"] for how in wandb.begun}) == 1


def test_what_wandb_refuses_is_said_in_a_line(
    shapes: Path, tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shapes, tmp_path, wandb="shoes")
    wandb.fails = {"log": RuntimeError("it has gone")}
    with pytest.raises(ConfigError, match="--wandb shoes: it has gone; WANDB_MODE=offline writes to --out alone"):
        run.run(config)
    assert wandb.finished == [1]
    wandb.fails = {"init": RuntimeError("No API key configured. Use `wandb login` to log in.")}
    with pytest.raises(ConfigError, match="--wandb shoes: No API key configured; WANDB_MODE=offline"):
        run.run(replace(config, overwrite=True))


@pytest.mark.parametrize("folder", [False, True])
def test_without_wandb_it_is_said_before_any_work(
    folder: bool, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of that name, in which wandb keeps runs, is no module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if folder:
        (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(run, "_load", lambda config: pytest.fail("data were read"))
    words = ["--wandb", "shoes", "--backbone", "convnet", "--data", f"folder:{shapes}", "--out", str(tmp_path / "out")]
    assert run.main(words) == 2
    assert "error: --wandb shoes: there is no module wandb: pip install wandb\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wandb_itself_offline(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb.sdk")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = settings(shapes, tmp_path, wandb="shoes")
    with pytest.raises(loop.Interrupted):
        run.run(config, asked_to_stop=miniatures.after(7))
    run.run(replace(config, resume=True))
    identity = checkpoint.load(tmp_path / "checkpoint.pt")["identity"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))) >= 1


def test_a_run_that_fails_before_its_first_step_is_a_failed_one(
    shapes: Path, tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise loop.TrainingError("no scores")

    monkeypatch.setattr(loop.Scoring, "before", fails)
    with pytest.raises(loop.TrainingError):
        run.run(settings(shapes, tmp_path, wandb="shoes"))
    assert wandb.finished == [1]
