"""What a finished run leaves behind: metrics.json, two pictures, and a small table on the terminal."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import torch
from torch import Tensor

import xbn_ext

from . import checkpoint, evaluate, pictures, terminal, vision
from .augment import evaluation_view

if TYPE_CHECKING:
    from .loop import Trainer


def write(trainer: Trainer, embeddings: Tensor, note: str) -> None:
    """Write the pictures, then metrics.json.

    Args:
        trainer: the run, at its end.
        embeddings: [N, D] of the test images.
        note: what weights the backbone started from.

    Raises:
        ConfigError: they cannot be written.
        DataError: an image cannot be read.
    """
    config, data = trainer.config, trainer.data
    queries = pictures.pick_queries(data)
    found = evaluate.neighbours(embeddings, pictures.NEIGHBOURS, queries, queries=data.queries, gallery=data.gallery)
    asked = evaluate.answers(data.test.labels, data.queries, data.gallery)
    metrics = {
        "method": config.method,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(trainer.seconds, 1),
        **{name: trainer.history["evaluation"][-1][name] for name in trainer.before["frozen"]},
        "before": trainer.before["frozen"],
        "untrained_head": trainer.before["untrained_head"],
        "history": trainer.history,
        "config": config.settings(),
        "backbone": note,
        "data": {
            "name": data.name,
            **{f"{side}_images": len(part.labels) for side, part in (("train", data.train), ("test", data.test))},
            **{f"{side}_classes": len(part.classes) for side, part in (("train", data.train), ("test", data.test))},
            "queries": len(asked),
            "queries_without_answer": int((asked == 0).sum()),
            "gallery": len(data.test.labels if data.gallery is None else data.gallery),
            "credit": list(data.credit),
        },
        "machine": machine(trainer.device) | {"processes": trainer.ranks.size},
    }
    view = evaluation_view(config.image_size, config.augment)
    with checkpoint.writing(config.folder):
        pictures.curves(config.folder / checkpoint.CURVES, metrics)
        pictures.neighbours(config.folder / checkpoint.NEIGHBOURS, data, queries, found, view)
    checkpoint.write_metrics(config.folder, metrics)


def show(folder: Path) -> dict[str, Any]:
    """Print a finished run's scores before and after training, and where its pictures are; return its metrics.

    Raises:
        ConfigError: its metrics.json does not hold them.
    """
    metrics = checkpoint.read_metrics(folder)
    with checkpoint.reading(folder / checkpoint.METRICS):
        rows = scores(metrics)
        names = list(metrics["before"])
        lines = [f"\n{'test classes, %':24}" + "".join(f"{name:>12}" for name in names)]
        lines += [f"{row:24}" + "".join(f"{found[name]:12.1f}" for name in names) for row, found in rows.items()]
        there = metrics["machine"]
        several = f", in each of {there['processes']} processes" if there.get("processes", 1) > 1 else ""
        lines += [f"{metrics['steps']} steps in {metrics['seconds']:.0f} s on {there['device']}{several}"]
    terminal.say(*lines, *(folder / name for name in (checkpoint.CURVES, checkpoint.NEIGHBOURS, checkpoint.METRICS)))
    return metrics


def scores(metrics: dict[str, Any]) -> dict[str, evaluate.Scores]:
    """Those of three networks by what they are, the trained one last; raises KeyError if some are missing."""
    names = list(metrics["before"])
    networks = {
        "frozen backbone": metrics["before"],
        "untrained head": metrics["untrained_head"],
        f"trained, {metrics['method']}": metrics,
    }
    return {network: {name: float(found[name]) for name in names} for network, found in networks.items()}


def machine(device: torch.device) -> dict[str, str | int]:
    """What a run is done on, and with which versions."""
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread{'s' * (threads > 1)}",
        "platform": platform.platform(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": vision.__version__,
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "xbn_ext": xbn_ext.__version__,
    }
