"""The ops: typed wrapper, its gradient, fake kernel. `schemas.py` has their signatures, `csrc/glue/` calls their
kernels; what they mean is in `xbn_ext.reference`, which has the same names and signatures. The ops of
`torch.ops.xbn_ext` themselves have no gradients: called directly, `torch.autograd.grad` raises and `backward()` warns,
and leaves a part out.

Letters: B batch rows, A anchors of them, M bank rows (capacity), D dimension. Embeddings are float32 or float64, the
bank is of any of `xbn_ext.dtypes.MEMORY_DTYPES`, whatever their dtype; statistics are float64, counters int64 scalars.
Bad shapes, dtypes and devices raise RuntimeError naming the op and the argument before anything is written.
"""

from ._namespace import over
from .bank import enqueue_, standardize_, track_, transform_
from .batch import moments, normalize
from .loss import batch_loss, memory_loss, memory_loss_and_pairs, transform_memory_loss_
from .parts import batch_sums, memory_sums, settle_sums
from .step import loss_of, losses_of, step_

__all__ = [
    "batch_loss", "batch_sums", "enqueue_", "loss_of", "losses_of", "memory_loss", "memory_loss_and_pairs",
    "memory_sums", "moments", "normalize", "over", "settle_sums", "standardize_", "step_", "track_", "transform_",
    "transform_memory_loss_",
]  # fmt: skip
