"""Processes that prepare images: how many there are, how fast they are, and what goes wrong there is told in a line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from train import loading
from train.augment import EvaluationBatches, TrainingBatches
from train.data import DataError, Part, Pixels, svg
from train.features import as_they_are
from train.loading import FEW, MOST, Rates, plain_errors, workers
from xbn_ext import ClassBalancedSampler

ROOT = Path(__file__).parent.parent


NO_SPACE = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


class Broken(Dataset[torch.Tensor]):
    """Stands for images; a working process cannot read one."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how in (NO_SPACE, "a bug"):
            return Lost(self.how)  # type: ignore[return-value]
        raise DataError("--data: cannot read image a.png: cut short\n  or worse")


class Lost:
    """Does not get into the queue."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __reduce__(self) -> str:
        raise RuntimeError(self.why)


def load(how: str) -> None:
    """Asks for the images in a process of its own."""
    with plain_errors():
        loader = DataLoader(
            Broken(how), None, num_workers=1, multiprocessing_context="fork", worker_init_fn=loading.begin
        )
        list(loading.batches(loader))


def test_an_unreadable_image_is_named_without_a_traceback() -> None:
    with pytest.raises(DataError, match=r"^--data: cannot read image a\.png: cut short\n  or worse$"):
        load("unreadable")


@pytest.mark.long
def test_a_killed_process_is_told_with_advice() -> None:
    with pytest.raises(DataError, match=r"--workers: the system has ended a process .* fewer --workers need less"):
        load("killed")


def test_a_batch_that_does_not_arrive_is_not_waited_for(capfd: pytest.CaptureFixture[str]) -> None:
    """The queue prints a traceback, and the process lives on."""
    with pytest.raises(DataError, match=r"^--workers: there is no room left in /dev/shm, .* --workers 0 needs none$"):
        load(NO_SPACE)
    assert not capfd.readouterr().err
    with pytest.raises(DataError, match="--workers: the system has ended a process"):
        load("a bug")
    assert "RuntimeError: a bug" in capfd.readouterr().err


def test_other_errors_stay_what_they_are() -> None:
    for text in ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...", "a bug"):
        with pytest.raises(RuntimeError) as error, plain_errors():
            raise RuntimeError(text)
        assert str(error.value) == text
    with pytest.raises(DataError, match=r"^plain$"), plain_errors():
        raise DataError("plain")


class Signalled(Sequence[Pixels]):
    """Images; a process that looks at one gets a signal."""

    def __init__(self, count: int, number: int) -> None:
        self.count, self.number = count, number

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), self.number)
        return np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_first_signal_to_all_processes_is_left_to_the_run(kind: str, number: int) -> None:
    def first(count: int) -> object:
        part = Part(Signalled(count, number), np.zeros(count, np.int64), ("a",), ("",) * count)
        if kind == "evaluation":
            return next(EvaluationBatches(part, as_they_are).batches(workers=1))
        batches = TrainingBatches(part, ClassBalancedSampler(part.labels, count, count), as_they_are, seed=0)
        return next(iter(batches.prepared(0, 1, workers=1, pin=False)))

    assert first(1) is not None
    with pytest.raises(DataError, match="--workers: the system has ended"), plain_errors():
        first(2)


def killed(text: str, size: int) -> None:
    """Stands for a drawing that takes more memory than there is."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_drawing_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # the killer is known there
    monkeypatch.setattr(svg.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(svg, "draw", killed)
    with pytest.raises(DataError, match=r"--data: the system has ended a process that draws"):
        svg.draw_all([svg.Sketch("a:b", "")] * (svg.SMALL_JOB + 1), 8)


# ---- how many, and how fast -----------------------------------------------------------------------------------------


CPU, GPU = torch.device("cpu"), torch.device("cuda")
MANY = Signalled(FEW, 0)
PREPARED, THROUGH = "images/s prepared", "images/s through the network"


@pytest.mark.parametrize(
    ("cores", "threads", "device", "processes", "expected"),
    [
        (8, 8, CPU, 1, 0),  # the network has them all
        (8, 5, CPU, 1, 3),
        (8, 1, CPU, 2, 3),
        (1, 1, CPU, 1, 0),
        (4, 4, GPU, 1, 3),
        (16, 16, GPU, 4, 3),
        (2, 2, GPU, 4, 0),
        (128, 64, GPU, 1, MOST),
    ],
)
def test_cores_that_the_network_does_not_use_prepare_images(
    cores: int, threads: int, device: torch.device, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert workers(None, MANY, device, processes) == expected
    assert workers(None, np.zeros((FEW, 8, 8, 3), np.uint8), device, processes) == expected
    assert workers(None, Signalled(FEW - 1, 0), device, processes) == 0, "few images"
    assert workers(None, np.zeros((FEW, 8), np.float32), device, processes) == 0, "features"
    assert workers(3, Signalled(1, 0), device, processes) == 3, "as asked for"
    assert workers(0, MANY, device, processes) == 0


def rates(workers: int, *steps: tuple[float, float, float]) -> Rates:
    """Of steps of one batch of 100 images: seconds to prepare it, to wait for it, and in all."""
    found = Rates(100, workers)
    for preparing, waited, whole in steps:
        found.prepared(preparing, waited)
        found.step(whole)
    return found


def test_the_rates_are_of_the_work_not_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loading.cores", lambda: 3)
    found = rates(0, (9.0, 9.0, 99.0), (0.5, 0.5, 2.5))
    assert (found.loading, found.network) == pytest.approx((200.0, 50.0))
    assert found.words() == f"200 {PREPARED}, 50 {THROUGH}; preparing them takes 20 % of the time; try --workers"
    found = rates(4, (9.0, 9.0, 99.0), (1.0, 0.0, 2.0), (1.0, 0.0, 2.0))
    assert found.words() == f"400 {PREPARED}, 50 {THROUGH}; with 4 processes preparing them, the network decides"
    found = rates(1, (9.0, 9.0, 99.0), (4.0, 3.0, 4.0))
    assert found.words() == (
        f"25 {PREPARED}, 100 {THROUGH}; with 1 process preparing them, the network waits: try more --workers"
    )
    found = rates(2, (9.0, 9.0, 99.0), (4.0, 3.0, 4.0))  # no core is left
    assert found.words() == f"50 {PREPARED}, 100 {THROUGH}; with 2 processes preparing them, the network waits"
    assert rates(2, (9.0, 9.0, 99.0)).words() == "", "the first step is like no other"
    assert "takes 1 % of the time" in rates(0, (1.0, 1.0, 1.0), (0.01, 0.01, 1.0)).words()


def test_several_batches_make_a_step() -> None:
    found = Rates(300, 1)
    for _ in range(3):
        found.prepared(1.0, 0.5)
    found.step(4.5)
    assert (found.loading, found.network) == pytest.approx((100.0, 100.0))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_processes_end_with_what_asks_for_images(kind: str) -> None:
    before = {*multiprocessing.active_children()}
    part = Part(np.zeros((2000, 2, 2, 3), np.uint8), np.arange(2000) // 1000, ("a", "b"), ("",) * 2000)
    if kind == "evaluation":
        wanted: Iterator[Any] = EvaluationBatches(part, as_they_are).batches(workers=1)
    else:
        batches = TrainingBatches(part, ClassBalancedSampler(part.labels, 4, 2), as_they_are, seed=0)
        wanted = batches.prepared(0, 50, workers=1, pin=False)
    next(wanted)
    (process,) = {*multiprocessing.active_children()} - before
    del wanted
    assert process.exitcode == 0


def test_a_program_ends_though_something_still_asks_for_images() -> None:
    """As an error does that somebody keeps."""
    program = """
import numpy as np
from train.augment import EvaluationBatches
from train.data import Part
from train.features import as_they_are
part = Part(np.zeros((2000, 2, 2, 3), np.uint8), np.zeros(2000, np.int64), ("a",), ("",) * 2000)
wanted = [EvaluationBatches(part, as_they_are).batches(workers=1)]
next(wanted[0])
wanted.append(wanted)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
