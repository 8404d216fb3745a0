"""Processes that prepare images: what goes wrong there is told in a line."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from train.augment import EvaluationBatches, TrainingBatches
from train.data import DataError, Part, Pixels, svg
from train.features import as_they_are
from train.loading import plain_errors
from xbn_ext import ClassBalancedSampler


class Broken(Dataset[torch.Tensor]):
    """Stands for images; a working process cannot read one."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("--data: cannot read image a.png: cut short\n  or worse")


def load(how: str) -> None:
    """Asks for the images in a process of its own."""
    with plain_errors():
        list(DataLoader(Broken(how), None, num_workers=1, multiprocessing_context="fork"))


def test_an_unreadable_image_is_named_without_a_traceback() -> None:
    with pytest.raises(DataError, match=r"^--data: cannot read image a\.png: cut short\n  or worse$"):
        load("unreadable")


def test_a_killed_process_is_told_with_advice() -> None:
    with pytest.raises(DataError, match=r"--workers: the system has ended a process .* fewer --workers need less"):
        load("killed")


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
        return next(iter(batches.loader(0, 1, workers=1, pin=False)))

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
