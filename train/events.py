"""TensorBoard's log of a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from .checkpoint import writing

_others = threading.excepthook


def _tell(arguments: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's threads: their errors come again with a later event."""
    if not type(arguments.thread).__module__.startswith("tensorboard."):
        _others(arguments)


def _leave_out_tensorboard() -> None:
    global _others
    if threading.excepthook is not _tell:
        _others, threading.excepthook = threading.excepthook, _tell


class Events(SummaryWriter):
    """What cannot be written is named. A thread writes, so its error comes with a later event, or at the end."""

    def __init__(self, log: Path, first_step: int) -> None:
        """Make the folder ``log``; what an earlier start logged of ``first_step`` and later ones is void."""
        _leave_out_tensorboard()
        self.log, self.first_step = log, first_step
        self.curves: dict[str, Events] = {}
        """Of charts, by folder: each has a log of its own. (The base's own would not be told the first step.)"""
        with writing(log):
            super().__init__(log, purge_step=first_step)

    def add_scalar(self, *arguments: object) -> None:
        """As in the base, and so are the others; raises ConfigError if events cannot be written."""
        with writing(self.log):
            super().add_scalar(*arguments)

    def chart(self, name: str, curves: Mapping[str, float], step: int) -> None:
        """Several curves in one chart."""
        for curve, value in curves.items():
            folder = f"{name}_{curve}"
            if folder not in self.curves:
                self.curves[folder] = Events(self.log / folder, self.first_step)
            self.curves[folder].add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest."""
        for curve in self.curves.values():
            curve.close()
        with writing(self.log):
            super().close()
