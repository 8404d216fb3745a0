"""Train embeddings against a cross-batch memory that is kept current by moment matching."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _devices, _library, losses, ops, reference
from ._devices import path_of
from ._way import loss_way
from .evaluation import evaluate
from .losses import CustomLoss, InChunks, LabelSets, SelectPairs, SmoothAP
from .losses.exponents import *  # noqa: F403  what each file of losses says that it has
from .losses.margins import *  # noqa: F403
from .memory import CrossBatchMemory
from .ops import memory_loss
from .sampler import ClassBalancedSampler
from .two_towers import TwoTowers

try:
    __version__ = version("xbn_ext")
except PackageNotFoundError:  # built in place, not installed
    __version__ = "0+unknown"

__all__ = [
    "ClassBalancedSampler",
    "CrossBatchMemory",
    "CustomLoss",
    "InChunks",
    "LabelSets",
    "SelectPairs",
    "SmoothAP",
    "TwoTowers",
    "build_info",
    "evaluate",
    "loss_way",
    "memory_loss",
    "ops",
    "path_of",
    "reference",
]
__all__ += losses.exponents.__all__
__all__ += losses.margins.__all__


def __getattr__(name: str) -> Any:
    if name == "backend":  # its old name
        warnings.warn("xbn_ext.backend is called xbn_ext.loss_way", DeprecationWarning, stacklevel=2)
        return loss_way
    raise AttributeError(f"module 'xbn_ext' has no attribute {name!r}")


def build_info() -> dict[str, Any]:
    """What was built and what it runs on.

    `version`, `torch`; `native`: True with the compiled library, False with plain PyTorch in its place
    (`XBN_NATIVE=0`, or there is no library); `paths`: what `path_of` says of the CPU and of each GPU or other
    accelerator, by names such as "cuda:0" (of NVIDIA's "unknown" before CUDA is initialised, which this does not do);
    `cuda`: the GPU architectures that this build has kernels for, as in `["80", "90a", "80-ptx"]` (`-ptx`: also for any
    later one), empty if it was built without a CUDA compiler; `cpu_isa` ("none" without the library) and `threads` in
    use.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _library.native,
        "paths": _devices.paths(),
        "cuda": [name for name in torch.ops.xbn_ext.cuda_architectures().split(";") if name],
        "cpu_isa": torch.ops.xbn_ext.cpu_isa(),
        "threads": torch.get_num_threads(),
    }
