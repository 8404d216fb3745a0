"""Train embeddings against a cross-batch memory that is kept current by moment matching."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import ops, reference
from .losses import Contrastive
from .memory import CrossBatchMemory
from .ops import memory_loss

try:
    __version__ = version("xbn_ext")
except PackageNotFoundError:  # built in place, not installed
    __version__ = "0+unknown"

__all__ = ["Contrastive", "CrossBatchMemory", "build_info", "memory_loss", "ops", "reference"]


def build_info() -> dict[str, Any]:
    """What was built and what it runs on: version, torch, `cuda` (kernels compiled in), `cpu_isa` in use."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "cuda": False,
        "cpu_isa": torch.ops.xbn_ext.cpu_isa(),
        "threads": torch.get_num_threads(),
    }
