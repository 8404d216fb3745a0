"""`SmoothAP`: average precision, made smooth. It needs every positive of an anchor against every row, so no sums of one
sweep give it: `InChunks` runs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .in_chunks import InChunks


class SmoothAP(InChunks):
    """Smooth average precision (Brown et al. 2020, arXiv 2007.12163, eq. 5, with labels), on cosine similarities.

    An anchor with P positives pays 1 less the mean over these of `R(positives) / R(all)`, where `R = 1 + sum_j
    sigmoid((s_j - s_p) / temperature)` is the smooth rank of the positive p among the anchor's other positives, and
    among all other rows. Averaged over the anchors with positives.

    Computed in PyTorch, an anchor at a time, whose P×M sigmoids are stored.

    Examples:
        >>> criterion = CrossBatchMemory(SmoothAP(), embedding_size=128, memory_size=8192)

    Args:
        temperature: positive. At a small one ranks are nearly whole, and few rows have a gradient.

    Raises:
        ValueError: the temperature is not a positive number.
    """

    def __init__(self, temperature: float = 0.01) -> None:
        super().__init__(_AveragePrecision(checks.finite_positive("temperature", temperature)))


class _AveragePrecision(nn.Module):
    """What anchors pay, added up, and how many pay."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None, ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> tuple[Tensor, int]:  # fmt: skip
        rows, of_rows = (embeddings, labels) if ref_emb is None or ref_labels is None else (ref_emb, ref_labels)
        s = F.normalize(embeddings, dim=1) @ F.normalize(rows, dim=1).T
        others = torch.ones_like(s, dtype=torch.bool)
        if ref_emb is None:
            others.fill_diagonal_(False)
        right = others & (labels[:, None] == of_rows)
        costs = [self._cost(*of_anchor) for of_anchor in zip(s, others, right, strict=True) if of_anchor[2].any()]
        return sum(costs, s.sum() * 0), len(costs)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"

    def _cost(self, s: Tensor, others: Tensor, right: Tensor) -> Tensor:
        positives = s[right][:, None]
        ahead = ((s[None] - positives) / self.temperature).sigmoid()
        own = 0.5  # of a positive against itself
        among_all = 1 + (ahead * others).sum(1) - own
        among_positives = 1 + ahead[:, right].sum(1) - own
        return 1 - (among_positives / among_all).mean()
