"""One run from settings to results: check, load, train, report."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import xbn_ext

from . import checkpoint, data, lock, logs, loop, losses, making, model, place, results, settings_file, terminal
from .arguments import parse
from .config import Config, ConfigError
from .cores import bytes_of_memory
from .data import validation
from .data.fingerprint import differences
from .place import Found
from .program import FAILED, STOPPED
from .ranks import ALONE, Elsewhere, Ranks, join

CREDIT_SHOWN = 12
"""Lines of credit that are printed; of more only the number."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. Of several processes, rank 0 alone prints."""
    terminal.prepare()
    try:
        with join() as ranks:
            config = ranks.one_first(lambda: parse(arguments))
            with terminal.silent(not ranks.leads):
                return _main(config, ranks)
    except Elsewhere as error:  # which has said why: a command line is refused
        return error.status


def _main(config: Config, ranks: Ranks) -> int:
    before = lock.state(config.folder)
    try:
        with ranks.all_alive():
            run(config, ranks=ranks)
    except (loop.Interrupted, KeyboardInterrupt):  # the latter outside of training, or by a second Ctrl-C
        return _stopped(config, before)
    except (ConfigError, data.DataError, loop.TrainingError, Elsewhere) as error:
        if isinstance(error, Elsewhere) and error.status == STOPPED:
            return _stopped(config, before)
        terminal.complain("", error)
        return FAILED
    return 0


def _stopped(config: Config, before: lock.State) -> int:
    """Say how to go on. A run that was to overwrite another, whose folder is as ``before``, has not begun."""
    begun = checkpoint.begun(config.folder) and not (config.overwrite and lock.state(config.folder) == before)
    instead = " in place of --overwrite" * config.overwrite
    goes_on = f"; the same command with --resume{instead} continues from {config.folder}"
    terminal.note("stopped" + goes_on * begun)
    return STOPPED


