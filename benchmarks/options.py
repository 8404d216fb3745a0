"""What is measured unless the command line says otherwise, and its presets: lists of cases, each a table of its own."""

from __future__ import annotations

from typing import Any

from .comparisons import COMPARISONS, OURS, THEIRS
from .implementations import ALL_PAIRS, NAMES
from .problem import Problem

Options = dict[str, Any]

_problem = Problem()

DEFAULTS: Options = {
    "kernel": _problem.kernel,
    "batch": _problem.batch,
    "memory": [_problem.memory],
    "dim": _problem.dim,
    "classes": _problem.classes,
    "density": _problem.density,
    "rows": _problem.rows,
    "loss": _problem.loss,
    "drift": _problem.drift,
    "update": "both",
    "dtype": "float32",
    "device": _problem.device,
    "repeats": 21,
    "only": [name for name in NAMES if name != ALL_PAIRS],
}

PRESETS: dict[str, list[Options]] = {
    "quick": [
        {
            "memory": [8192],
            "dim": 128,
            "repeats": 5,
            "only": [name for name in DEFAULTS["only"] if "compile" not in name],
        }
    ],
    "paper": [
        {},
        {"dim": 128},
        {"batch": 256},
        {"loss": "supcon"},
        {"kernel": "loss"},
        {"kernel": "loss", "batch": 256},
        {"kernel": "transform"},
    ],
    "losses": [
        {"kernel": "loss", "loss": loss, "repeats": 7, "only": [OURS, "chunked", "eager-tuned"]} for loss in COMPARISONS
    ],
    "sweep": [
        {
            "memory": [1 << k for k in range(10, 20)] + [1_000_000],
            "dim": 128,
            "repeats": 7,
            "only": [OURS, "eager-tuned", "chunked", THEIRS],
        }
    ],
}


def cases(preset: str | None, explicit: Options) -> list[Options]:
    """The cases of a preset (None: the defaults alone), each with all options and once; what is explicit goes before
    both."""
    wanted = [DEFAULTS | case | explicit for case in (PRESETS[preset] if preset else [{}])]
    return [case for i, case in enumerate(wanted) if case not in wanted[:i]]
