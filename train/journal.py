"""What a run notes of its steps: its history, which the checkpoint has, and its logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from . import logs, scoring
from .config import Config
from .data import Dataset
from .drift import Staleness
from .evaluate import Scores
from .kinds import NUMBER, Each, Kinds, Numbers
from .loading import Rates
from .logs import Logs
from .scoring import TEST, VALIDATION

MEAN_LOSS_OVER = 10
"""Steps per point of the loss curve."""
DRIFT = ("uncorrected", "in_memory")
"""What is measured of the memory's drift; a row of a log has the mean over what is measured after a step."""
SPEEDS = ("images_per_second", "images_prepared_per_second")
"""Of the network, and of what prepares its images."""
HISTORY = {TEST: "evaluation", VALIDATION: "validation"}
"""Under which name the history has the scores of a part."""


class Journal:
    """Of one run. ``logs`` has none, until they are begun."""

    def __init__(self, config: Config, data: Dataset, stats: Sequence[str]) -> None:
        """``stats`` are the names of what is noted of the memory."""
        self.config, self.data, self.stats = config, data, tuple(stats)
        self.scored, self.validated = scoring.names(data), data.validation is not None
        names = ("loss", "evaluation", "drift", "memory", *[HISTORY[VALIDATION]] * self.validated)
        self.history: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        self.recent_losses: list[float] = []
        self.identity = uuid4().hex[:8]
        """Of the run in Weights & Biases, also if it goes on without for a while."""
        self.is_identified = config.wandb is not None
        self.logs = Logs()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        identity = {"identity": self.identity} if self.is_identified else {}
        return {"recent_losses": list(self.recent_losses), "history": self.history, **identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint has."""
        self.recent_losses, self.history = state["recent_losses"], state["history"]
        if "identity" in state:
            self.identity, self.is_identified = state["identity"], True

    def kinds(self, state: dict[str, Any]) -> Kinds:
        """What a checkpoint of this run holds of steps and scores, where it has begun to have some."""
        point = Each(Numbers("step", "seconds", *self.scored))
        points = {
            "loss": Each(Numbers("step", "loss")),
            "evaluation": point,
            "drift": Each(Numbers("step", "age", *DRIFT)),
            "memory": Each(Numbers("step")),
            HISTORY[VALIDATION]: point,
        }
        untrained = dict.fromkeys(("frozen", "untrained_head"), Numbers(*self.scored))
        before = (untrained if self.data.tested else {}) | ({VALIDATION: untrained} if self.validated else {})
        best = state.get("best", {}).get("step") is not None
        return {
            "recent_losses": Each(NUMBER),
            "history": {name: points[name] for name in self.history},
            "before": before if state["before"] else {},
            **({"best": {"scores": Numbers(*self.scored)}} if best else {}),
        }

    def begin(self, done: int, *, silent: bool) -> None:
        """Begin the logs after so many steps, if not ``silent``; like the others raises ConfigError if that fails."""
        if not silent:
            self.logs = logs.begin(self.config, self._columns(), done, self.identity)

    def _columns(self) -> list[str]:
        scores = self.scored
        parts = [TEST] * self.data.tested + [VALIDATION] * self.validated
        chosen = ["step", *scores] if self.validated and self.data.tested else []
        return [
            "seconds", *(f"train/{name}" for name in ("loss", "lr", *SPEEDS)),
            *(f"drift/{name}" for name in DRIFT), *(f"memory/{name}" for name in self.stats),
            *(f"{part}/{name}" for part in parts for name in scores), *(f"best/{name}" for name in chosen),
        ]  # fmt: skip

    def loss(self, step: int, loss: float, lr: float, rates: Rates, seconds: float) -> bool:
        """Note a step; returns whether it ends a point of the loss curve.

        Args:
            step: so many have been taken.
            loss: its loss.
            lr: the head's learning rate.
            rates: of this step.
            seconds: since the run began.
        """
        speeds = zip(SPEEDS, (rates.network, rates.loading), strict=True)
        for name, value in (("loss", loss), ("lr", lr), *speeds):
            self.logs.scalar(f"train/{name}", value, step)
        self.logs.in_row("seconds", round(seconds, 3))
        self.recent_losses.append(loss)
        if step % MEAN_LOSS_OVER and step != self.config.steps:
            return False
        finite = [value for value in self.recent_losses if math.isfinite(value)]
        if finite:
            self.history["loss"].append({"step": step, "loss": sum(finite) / len(finite)})
        self.recent_losses.clear()
        return True

    def memory(self, step: int, stats: Mapping[str, float]) -> None:
        """Note what the criterion says of its memory, except for what is undefined."""
        known = {name: number for name, number in stats.items() if math.isfinite(number)}
        self.history["memory"].append({"step": step, **known})
        for name, number in known.items():
            self.logs.scalar(f"memory/{name}", number, step)

    def drift(self, step: int, found: Sequence[Staleness]) -> None:
        """Note how stale the memory is, if that was measured."""
        for one in found:
            self.history["drift"].append(one._asdict())
            self.logs.chart("drift", {"uncorrected": one.uncorrected, "in memory": one.in_memory}, step)
        for name in DRIFT if found else ():
            self.logs.in_row(f"drift/{name}", sum(getattr(one, name) for one in found) / len(found))

    def scores(self, part: str, step: int, seconds: float, scores: Scores) -> None:
        """Note scores of a part, by the weights after so many steps."""
        self.history[HISTORY[part]].append({"step": step, "seconds": seconds, **scores})
        for name, value in scores.items():
            self.logs.scalar(f"{part}/{name}", value, step)

    def best(self, step: int, scores: Scores) -> None:
        """Note the test's scores by the best weights, those after so many steps, in the row of the last step."""
        for name, value in {"step": step, **scores}.items():
            self.logs.in_row(f"best/{name}", value)

    def end(self, step: int) -> None:
        """The step is over."""
        self.logs.end(step)
