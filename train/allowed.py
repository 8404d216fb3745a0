"""Which settings are not allowed, alone or together; what only the data can say comes later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .cores import cores
from .data import DataError, check_spec

MARGINS = {  # of a contrastive loss, by its distance
    "cosine": (-1, 1, "a cosine similarity, -1 to 1"),
    "euclidean": (0, 2, "a distance of unit vectors, 0 to 2"),
    "squared_euclidean": (0, 4, "a squared distance of unit vectors, 0 to 4"),
}
WORKERS_OF_A_CORE = 16


class ConfigError(ValueError):
    """A setting is not allowed; the message names it."""


def require(config: Any) -> None:
    """Raise ConfigError for the first setting of a ``Config`` that is not allowed."""

    def check(name: str, allowed: Callable[[Any], bool], words: str) -> None:
        _require(allowed(getattr(config, name)), name, getattr(config, name), words)

    try:
        check_spec(config.data)
    except DataError as error:
        raise ConfigError(str(error)) from None
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["argument"].get("choices")
        known = choices is None or value in choices or value is f.default
        _require(known, f.name, value, f"one of {', '.join(choices or ())}")
        if isinstance(value, float):
            _require(math.isfinite(value), f.name, value, "a finite number")
            _require(abs(value) <= 1e15, f.name, value, "within [-1e15, 1e15]")  # float32 holds a product of two
    for name in ("memory_size", "embedding_dim", "steps", "batch_size", "accumulate", "lr"):
        check(name, lambda v: v > 0, "more than 0")
    check("process_noise", lambda v: v is None or v > 0, "more than 0")
    for name in ("memory_weight", "batch_weight", "warmup_steps", "backbone_lr", "lr_warmup", "weight_decay",
                 "clip_grad", "seed", "hidden", "eval_every", "image_size"):  # fmt: skip
        check(name, lambda v: v >= 0, "0 or more")
    check("accumulate", lambda v: v < 2**31, "below 2^31")
    check("warmup_steps", lambda v: v * config.accumulate < 2**63, "below 2^63, times --accumulate")
    check("threads", lambda v: 0 <= v <= 4096, "between 0 and 4096")  # OpenMP crashes on many more
    most = WORKERS_OF_A_CORE * cores()  # each is a process of some 200 MB
    check("workers", lambda v: v is None or 0 <= v <= most, f"between 0 and {most}, {WORKERS_OF_A_CORE} for each core")
    check("max_classes", lambda v: v is None or v >= 4, "4 or more")
    for name in ("test_share", "validation_share"):
        check(name, lambda v: v is None or 0 <= v < 1, "0 or more and less than 1")
    check("best", lambda v: v == "map@r" or config.validation_share > 0, "map@r without --validation-share")
    check("ema_momentum", lambda v: 0 < v <= 1, "more than 0 and at most 1")
    check("ema", lambda v: 0 <= v < 1, "0 or more and less than 1, such as 0.99")
    check("freeze", lambda v: 0 <= v <= 1, "between 0 and 1")
    check("samples_per_class", lambda v: v >= 2, "2 or more, or no image has a match in its batch")
    least, most, words = MARGINS.get(config.distance or "cosine", MARGINS["cosine"])
    for name in ("pos_margin", "neg_margin"):
        check(name, lambda v: v is None or least <= v <= most, words)
    try:
        config.pair_loss()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    k = config.samples_per_class
    check(
        "batch_size",
        lambda v: v % k == 0 and v >= 2 * k,
        f"a multiple of --samples-per-class ({k}), twice it or more",
    )
    if config.method != "batch":
        check("memory_size", lambda v: v >= config.batch_size, f"--batch-size ({config.batch_size}) or more")
    if config.batch_weight == 0 and (config.method == "batch" or config.memory_weight == 0):
        raise ConfigError("--batch-weight 0 leaves nothing to train on: the memory has no weight either")
    if config.batch_weight == 0 and config.warmup_steps >= config.steps:
        raise ConfigError(
            f"--batch-weight 0 leaves nothing to train on: the memory joins in after --warmup-steps "
            f"{config.warmup_steps} of --steps {config.steps}"
        )
    check("wandb", lambda v: v != "", "the name of a project")
    if config.resume and config.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")


def _require(allowed: bool, name: str, value: object, words: str) -> None:
    if not allowed:
        raise ConfigError(f"--{name.replace('_', '-')} {value}: must be {words}")
