"""Pair losses: what a pair of similarity s adds to the loss. The formulas themselves are in `reference.py`
(PyTorch) and `csrc/formulas.h` (kernels)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

Reduction = Literal["mean", "avg_nonzero"]


@dataclass(frozen=True)
class Contrastive:
    """Contrastive loss on similarities (Hadsell et al. 2006, in the cosine form of XBM, arXiv 1912.06798, eq. 2).

    An anchor pays `max(pos_margin - s, 0)` for a row of its class and `max(s - neg_margin, 0)` for any other.

    Args:
        pos_margin: positives more similar than this cost nothing.
        neg_margin: negatives less similar than this cost nothing.
        reduction: `"mean"` divides the sum over all pairs by the number of anchors (XBM's gradient; its code
            reports `s` instead of `s - neg_margin` for an active negative, a constant per pair).
            `"avg_nonzero"` averages positives and negatives apart, each over the pairs that cost something
            (pytorch-metric-learning's ContrastiveLoss with CosineSimilarity and AvgNonZeroReducer).

    Raises:
        ValueError: a margin is not finite or the reduction is unknown.
    """

    pos_margin: float = 1.0
    neg_margin: float = 0.5
    reduction: Reduction = "mean"

    kind: ClassVar[str] = "contrastive"

    def __post_init__(self) -> None:
        for name in ("pos_margin", "neg_margin"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.reduction not in ("mean", "avg_nonzero"):
            raise ValueError(f"reduction must be 'mean' or 'avg_nonzero', got {self.reduction!r}")

    @property
    def parameters(self) -> list[float]:
        """The numbers the kernels take, in their order."""
        return [self.pos_margin, self.neg_margin]
