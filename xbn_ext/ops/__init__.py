"""The ops: typed wrapper, its gradient, fake kernel. `schemas.py` has their signatures, `csrc/glue/` calls their
kernels; what they mean is in `xbn_ext.reference`, which has the same names and signatures. The ops of
`torch.ops.xbn_ext` themselves have no gradients: called directly, `torch.autograd.grad` raises and `backward()` warns,
and leaves a part out.

Letters: B batch rows, A anchors of them, M bank rows (capacity), D dimension. Embeddings are float32 or float64, the
bank is of any of `xbn_ext.dtypes.MEMORY_DTYPES`, whatever their dtype; statistics are float64, counters int64 scalars.
Bad shapes, dtypes and devices raise RuntimeError naming the op and the argument before anything is written.
"""

from . import bank, batch, loss_of_batch, loss_of_memory, step
from ._namespace import over
from .bank import *  # noqa: F403  what each family says that it has
from .batch import *  # noqa: F403
from .loss_of_batch import *  # noqa: F403
from .loss_of_memory import *  # noqa: F403
from .step import *  # noqa: F403

__all__ = ["over"]
__all__ += bank.__all__
__all__ += batch.__all__
__all__ += loss_of_batch.__all__
__all__ += loss_of_memory.__all__
__all__ += step.__all__
