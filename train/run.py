"""One run from settings to results: check, load, train, report."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import xbn_ext

from . import checkpoint, data, lock, loop, losses, model, report, terminal
from .checkpoint import Found
from .config import Config, ConfigError, parse
from .cores import bytes_of_memory


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    config = parse(arguments)
    try:
        run(config)
    except (ConfigError, data.DataError, loop.TrainingError) as error:
        print(f"python -m train: error: {error}", file=sys.stderr)
        return 2
    except (loop.Interrupted, KeyboardInterrupt):  # the latter outside of training, or by a second Ctrl-C
        goes_on = f"; the same command with --resume continues from {config.folder}"
        print("stopped" + goes_on * checkpoint.begun(config.folder), file=sys.stderr)
        return 130
    return 0


def run(config: Config, asked_to_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Do the run, or find it done already, print its result and return its metrics."""
    before = lock.state(config.folder)
    found = checkpoint.look(config)
    if found is Found.FINISHED:
        terminal.say(f"{config.folder} holds this run, finished; --overwrite would repeat it")
        return report.show(config.folder)
    device = device_of(config)
    require_memory(config, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    network, note = model.build(config)
    dataset = _load(config)
    now = dataset.fingerprint
    stored = config.folder / checkpoint.CHECKPOINT
    state = checkpoint.load(stored) if found is Found.CHECKPOINT else None
    if state is not None:
        checkpoint.require_same_data(config.data, config.folder, state.get("data"), now, "an unfinished run")
        with checkpoint.reading(stored):
            network.go_on(state)  # before features are taken of it
        note = network.note
    trainer = make_trainer(config, network, dataset, device)
    if state is not None:
        with checkpoint.reading(stored):
            trainer.load_state_dict(state)
        terminal.say(f"continuing {config.folder} at step {trainer.step}")
    with lock.alone(config.folder, before):
        if state is None:
            checkpoint.prepare(config.folder)
        terminal.say(note, f"{config.method}, {losses.title(config.loss)}, on {device}, results in {config.folder}")
        with stop_signals() as signalled:
            embeddings = trainer.run(asked_to_stop or signalled)
        report.write(trainer, embeddings, note)
    return report.show(config.folder)


def make_trainer(
    config: Config,
    network: model.Embedder,
    dataset: data.Dataset,
    device: torch.device,
    inputs: data.Dataset | None = None,
) -> loop.Trainer:
    """As ``Trainer``; raises ConfigError if the settings do not fit the data."""
    try:
        return loop.Trainer(config, network, dataset, device, inputs)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(config: Config) -> data.Dataset:
    dataset = data.load(config.data, cache_dir=config.cache, max_classes=config.max_classes)
    terminal.say("\n  ".join((f"{dataset.name}, {dataset.summary()}", *dataset.credit)))
    return dataset


def device_of(config: Config) -> torch.device:
    """The device that a run is on; raises ConfigError if it is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and xbn_ext.build_info()["cuda"] else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {checkpoint.why(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: xbn_ext has kernels for cpu and cuda only")
    return device


def require_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the embeddings that --memory-size asks for are more than the device can hold at all."""
    needed = loop.memory_bytes(config)
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else bytes_of_memory()
    if needed > there:
        raise ConfigError(
            f"--memory-size {config.memory_size}: with --embedding-dim {config.embedding_dim} the memory takes "
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
