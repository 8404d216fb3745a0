"""Every op in plain PyTorch, with the arguments of its schema: `torch.ops.xbn_ext` without the compiled library.

They compute what `xbn_ext.reference` says, on any device that has float64, in bounded memory: the bank is taken in
chunks, and neither the B x M similarities nor a second bank is stored. Statistics are float64.

Nothing waits for a value on a GPU, so a step can be captured in a CUDA graph. A loss of all triplets can not: it waits
for the largest number of positives of an anchor. The price is that `memory_loss`, `transform_` and `standardize_` pass
over the whole bank there, however few of its rows are filled or have to be rewritten.
"""

from .bank import enqueue_, standardize_, track_, transform_
from .batch import moments, normalize, normalize_backward
from .build import _peak_fma, cpu_isa, cuda_architectures, set_loss_way
from .loss import batch_loss, memory_loss, transform_memory_loss_

__all__ = [
    "_peak_fma",
    "batch_loss",
    "cpu_isa",
    "cuda_architectures",
    "enqueue_",
    "memory_loss",
    "moments",
    "normalize",
    "normalize_backward",
    "set_loss_way",
    "standardize_",
    "track_",
    "transform_",
    "transform_memory_loss_",
]
