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
from .data import Dataset
from .scoring import VALIDATION, tested_on

if TYPE_CHECKING:
    from .loop import Trainer

NOT_TESTED = "nothing is tested: --test-share 0 leaves all images to training"


def write(trainer: Trainer, embeddings: Tensor, note: str) -> None:
    """Write the pictures, then metrics.json. Where nothing is tested there are no neighbours to show.

    Args:
        trainer: the run, at its end.
        embeddings: [N, D] of the test images.
        note: what weights the backbone started from.

    Raises:
        ConfigError: they cannot be written.
        DataError: an image cannot be read.
    """
    config, data = trainer.config, trainer.data
    metrics = {
        "method": config.method,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(trainer.seconds, 1),
        **_scores(trainer),
        "history": trainer.history,
        "config": config.settings(),
        "backbone": note,
        "data": _about(data),
        "machine": machine(trainer.device) | {"processes": trainer.ranks.size},
    }
    with checkpoint.writing(config.folder):
        pictures.curves(config.folder / checkpoint.CURVES, metrics)
        if data.tested:
            _neighbours(trainer, embeddings)
    checkpoint.write_metrics(config.folder, metrics)


def _neighbours(trainer: Trainer, embeddings: Tensor) -> None:
    config, data = trainer.config, trainer.data
    queries = pictures.pick_queries(data)
    found = evaluate.neighbours(embeddings, pictures.NEIGHBOURS, queries, queries=data.queries, gallery=data.gallery)
    view = evaluation_view(config.image_size, config.augment, config.interpolation)
    pictures.neighbours(config.folder / checkpoint.NEIGHBOURS, data, queries, found, view)


def _scores(trainer: Trainer) -> dict[str, Any]:
    """Those of the test images: none where nothing is tested. With validation also what was best there."""
    before, history, best = trainer.before, trainer.history, trainer.best

    def of(point: dict[str, float]) -> evaluate.Scores:
        return {name: value for name, value in point.items() if name not in ("step", "seconds")}

    points = history["evaluation"]
    chosen = points[-1:] if best is None else points[:1]  # with validation they are scored at the end alone
    found: dict[str, Any] = of(chosen[0]) if trainer.data.tested else {"not_tested": NOT_TESTED}
    found |= {"before": before.get("frozen", {}), "untrained_head": before.get("untrained_head", {})}
    if best is None:
        return found
    validation = {
        "step": best.step,
        "by": best.score,
        "before": before[VALIDATION]["frozen"],
        "untrained_head": before[VALIDATION]["untrained_head"],
        "best": best.scores,
        "last": of(history["validation"][-1]),
    }
    return found | {"last": of(points[-1]) if trainer.data.tested else {}, "validation": validation}


def _about(data: Dataset) -> dict[str, Any]:
    asked = evaluate.answers(data.test.labels, data.queries, data.gallery)
    return {
        "name": data.name,
        **{f"{side}_images": len(part.labels) for side, part in data.parts.items()},
        **{f"{side}_classes": len(part.classes) for side, part in data.parts.items()},
        "queries": len(asked),
        "queries_without_answer": int((asked == 0).sum()),
        "gallery": len(data.test.labels if data.gallery is None else data.gallery),
        "credit": list(data.credit),
    }


def show(folder: Path) -> dict[str, Any]:
    """Print a finished run's scores before and after training, and where its pictures are; return its metrics.

    Raises:
        ConfigError: its metrics.json does not hold them.
    """
    metrics = checkpoint.read_metrics(folder)
    with checkpoint.reading(folder / checkpoint.METRICS):
        lines = ["", metrics["not_tested"]] if "not_tested" in metrics else []
        for title, rows in tables(metrics).items():
            names = list(next(iter(rows.values())))
            width = max(24, *(len(row) + 2 for row in rows))
            lines += ["", f"{f'{title}, %':{width}}" + "".join(f"{name:>12}" for name in names)]
            lines += [
                f"{row:{width}}" + "".join(f"{found[name]:12.1f}" for name in names) for row, found in rows.items()
            ]
        there = metrics["machine"]
        several = f", in each of {there['processes']} processes" if there.get("processes", 1) > 1 else ""
        lines += [f"{metrics['steps']} steps in {metrics['seconds']:.0f} s on {there['device']}{several}"]
    pictured = (checkpoint.CURVES, *([] if "not_tested" in metrics else [checkpoint.NEIGHBOURS]))
    terminal.say(*lines, *(folder / name for name in (*pictured, checkpoint.METRICS)))
    return metrics


def tables(metrics: dict[str, Any]) -> dict[str, dict[str, evaluate.Scores]]:
    """Scores of networks by what they are, the one that is used last: of what is tested, then of held-out classes.

    Raises KeyError if some are missing.
    """
    found, validation = {}, metrics.get("validation")
    if "not_tested" not in metrics:
        found[tested_on(metrics["config"])] = _table(metrics, metrics, metrics, metrics.get("last"))
    if validation is not None:
        found["validation classes"] = _table(metrics, validation, validation["best"], validation["last"])
    return found


def _table(
    metrics: dict[str, Any], start: dict[str, Any], trained: dict[str, Any], last: dict[str, Any] | None
) -> dict[str, evaluate.Scores]:
    """``start`` has the scores before training; ``last`` those of the last weights, where ``trained`` has the best."""
    networks = {"backbone alone": start["before"], "untrained head": start["untrained_head"]}
    name = f"trained, {metrics['method']}"
    if last is not None:
        best = metrics["validation"]["step"]
        networks |= {} if best == metrics["steps"] else {f"{name}, last: step {metrics['steps']}": last}
        name += f", best: step {best}"
    networks[name] = trained
    names = list(start["before"])
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
