"""The specification: one training step of adaptive cross batch normalization in plain PyTorch.

Every op of `xbn_ext.ops` has its twin here under the same name, and `step` puts them
together as `xbn_ext.CrossBatchMemory` does. Nothing is fused and the whole similarity matrix is built: this is for
reading and for testing. Run it in float64 and it is the truth that every kernel is measured against. The other plain
PyTorch, in chunks and for use, is `xbn_ext.plain`; it takes from here what is small, such as the formulas of a pair.

Letters: B batch rows, M bank rows (capacity), D dimension, `count` filled bank rows. `z [B, D]` are the
embeddings of the batch, `bank [M, D]` those of past batches. Whatever the dtype of the embeddings, statistics
(moments, sums, the affine map) are float64.

The method is our reconstruction of "Adaptive Cross Batch Normalization for Metric Learning" (arXiv 2303.17127)
from its abstract; the cross-batch memory is that of "Cross-Batch Memory for Embedding Learning" (arXiv
1912.06798).
"""

from . import loss, ops
from .loss import *  # noqa: F403  what it says that it has
from .one_step import Memory, step, step_
from .ops import *  # noqa: F403  what it says that it has
from .parts import batch_sums, memory_sums, settle_sums

__all__ = ["Memory", "batch_sums", "memory_sums", "settle_sums", "step", "step_"]
__all__ += loss.__all__
__all__ += ops.__all__
