"""Carries out runs, several at a time, each in a process of its own; what is done already is not done again.

A run leaves ``NAME.json``. While it goes on there is ``NAME/checkpoint.pt``, from which it continues bit for bit, so
that being stopped, or killed, costs at most the steps since that was written. ``data.json``, one folder up, says which
data they are on.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .. import checkpoint, data, features, loop, model
from ..augment import evaluation_view
from ..config import Config, ConfigError
from ..data import Dataset, validation
from ..data.fingerprint import Fingerprint
from ..kinds import NUMBER, Each, Kinds, Numbers, require
from ..making import make_sampler
from ..run import make_trainer
from .plan import SCORE, VALIDATION, Run

Result = dict[str, Any]
"""``scores`` (None: training broke down), ``failure``, ``drift`` and ``memory`` over time, ``seconds``, ``config``, and
``network``, with the weights that it began from, which older results lack."""

RESULT: Kinds = {
    "config": dict, "scores": (dict, type(None)), "failure": (str, type(None)), "seconds": NUMBER,
    "drift": Each(Numbers("step", "age")),
}  # fmt: skip
DELETE = "delete it"
DATA = "data.json"
NAMED = 8
"""Runs that a message names."""


class WorkerLost(RuntimeError):
    """A working process ended in the middle of a run; the message names the runs and says what to do."""


@dataclass(frozen=True)
class Workshop:
    """Where and how runs are done."""

    folder: Path
    jobs: int
    """Runs at a time."""
    threads: int
    """Of each."""
    device: str
    largest_batch: int = 0
    """Of all runs to come."""

    def path(self, run: Run) -> Path:
        """The result of a run."""
        return self.folder / f"{run.name}.json"

    @property
    def data(self) -> Path:
        """The fingerprint of the data that all runs are on."""
        return self.folder.parent / DATA


def read(workshop: Workshop, run: Run) -> Result | None:
    """The result of a run, or None.

    Raises:
        ConfigError: there is one of a run with other settings, or what there is cannot be read.
    """
    path = workshop.path(run)
    if not path.exists():
        return None
    result = checkpoint.read_json(path, RESULT, DELETE)
    with checkpoint.reading(path, DELETE):
        require(result, {"network": str} if "network" in result else {})
        if result["scores"] is not None:
            require(result["scores"], Numbers("recall@1", SCORE))
            unknown = [name for name in result["scores"] if not re.fullmatch(rf"{SCORE}|recall@\d{{1,9}}", name)]
            if unknown:
                raise ValueError(f"{unknown[0]} is no score")
    checkpoint.require_same(run.config, path, result["config"], "a run", DELETE)
    return result


def _require_same_scores(workshop: Workshop, results: Mapping[str, Result]) -> None:
    """Raise ConfigError if some results lack scores that others have."""
    names = {name: result["scores"].keys() for name, result in results.items() if result["scores"]}
    every = set().union(*names.values())
    lacking = {name: every - its for name, its in names.items() if every - its}
    if lacking:
        name, missing = next(iter(lacking.items()))
        raise ConfigError(
            f"--out {workshop.folder}: {name}.json has no {', '.join(sorted(missing))}, which others have; {DELETE}"
        )


class Workers:
    """Processes that do runs, from ``with`` to its end."""

    def __init__(self, workshop: Workshop, asked_to_stop: Callable[[], bool]) -> None:
        self.workshop, self.asked_to_stop = workshop, asked_to_stop
        context = multiprocessing.get_context("spawn")
        self.stop, self.done = context.Event(), threading.Event()
        begin = (self.stop, workshop.threads, os.getpid())
        self.pool = ProcessPoolExecutor(workshop.jobs, context, _begin, begin)

    def __enter__(self) -> Workers:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)
        with suppress(OSError):  # not empty: runs have left something
            self.workshop.folder.rmdir()

    def _watch(self) -> None:
        """Pass the wish to stop on to the processes."""
        while not self.done.wait(0.2):
            if self.asked_to_stop():
                self.stop.set()

    def carry_out(self, runs: Iterable[Run], title: str) -> dict[str, Result]:
        """Do the runs that are not done, and return all results by name.

        Raises:
            Interrupted: it was asked to stop; what was going on has left checkpoints.
            ConfigError: a run cannot be done, or the folder has one of other settings, or runs on other data.
            WorkerLost: the system has killed a working process.
        """
        runs = list({run.name: run for run in runs}.values())
        results = {run.name: found for run in runs if (found := read(self.workshop, run)) is not None}
        _require_same_scores(self.workshop, results)
        with checkpoint.writing(self.workshop.folder):
            self.workshop.folder.mkdir(parents=True, exist_ok=True)
        for name in results:  # of a run that was killed between its result and the end of its folder
            shutil.rmtree(self.workshop.folder / name, ignore_errors=True)
        left: dict[Future[Result | None], Run] = {}
        try:
            with interrupts_held_back():
                for run in runs:
                    if run.name not in results:
                        left[self.pool.submit(_do, self.workshop, run)] = run
            with tqdm(total=len(runs), initial=len(results), desc=title, unit=" runs", disable=None) as bar:
                for done in as_completed(left):
                    result = done.result()
                    if result is None:
                        raise loop.Interrupted
                    results[left[done].name] = result
                    bar.update()
        except BrokenProcessPool as error:
            if self.asked_to_stop():  # by a signal to all processes
                raise loop.Interrupted from error
            raise self._lost(runs) from error
        return results

    def _lost(self, runs: Sequence[Run]) -> WorkerLost:
        """Names the runs that have been begun and have no result."""
        begun = [run.name for run in runs if (self.workshop.folder / run.name).exists()]
        names = ", ".join(begun[:NAMED]) + (", ..." if len(begun) > NAMED else "")
        return WorkerLost(
            "the system has ended a working process, most likely because memory ran out; unfinished: "
            f"{names or 'no run'}. The same command continues from their last checkpoints; with fewer runs at a time "
            f"it needs less memory (--jobs, now {self.workshop.jobs})"
        )


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until this is closed, and never reaches a process that is started here: its imports take seconds,
    and it knows of no parent to leave that to."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Loaded(NamedTuple):
    """The data of a part of the runs."""

    data: Dataset
    inputs: Dataset | None
    """Features in place of images, where the backbone is frozen."""
    fingerprint: Fingerprint
    """Of all the data, also where this is a part of them."""


_stop: Event
_data: dict[tuple[Any, ...], _Loaded] = {}
"""Of a working process: what it has loaded."""


def _begin(stop: Event, threads: int, parent: int) -> None:
    """A working process starts. Ctrl-C is left to the parent; without a parent it ends."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what it starts has no such mask
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _do(workshop: Workshop, run: Run) -> Result | None:
    """Train, and write the result; None if asked to stop before the end. A run that cannot be begun leaves nothing."""
    if _stop.is_set():
        return None
    folder = workshop.folder / run.name
    workers = run.config.workers or 0  # several runs share the cores
    config = replace(run.config, out=folder, device=workshop.device, workers=workers)
    with checkpoint.writing(folder):
        folder.mkdir(exist_ok=True)  # from here on the run has been begun
    stored = folder / checkpoint.CHECKPOINT
    try:
        state = checkpoint.load(stored, DELETE) if stored.exists() else None
        network, _ = model.build(config, goes_on=state is not None)
        if state is not None:
            checkpoint.require_same(config, stored, state["config"], "an unfinished run", DELETE)
            with checkpoint.reading(stored, DELETE):
                network.go_on(state)
        loaded = _load(run.part, config, network, workshop)
        trainer = make_trainer(config, network, loaded.data, torch.device(workshop.device), loaded.inputs)
        if run.part == VALIDATION:
            _require_classes(config, loaded.data, workshop.largest_batch)
    except (ConfigError, data.DataError):
        with suppress(OSError):  # not empty: of a run that has a checkpoint
            folder.rmdir()
        raise
    if not workshop.data.exists():
        checkpoint.write_json(workshop.data, loaded.fingerprint)
    if state is not None:
        with checkpoint.reading(stored, DELETE):
            trainer.load_state_dict(state)
    failure = None
    try:
        trainer.run(_stop.is_set, quiet=True)
    except loop.Interrupted:
        return None
    except loop.TrainingError as error:
        failure = str(error)
    evaluations = trainer.history["evaluation"]
    result = {
        "scores": None if failure else {k: v for k, v in evaluations[-1].items() if k not in ("step", "seconds")},
        "failure": failure,
        "drift": trainer.history["drift"],
        "memory": trainer.history["memory"],
        "seconds": round(trainer.seconds, 1),
        "network": network.note,
        "config": config.settings(),
    }
    checkpoint.write_json(workshop.path(run), result)
    shutil.rmtree(folder)
    return result


