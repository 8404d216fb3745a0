"""A small study: its arguments, its plan and what its runs found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.compare import study
from train.compare.plan import Plan

SMALL = {
    "data": "emoji", "max-classes": "40", "steps": "12", "batch-size": "8", "samples-per-class": "2",
    "memory-size": "24", "eval-every": "4", "seeds": "2", "map-seeds": "1", "lrs": "1e-3,1e-2", "memory-sizes": "8,24",
    "batch-sizes": "4,8", "warmups": "0,4", "noises": "0.1,1", "momenta": "0.1",
    "methods": "batch,xbm,axbn", "threads": "1",
}  # fmt: skip

SMALL_METHODS = SMALL["methods"].split(",")


def small_plan(**changes: Any) -> Plan:
    return replace(study.parse(arguments(Path("cache"), Path("out")))[1], **changes)


def arguments(cache: Path, out: Path, jobs: int = 1) -> list[str]:
    settings = SMALL | {"cache": str(cache), "out": str(out), "jobs": str(jobs)}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def results(out: Path) -> dict[str, Any]:
    """What every run found, less how long it took."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))}
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}
