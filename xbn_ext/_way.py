"""Which kernels `memory_loss` uses."""

from __future__ import annotations

from typing import Any

import torch

from . import _library  # noqa: F401  registers torch.ops.xbn_ext
from .checks import listed
from .options import WAYS, Way


class loss_way:
    """Forces how `memory_loss` runs. It has no effect where `path_of` says "plain". On a GPU:

    - `"tensor"`: one fused sweep over the bank, with products on tensor cores as precise as float32 (from three TF32
      products each); takes float32 embeddings and bank with D <= 1024, all losses except `Triplet(mining="all")`,
      and a GPU of compute capability 8.0 or later. Like "simt" if D is not a multiple of four, or rows are not aligned
      to 16 bytes.
    - `"simt"`: the same sweep with ordinary float32 arithmetic, on any GPU.
    - `"screen"`: one product in fp16 per pair, with a bound on its error, finds the pairs that may have a weight; these
      are then computed in float32. If they are more than 5 %, the sweep of "tensor" runs. `Margin`, and
      `Contrastive` unless its distance is Euclidean; takes what "tensor" takes.
    - `"halves"`: similarities and weights of a chunk of the bank are stored, about 32 MB; both products are on tensor
      cores and as precise as float32 (from three fp16 products each). For losses in which every pair weighs, with up to
      some hundred anchors; takes what "tensor" takes. Where a bank row's norm is not within [2^-10, 255], or the GPU
      has too little shared memory for D, the sweep of "tensor" runs.
    - `"composite"`: two library products per chunk of the bank with a kernel between them; takes everything, and its
      products follow `torch.backends.cuda.matmul` (TF32 or not).
    - `"auto"`: the default. "screen" where it can, D is a multiple of four and B x M at most 2^31; else "tensor" or,
      where that can't, "simt", both with fewer than 512 anchors; else "composite".

    On a CPU "simt", "tensor", "halves" and "composite" are the same: all similarities are computed. "auto" and "screen"
    are the same, too: products of bytes find the negatives that may have a weight, and if they are few, only these and
    the positives are computed in float32. This takes `Contrastive`, `Margin`, `Triplet`, `MultiSimilarity` with mining,
    or of `NTXent` and `DCLW` the pass over the positives; float32 embeddings with D >= 64; and AVX2 or aarch64's dot
    products. The others compute all similarities. Loss and gradient have the same bits either way (of `NTXent` and
    `DCLW` the loss may differ in the last one).

    A call sets it for the process. As a context manager, which can be entered again, it sets it back at the end:

        with xbn_ext.loss_way("composite"):
            loss = criterion(embeddings, labels)

    Raises:
        TypeError: `name` is not a string.
        RuntimeError: `name` is not one of them; or called in code that torch.compile compiles with fullgraph=True.
    """

    def __init__(self, name: Way) -> None:
        if not isinstance(name, str):
            raise TypeError(f"way must be {listed([repr(way) for way in WAYS])}, got {name!r}")
        self.name = name
        self.previous = _set(name)
        self._called = True  # and has not been entered yet
        self._outside: list[str] = []  # what the blocks that have been entered go back to

    def __enter__(self) -> loss_way:
        outside = _set(self.name)
        # `with loss_way(...)`: the call has set it, so what was there before the block is what was before the call.
        self._outside.append(self.previous if self._called and outside == self.name else outside)
        self._called = False
        return self

    def __exit__(self, *_: Any) -> None:
        _set(self._outside.pop())


def _set(name: str) -> str:
    """Returns what was set before. A compiler would set it as it traces, and not set it back: here it leaves this code
    to Python or, with fullgraph=True, raises."""
    if torch.compiler.is_compiling():
        raise RuntimeError("xbn_ext.loss_way cannot be compiled: call it around the compiled code")
    return torch.ops.xbn_ext.set_loss_way(name)  # type: ignore[no-any-return]
