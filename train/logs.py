"""The logs of a run: TensorBoard's, the table `log.csv`, and that of Weights & Biases where it is asked for.

What is noted of a step goes to TensorBoard one by one, and to the others as a row, when the step ends.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from . import checkpoint
from .config import Config, ConfigError
from .events import Events

STEP = "step"
Row = dict[str, float]


class Rows(Protocol):
    """Takes rows, each of one step, in order."""

    def write(self, row: Row) -> None:
        """A row; its ``step`` is larger than that of the one before."""

    def close(self, *, failed: bool) -> None:
        """There are no more; ``failed``: for a reason other than the end of the run."""


class Logs:
    """All logs, or without any nothing. To be used in ``with``."""

    def __init__(self, events: Events | None = None, others: Sequence[Rows] = ()) -> None:
        self.events, self.others = events, others
        self._row: Row = {}

    def scalar(self, name: str, value: float, step: int) -> None:
        """Note a value after so many steps; raises ConfigError if a log cannot be written, and so do the others."""
        if self.events is not None:
            self.events.add_scalar(name, value, step)
        self._row[name] = value

    def chart(self, name: str, curves: Mapping[str, float], step: int) -> None:
        """Note values for several curves in one chart, in TensorBoard alone."""
        if self.events is not None:
            self.events.chart(name, curves, step)

    def in_row(self, name: str, value: float) -> None:
        """Note a value in the row of this step alone."""
        self._row[name] = value

    def end(self, step: int) -> None:
        """The step is over."""
        row, self._row = {STEP: step, **self._row}, {}
        for each in self.others:
            each.write(row)

    def close(self, *, failed: bool = False) -> None:
        """Write the rest; may be called again."""
        if self.events is not None:
            self.events.close()
        for each in self.others:
            each.close(failed=failed)
        self.others = ()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(failed=error is not None)


class Table:
    """A file of comma-separated values: a line for each step, empty where nothing was measured."""

    def __init__(self, path: Path, columns: Sequence[str], first_step: int) -> None:
        """Begin the file, or go on with it: lines of ``first_step`` and later ones are void.

        Args:
            path: the file.
            columns: their names, except for ``step``, which is the first.
            first_step: the first to be written; 1 or less: the file begins.

        Raises:
            ConfigError: it cannot be written.
        """
        self.path, self.columns = path, (STEP, *columns)
        kept = [row for row in self._found() if _number(row.get(STEP)) < first_step]
        whole = self._lines(kept, header=True)
        checkpoint.write_whole(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))

    def _found(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with checkpoint.writing(self.path):  # one that may not be read must not be replaced either
            content = self.path.read_bytes()
        try:
            whole, _, _ = content.decode().rpartition("\n")  # a full disk may have cut the last line
            return list(csv.DictReader(io.StringIO(whole)))
        except (UnicodeError, csv.Error):  # not ours
            return []

    def _lines(self, rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def write(self, row: Row) -> None:
        """Append a line at once, so that it is there whatever becomes of the run."""
        with checkpoint.writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(self._lines([row], header=False))

    def close(self, *, failed: bool) -> None:
        """Nothing is left to be written."""


def _number(text: str | None) -> float:
    """A step; infinite where the text is not a number."""
    return float(text) if text is not None and text.isdecimal() else float("inf")


class WandB:
    """A run of Weights & Biases, in the project that --wandb names. Their variables, such as WANDB_MODE, hold."""

    def __init__(self, config: Config, identity: str) -> None:
        """Begin the run, or go on with the one of this identity.

        Raises:
            ConfigError: wandb cannot begin it.
        """
        self.project = config.wandb
        try:
            self.run = importlib.import_module("wandb").init(
                project=config.wandb, name=config.folder.name, id=identity, resume="allow", dir=str(config.folder),
                config=config.settings(),
            )  # fmt: skip
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ConfigError:
        words = f"--wandb {self.project}: {checkpoint.why(error)}; WANDB_MODE=offline writes to --out alone"
        return ConfigError(words)

    def write(self, row: Row) -> None:
        """Of a run that goes on, wandb leaves out steps that it has already: they are the same."""
        try:
            self.run.log({name: value for name, value in row.items() if name != STEP}, step=int(row[STEP]))
        except Exception as error:
            raise self._failed(error) from error

    def close(self, *, failed: bool) -> None:
        """Wait until all is written, or sent."""
        self.run.finish(exit_code=int(failed))


def require_wandb(config: Config) -> None:
    """Raise ConfigError if --wandb is given and wandb is not installed."""
    if config.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of runs, which wandb calls by its own name, is no module
        raise ConfigError(f"--wandb {config.wandb}: there is no module wandb: pip install wandb")


def begin(config: Config, columns: Sequence[str], done: int, identity: str) -> Logs:
    """The logs of a run after ``done`` steps; what an earlier start logged of later ones is void.

    Args:
        config: the settings of the run.
        columns: every name that it logs.
        done: steps.
        identity: of its run in Weights & Biases.

    Raises:
        ConfigError: a log cannot be written.
    """
    events = Events(config.folder / checkpoint.EVENTS, done + 1)
    table = Table(config.folder / checkpoint.LOG, columns, done + 1)
    return Logs(events, [table, *([WandB(config, identity)] if config.wandb else [])])
