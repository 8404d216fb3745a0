"""What a `CrossBatchMemory` is told: what may be set at any time, and what is chosen when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import checks

# What may be set at any time, and its check.
OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "update": checks.one_of("inplace", "deferred"),
    "enqueue": checks.one_of("after", "before"),
    "normalize_embeddings": checks.flag,
    "renormalize": checks.flag,
    "batch_weight": checks.moderate,
    "memory_weight": checks.moderate,
    "center_gradient": checks.flag,
    "warmup_steps": checks.whole_from(0),
    "eps": checks.finite_positive,
    "no_class": checks.none_or_label,
}
OF_LOSS = (
    "normalize_embeddings", "renormalize", "batch_weight", "memory_weight", "center_gradient", "warmup_steps", "eps",
)  # fmt: skip
# What is chosen when the memory is made.
CHOSEN_ONCE = (
    "loss", "embedding_size", "memory_size", "drift", "process_noise", "measurement_noise", "ema_momentum", "filter",
    "memory_dtype", "bank_dtype", "process_group", "shards", "batch_size",
)  # fmt: skip