def _load(part: str, config: Config, network: model.Embedder, workshop: Workshop) -> _Loaded:
    """The data of a part, and, if the backbone is frozen, the same with its features: once in a process.

    Raises:
        ConfigError: they are not those of the other runs.
        DataError: they cannot be used.
    """
    frozen = config.features == "frozen"
    weights = sum(float(p.sum()) for p in network.backbone.parameters()) if frozen else None
    of = part, config.data, config.max_classes, weights
    if of not in _data:
        found = data.load(config.data, cache_dir=config.cache, max_classes=config.max_classes, test=config.test)
        now = found.fingerprint
        _require_same_data(config.data, workshop, now)
        if part == VALIDATION:
            found = validation.of(found)
        view = evaluation_view(config.image_size, config.augment, config.interpolation)
        inputs = features.of(found, network, view, torch.device(config.device)) if frozen else None
        _data[of] = _Loaded(found, inputs, now)
    return _data[of]


def _require_classes(config: Config, there: Dataset, largest: int) -> None:
    """Raise ConfigError if the largest batch of the study, in a run of its last part, has more classes than there are
    to train on."""
    if largest <= config.batch_size:
        return
    try:
        config = replace(config, batch_size=largest, memory_size=max(largest, config.memory_size))
        make_sampler(config, there.train.labels)
    except ConfigError as error:
        found = str(error).replace("--batch-size ", "--batch-sizes ")
        raise ConfigError(f"{found} (a quarter of the training classes is held out, to choose settings by)") from error


def _require_same_data(spec: str, workshop: Workshop, now: Fingerprint) -> None:
    """The first run that can be begun says which data a study is on."""
    stored = None
    if workshop.data.exists():
        stored = checkpoint.read_json(workshop.data, checkpoint.FINGERPRINT, DELETE)
    elif not any(workshop.folder.glob("*.json")):
        return
    checkpoint.require_same_data(spec, workshop.data.parent, stored, now, "runs", DELETE)
