"""`InChunks`: a loss of pytorch-metric-learning, or one called like them. What runs it is `plain/in_chunks.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import checks
from . import few_pairs, reducers
from .custom import OwnLoss

BY_BATCH = (
    "DynamicSoftMarginLoss", "IntraPairVarianceLoss", "LiftedStructureLoss", "ThresholdConsistentMarginLoss",
    "VICRegLoss",
)  # fmt: skip
"""Losses of pytorch-metric-learning that are not a sum of what each anchor pays, or not with references."""

REGULARIZERS_BY_BATCH = ("CenterInvariantRegularizer", "RegularFaceRegularizer", "SparseCentersRegularizer")
"""Regularizers that compare what they are given with each other: here embeddings."""

MINERS_BY_BATCH = ("HDCMiner", "UniformHistogramMiner")
"""Miners that choose among the pairs of all anchors."""


class InChunks(OwnLoss):
    """A loss of pytorch-metric-learning that takes reference embeddings, for `CrossBatchMemory` and `memory_loss`: a
    few anchors of the batch at a time, each against all of the memory. The pairs of a chunk are stored, no others.

    Value and gradient are those of one call with the whole batch, except where `NCALoss` returns 0 or NaN for all of
    it, since it has one row or no positive: here each anchor counts alone. Parameters of the loss learn along; it must
    not use another tensor that requires a gradient.

    The embeddings come to it with unit length, unless `normalize_embeddings=False`; so do the references, unless
    `renormalize=False`. With neither the loss itself decides whether they are normalised, as its `distance` does.

    For an anchor that may meet no row, since all have its id, the loss is not called. It pays 0, and counts in the mean
    over the anchors of a loss without a `reducer`. A reducer averages over what its loss lists, and does not count it.

    Examples:
        >>> from pytorch_metric_learning import losses, miners
        >>> loss = InChunks(losses.MarginLoss(), miners.TripletMarginMiner(), anchors=4)
        >>> criterion = CrossBatchMemory(loss, embedding_size=128, memory_size=8192)

    Args:
        loss: called with `(embeddings [b, D], labels [b], indices_tuple, ref_emb [n, D], ref_labels [n])`, and for the
            batch against itself with the first three alone; or for each anchor with the other rows as references, where
            some of these must be left out, or only they have unit length. What an anchor pays must not depend on the
            others. Without a `reducer` it must return the mean over the anchors; or a tuple: a sum, and the number that
            the sum over all chunks is divided by, a constant that is not negative.
        miner: makes the `indices_tuple`, as in pytorch-metric-learning's `CrossBatchMemory`: called with `(embeddings,
            labels, ref_emb, ref_labels)`. What it picks for an anchor must not depend on the others. None: all pairs.
        anchors: how many a chunk has.

    Attributes:
        loss, miner, anchors: may be set later; the next step looks at them.

    Raises:
        TypeError: the loss or the miner cannot be called; or a reducer of the loss is not one of
            `xbn_ext.losses.reducers.KNOWN`.
        ValueError: `anchors` is below 1; or what an anchor pays by this loss, or what the miner picks for it, is known
            to depend on the others.
    """

    def __init__(
        self, loss: Callable[..., Tensor], miner: Callable[..., Any] | None = None, *, anchors: int = 8
    ) -> None:
        super().__init__()
        self.loss, self.miner, self.anchors = loss, miner, anchors
        self.check()

    def check(self) -> None:
        """Raises TypeError or ValueError for a loss, a miner or a number of anchors that it does not take."""
        loss, miner = self.loss, self.miner
        if not callable(loss) or isinstance(loss, OwnLoss | type):
            raise TypeError(f"loss must be a loss of pytorch-metric-learning, or called like one, got {loss!r}")
        if miner is not None and (not callable(miner) or isinstance(miner, type)):
            raise TypeError(f"miner must be None or a miner of pytorch-metric-learning, got {miner!r}")
        if type(miner).__name__ in MINERS_BY_BATCH:
            raise ValueError(f"miner: what {type(miner).__name__} picks for an anchor depends on the others")
        for part in loss.modules() if isinstance(loss, nn.Module) else [loss]:
            _check_part(part, miner)
            if miner is not None and part is not loss and few_pairs.decide(part):
                name = type(part).__name__
                raise ValueError(f"miner: a {name} in another loss takes none here: give it to InChunks itself")
        reducers.check(loss)
        self.anchors = checks.whole("anchors", self.anchors, 1)

    def extra_repr(self) -> str:
        return f"anchors={self.anchors}"


def _check_part(part: Any, miner: Any) -> None:
    """Of a loss, or a module in it: raises ValueError where what an anchor pays depends on the others."""
    name = type(part).__name__
    regularizer = type(getattr(part, "embedding_regularizer", None)).__name__
    if name in BY_BATCH or regularizer in REGULARIZERS_BY_BATCH:
        by = name if name in BY_BATCH else regularizer
        raise ValueError(f"loss: by {by} what an anchor pays depends on the others")
    if miner is not None and name == "NCALoss":
        raise ValueError("miner: NCALoss weighs an anchor by how often others are picked: it takes no miner")
    if name == "TripletMarginLoss" and getattr(part, "swap", False):
        raise ValueError(
            "loss: TripletMarginLoss with swap takes no references: it looks for their distances "
            "among those of the batch"
        )