def run(config: Config, asked_to_stop: Callable[[], bool] | None = None, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Do the run, or find it done already, print its result and return its metrics.

    Of several processes, rank 0 alone looks at the folder and writes there; the others get from it what they need.
    """
    before = lock.state(config.folder)
    found = ranks.leader(lambda: place.look(config))
    if found is Found.FINISHED:
        terminal.say(f"{config.folder} holds this run, finished; --overwrite would repeat it")
        return ranks.leader(lambda: results.show(config.folder))
    with ranks.together():
        require_parts(config, ranks)
        device = device_of(config, ranks)
        require_memory(config, device)
        logs.require_wandb(config)
        if config.threads:
            torch.set_num_threads(config.threads)
    goes_on = found is Found.CHECKPOINT
    network, _ = ranks.one_first(lambda: model.build(config, goes_on=goes_on))  # which may fetch weights
    dataset = ranks.one_first(lambda: _load(config))
    require_same_everywhere(config, dataset, ranks)
    ranks.leader(lambda: place.require_pictures_kept(config, dataset))
    stored = config.folder / checkpoint.CHECKPOINT
    # Rank 0's network, too: what pretrained weights there are may differ from machine to machine.
    state = ranks.leader(lambda: checkpoint.load(stored) if goes_on else network.beginning())
    with ranks.together():
        if goes_on:
            there = state.get("data")
            checkpoint.require_same_data(config.data, config.folder, there, dataset.fingerprint, "an unfinished run")
        with checkpoint.reading(stored):
            network.go_on(state)  # before features are taken of it
        require_normalisation(config, network, device, ranks)
    note = network.note
    trainer = make_trainer(config, network, dataset, device, ranks=ranks)
    if goes_on:
        with ranks.together(), checkpoint.reading(stored):
            trainer.load_state_dict(state)
        terminal.say(f"continuing {config.folder} at step {trainer.step}")
    with ExitStack() as locked:

        def take_folder() -> None:
            locked.enter_context(lock.alone(config.folder, before))
            if not goes_on:
                place.prepare(config.folder)
                text = settings_file.text(config)
                settings = config.folder / checkpoint.SETTINGS
                checkpoint.write_whole(settings, lambda path: path.write_text(text, encoding="utf-8"))

        ranks.leader(take_folder)
        on = f"{device}" if ranks.size == 1 else f"{device.type}, {ranks.size} processes"
        terminal.say(note, f"{config.method}, {losses.title(config.loss)}, on {on}, results in {config.folder}")
        with stop_signals() as signalled:
            embeddings = trainer.run(asked_to_stop or signalled)
        ranks.leader(lambda: results.write(trainer, embeddings, note))
    return ranks.leader(lambda: results.show(config.folder))


def require_parts(config: Config, ranks: Ranks) -> None:
    """Raise ConfigError if there are more processes than images in a batch, or than the method works in."""
    if ranks.size > 1 and config.method == "oracle":
        raise ConfigError(f"--method oracle: works in one process, and there are {ranks.size}; choose another method")
    if ranks.size > config.batch_size:
        raise ConfigError(
            f"--batch-size {config.batch_size}: it is dealt out to all processes, and there are {ranks.size}; choose a "
            "larger one, or fewer processes"
        )


def require_same_everywhere(config: Config, dataset: data.Dataset, ranks: Ranks) -> None:
    """Raise DataError if other data lie at the same place on the machine of another process."""
    first = ranks.leader(lambda: dataset.fingerprint)
    with ranks.together():
        different = differences(first, dataset.fingerprint)
        if different:
            raise data.DataError(f"--data {config.data}: differs from that of rank 0 in its {', '.join(different)}")


def require_normalisation(config: Config, network: model.Embedder, device: torch.device, ranks: Ranks) -> None:
    """Raise ConfigError if batch normalisation would have to know the batch of all processes, and cannot."""
    if ranks.size > 1 and device.type == "cpu" and config.features != "frozen" and network.normalises_by_batch():
        raise ConfigError(
            "--batchnorm: on CPUs several processes cannot normalise by the statistics of a batch that they share "
            "(torch does that on GPUs only); choose --batchnorm frozen, a network without batch normalisation, or one "
            "process"
        )


def make_trainer(
    config: Config,
    network: model.Embedder,
    dataset: data.Dataset,
    device: torch.device,
    inputs: data.Dataset | None = None,
    ranks: Ranks = ALONE,
) -> loop.Trainer:
    """As ``Trainer``; raises ConfigError if the settings do not fit the data."""
    try:
        return loop.Trainer(config, network, dataset, device, inputs, ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(config: Config) -> data.Dataset:
    dataset = data.load(config.data, cache_dir=config.cache, max_classes=config.max_classes, test=config.test)
    if config.validation_share:
        dataset = validation.beside(dataset, config.validation_share)
    by = dataset.credit
    if len(by) > CREDIT_SHOWN:
        by = (f"by {len(by)} makers; metrics.json will name them and their licences",)
    terminal.say(f"{dataset.name}, {dataset.summary()}", *(f"  {each}" for each in by))
    return dataset


def device_of(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """The device that a run is on, of several processes each on a GPU of its own; raises ConfigError without one."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and xbn_ext.build_info()["cuda"] else "cpu"
    try:
        device = torch.device(name)
        if ranks.size > 1 and device.type == "cuda":
            if device.index is not None:
                raise ConfigError(f"--device {name}: each process takes a GPU of its own; choose cuda")
            device = torch.device("cuda", ranks.local_rank)
        torch.empty(0, device=device)  # a torch without CUDA has no other call that says so
        if ranks.size > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        which = f"{name}, GPU {ranks.local_rank}" if ranks.size > 1 else name
        raise ConfigError(f"--device {which}: {checkpoint.why(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: xbn_ext has kernels for cpu and cuda only")
    return device


def require_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError if what --memory-size asks for is more than the device can hold at all."""
    needed = making.memory_bytes(config)
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else bytes_of_memory()
    if needed > there:
        images = ", with its images," if config.method == "oracle" else ""
        raise ConfigError(
            f"--memory-size {config.memory_size}: with --embedding-dim {config.embedding_dim} the memory{images} takes "
            f"{needed:,} bytes, and {device} has {there:,}; choose a smaller one"
        )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C and SIGTERM only set a flag, which the yielded function reads; a second one acts at once."""
    asked: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, handlers[number])

    if threading.current_thread() is threading.main_thread():
        handlers |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
