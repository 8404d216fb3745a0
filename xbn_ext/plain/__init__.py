"""Every op in plain PyTorch, with the arguments of its schema: `torch.ops.xbn_ext` without the compiled library, and on
devices that it has no kernels for.

They compute what `xbn_ext.reference` says, on any device that has float64, in bounded memory: the bank is taken in
chunks, and neither the B x M similarities nor a second bank is stored. Statistics are float64.

Nothing waits for a value on a GPU, so a step can be captured in a CUDA graph. A loss of all triplets can not: it waits
for the largest number of positives of an anchor. The price is that `memory_loss`, `transform_` and `standardize_` pass
over the whole bank there, however few of its rows are filled or have to be rewritten.
"""

from ..schemas import NAMES
from . import bank, batch, build, loss_of_batch, loss_of_memory, step

for _file in (bank, batch, build, loss_of_batch, loss_of_memory, step):
    globals().update({name: function for name, function in vars(_file).items() if name in NAMES})
