"""Which runs a study has, and which settings it chooses from them.

All methods have one budget: the same steps, the same batches in the same order, the same learning rates to choose
from. Settings are chosen by MAP@R on held-out training classes ("validation"); the test classes are used once, at
the end, with what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import METHODS, Config

CENTRED = "-centred"
"""Ends the name of a method whose gradients are centred: --center-gradient, which the others are without."""
STUDIED = METHODS | {
    f"{name}{CENTRED}": (drift, f"{name} with --center-gradient: without what turns all of a batch the same way")
    for name, (drift, _) in METHODS.items()
    if name != "batch"
}
"""As METHODS: what a study compares."""
SCORE = "map@r"
VALIDATION, TEST = "validation", "test"
Chosen = dict[str, dict[str, float]]
"""Settings of each method that differ from the base's."""


@dataclass(frozen=True)
class Run:
    """One training."""

    part: str
    """VALIDATION: on some training classes, tested on the others. TEST: on all of them, tested on the test classes."""
    config: Config

    @property
    def name(self) -> str:
        """What tells it from the other runs of a study; a file name."""
        c, method = self.config, self.config.method
        method += CENTRED * c.center_gradient
        own = f"-m{_exact(c.ema_momentum)}" if c.method == "ema" else ""
        if c.method == "axbn" and c.process_noise is not None:
            own = f"-q{_exact(c.process_noise)}"
        memory = "" if c.method == "batch" else f"-memory{c.memory_size}-warmup{c.warmup_steps}"
        return f"{self.part}-{method}{own}-lr{_exact(c.lr)}-batch{c.batch_size}{memory}-seed{c.seed}"


def _exact(value: float) -> str:
    """In six digits where they are all that there are."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


CHOSEN = {"ema_momentum"}
"""Of what only one method has, what is chosen; the rest is shown, and stays as the base has it."""
MeanScore = Callable[[Sequence[Run]], float]
Row = tuple[str, float | None, list[Run]]
"""A method, a value of some setting, and the runs with it; None: the value is estimated."""
Effects = dict[str, list[Row]]
"""By setting."""


@dataclass(frozen=True)
class Plan:
    """What is to be compared."""

    base: Config
    """Settings of every run, without what a run varies."""
    methods: tuple[str, ...]
    seeds: int
    """Of the final runs."""
    map_seeds: int
    """Of the runs that settings are chosen from."""
    lrs: tuple[float, ...]
    memory_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    warmups: tuple[int, ...]
    noises: tuple[float, ...]
    """Of axbn: process noise over measurement noise, in place of an estimated one."""
    momenta: tuple[float, ...]
    """Of ema."""

    def run(self, part: str, method: str, seed: int, **changes: object) -> Run:
        """A run of the base settings with these changes."""
        centred = method.endswith(CENTRED)
        config = replace(self.base, method=uncentred(method), center_gradient=centred, seed=seed, **changes)  # type: ignore[arg-type]
        return Run(part, config)

    def many(self, part: str, method: str, **changes: object) -> list[Run]:
        """The same for each seed."""
        return [
            self.run(part, method, seed, **changes)
            for seed in range(self.map_seeds if part == VALIDATION else self.seeds)
        ]

    def check(self) -> None:
        """Raise ConfigError for the first setting that is not allowed."""
        anything: Chosen = {method: {"lr": self.lrs[0]} for method in self.methods}
        self.map(), self.own(anything), self.effects(anything)

    def memory_sizes_of(self, method: str) -> tuple[int, ...]:
        """Those that a method is tried with: without a memory, the base's, which does nothing."""
        return (self.base.memory_size,) if method == "batch" else self.memory_sizes

    def map(self) -> list[Run]:
        """Learning rate x memory size x method."""
        return [
            run
            for method in self.methods
            for memory_size in self.memory_sizes_of(method)
            for lr in self.lrs
            for run in self.many(VALIDATION, method, lr=lr, memory_size=memory_size)
        ]

    def choose_lr(self, mean_score: MeanScore) -> Chosen:
        """The learning rate of each method that is best on held-out classes, at the base's other settings."""
        found: Chosen = {}
        for method in self.methods:
            scores = {lr: mean_score(self.many(VALIDATION, method, lr=lr)) for lr in self.lrs}
            found[method] = {"lr": max(scores, key=scores.__getitem__)}
        return found

    def own(self, chosen: Chosen) -> Effects:
        """What only one method has: its runs with each value, at its learning rate."""
        noises = (self.base.process_noise, *(noise for noise in self.noises if noise != self.base.process_noise))
        own = self.base.ema_momentum
        momenta = self.momenta if own in self.momenta else (own, *self.momenta)
        values = {"axbn": ("process_noise", noises), "ema": ("ema_momentum", momenta)}
        found = {}
        for method, (setting, tried) in values.items():
            if variants := [name for name in self.methods if uncentred(name) == method]:
                found[setting] = self._vary(variants, setting, tried, chosen)
        return found

    def choose_own(self, chosen: Chosen, mean_score: MeanScore) -> Chosen:
        """The same with the best value of what only one method has."""
        found = {method: dict(settings) for method, settings in chosen.items()}
        for setting in self.own(chosen).keys() & CHOSEN:
            best: dict[str, float] = {}
            for method, value, runs in self.own(chosen)[setting]:
                mean = mean_score(runs)
                if value is not None and mean > best.get(method, -math.inf):
                    best[method], found[method][setting] = mean, value
        return found

    def effects(self, chosen: Chosen) -> Effects:
        """One setting at a time away from the chosen ones, all at one learning rate, with which they interact."""
        chosen = self.at_one_rate(chosen)
        memories = [method for method in self.methods if method != "batch"]
        return {
            "memory_size": self._vary(memories, "memory_size", self.memory_sizes, chosen),
            "batch_size": self._vary(self.methods, "batch_size", self.batch_sizes, chosen),
            "warmup_steps": self._vary(memories, "warmup_steps", self.warmups, chosen),
        }

    def final(self, chosen: Chosen) -> dict[str, list[Run]]:
        """Each method with what was chosen for it, on the test classes."""
        return {method: self.many(TEST, method, **chosen[method]) for method in self.methods}

    def common(self, chosen: Chosen) -> dict[str, list[Run]]:
        """The same, with the base's learning rate for all methods: as without tuning."""
        return self.final(self.at_one_rate(chosen))

    def at_one_rate(self, chosen: Chosen) -> Chosen:
        """What was chosen, with the base's learning rate."""
        return {method: {**settings, "lr": self.base.lr} for method, settings in chosen.items()}

    def _vary(self, methods: Iterable[str], setting: str, values: Sequence[float | None], chosen: Chosen) -> list[Row]:
        return [
            (method, value, self.many(VALIDATION, method, **{**chosen[method], setting: value}))
            for method in methods
            for value in values
        ]


def unique(effects: Effects) -> list[Run]:
    """Each run once, in order."""
    return list({run.name: run for rows in effects.values() for *_, runs in rows for run in runs}.values())


def uncentred(method: str) -> str:
    """The method of a run, of one in a study."""
    return method.removesuffix(CENTRED)


def moves(method: str) -> bool:
    """Whether rows of its memory change once they are stored."""
    return uncentred(method) not in ("batch", "xbm")


def titles(methods: Iterable[str]) -> dict[str, str]:
    """What each method is."""
    return {method: STUDIED[method][1] for method in methods}
