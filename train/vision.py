"""``import torchvision``, also where its CUDA build meets a CPU-only torch. All uses of it are here.

A package index may pair the two that way. torchvision then fails on import with "operator torchvision::nms does not
exist": its Python code registers fake kernels for operators whose schemas live in the shared library that could not
load. Declaring the two schemas first is enough for what is used here: models, transforms and their weights' metadata.
"""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None  # kept alive: the schemas go when it goes

try:
    import torchvision
except RuntimeError as _error:
    if torch.version.cuda is not None or "torchvision::nms" not in str(_error):
        raise
    import sys

    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # what the failed import left behind
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

from torchvision import models  # noqa: E402
from torchvision.transforms import v2 as transforms  # noqa: E402

__version__: str = torchvision.__version__
__all__ = ["__version__", "models", "transforms"]
