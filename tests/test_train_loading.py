"""Processes that prepare images: what goes wrong there is told in a line."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from train.data import DataError, svg
from train.loading import plain_errors


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


def killed(text: str, size: int) -> None:
    """Stands for a drawing that takes more memory than there is."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_drawing_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # the killer is known there
    monkeypatch.setattr(svg.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(svg, "draw", killed)
    with pytest.raises(DataError, match=r"--data emoji: the system has ended a process that draws"):
        svg.draw_all([""] * (svg.SMALL_JOB + 1), 8)
