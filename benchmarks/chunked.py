"""The losses in plain PyTorch, a chunk of the bank at a time: the baseline `chunked`, hard to beat and small in memory.

A loss looks at every chunk, once or twice, to collect a few numbers per anchor; then it reads the chunks once more
for dLoss/ds in closed form, whose product with the chunk is the gradient. Contrastive with "mean" needs no look,
and the hardest triplets need only looks. A loss of all triplets has to know every positive of an anchor before any
negative, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xbn_ext.losses import DCL, DCLW, NCA, LiftedStructure, PairLoss, SigLIP, Triplet

from . import chunked_losses
from .chunked_exponents import ExponentPairs, SigLIPPairs
from .chunked_losses import Chunk


def can_be_chunked(loss: PairLoss) -> bool:
    return not (isinstance(loss, Triplet) and loss.mining == "all")


@torch.no_grad()
def chunked_loss(
    loss: PairLoss, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, *, rows: int = 4096, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Loss and dLoss/dz of `z [B, D]` against `bank [M, D]`, `rows` bank rows at a time."""

    def chunks() -> Iterator[Chunk]:
        for u, u_labels in zip(bank.split(rows), bank_labels.split(rows), strict=True):
            r = u.to(z.dtype)
            norm = torch.linalg.vector_norm(r, dim=1).clamp_(min=eps)
            yield Chunk((z @ r.T).div_(norm), labels[:, None] == u_labels, r, norm)

    pairs = _pairs_of(loss, z)
    for look in pairs.looks:
        for chunk in chunks():
            look(chunk)
    pairs.finish()
    grad = pairs.gradient(chunks(), z)
    return pairs.value, grad


def _pairs_of(loss: PairLoss, z: Tensor) -> chunked_losses.Pairs:
    match loss:
        case SigLIP():
            return SigLIPPairs(loss, z)
        case DCL() | DCLW() | NCA() | LiftedStructure():
            return ExponentPairs(loss, z)
    return chunked_losses.pairs_of(loss, z)
