"""Each loss of this library and its like in pytorch-metric-learning, a function of a batch and a bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from xbn_ext.losses import (
    DCL,
    DCLW,
    NCA,
    Circle,
    Contrastive,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    PairLoss,
    SigLIP,
    SupCon,
    Triplet,
)
from xbn_ext.ops import memory_loss

BankLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of z, labels, bank, bank_labels

OURS, THEIRS = "xbn_ext", "pytorch-metric-learning"


@dataclass(frozen=True)
class Comparison:
    """`loss` and the name of its class in pytorch-metric-learning, if it has one, which takes the `shared` parameters;
    its `miner`. Contrastive with "mean" is its sum over all pairs, divided by the number of anchors."""

    loss: PairLoss
    name: str | None = None
    shared: tuple[str, ...] = ()
    miner: str | None = None

    def make(self, implementation: str) -> BankLoss:
        return self.ours if implementation == OURS else self.theirs()

    def ours(self, z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Tensor:
        return memory_loss(z, labels, bank, bank_labels, self.loss)

    def theirs(self) -> BankLoss:
        loss, miner = self.their_parts()

        def value(z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Tensor:
            pairs = miner(z, labels, bank, bank_labels) if miner else None
            return loss(z, labels, pairs, ref_emb=bank, ref_labels=bank_labels) / self.divisor(len(z))  # type: ignore[no-any-return]

        return value

    def their_parts(self) -> tuple[Any, Any]:
        """Its loss and its miner, which may be None."""
        losses, miners, reducers, distances = (
            import_module(f"pytorch_metric_learning.{part}") for part in ("losses", "miners", "reducers", "distances")
        )
        cosine = distances.CosineSimilarity()
        parameters = {name: getattr(self.loss, name) for name in self.shared}
        if self.sums:
            parameters["reducer"] = reducers.SumReducer()
        if isinstance(self.loss, Triplet):
            parameters["smooth_loss"] = self.loss.soft
        assert self.name is not None
        loss = getattr(losses, self.name)(distance=cosine, **parameters)
        epsilon = {"epsilon": self.loss.mining} if isinstance(self.loss, MultiSimilarity) else {}
        return loss, getattr(miners, self.miner)(distance=cosine, **epsilon) if self.miner else None

    def divisor(self, anchors: int) -> int:
        """What the value of its loss has to be divided by."""
        return anchors if self.sums else 1

    @property
    def sums(self) -> bool:
        return isinstance(self.loss, Contrastive) and self.loss.reduction == "mean"


COMPARISONS = {
    "contrastive": Comparison(Contrastive(), "ContrastiveLoss", ("pos_margin", "neg_margin")),
    "contrastive_avg": Comparison(
        Contrastive(reduction="avg_nonzero"), "ContrastiveLoss", ("pos_margin", "neg_margin")
    ),
    "supcon": Comparison(SupCon(), "SupConLoss", ("temperature",)),
    "ntxent": Comparison(NTXent(), "NTXentLoss", ("temperature",)),
    "multi_similarity": Comparison(MultiSimilarity(), "MultiSimilarityLoss", ("alpha", "beta", "base")),
    "mined": Comparison(
        MultiSimilarity(mining=0.1), "MultiSimilarityLoss", ("alpha", "beta", "base"), "MultiSimilarityMiner"
    ),
    "circle": Comparison(Circle(), "CircleLoss", ("m", "gamma")),
    "triplet": Comparison(Triplet(), "TripletMarginLoss", ("margin",), "BatchHardMiner"),
    "triplet_all": Comparison(Triplet(mining="all"), "TripletMarginLoss", ("margin",)),
    "triplet_soft": Comparison(Triplet(soft=True), "TripletMarginLoss", ("margin",), "BatchHardMiner"),
    "margin": Comparison(Margin()),
    "siglip": Comparison(SigLIP()),
    "dcl": Comparison(DCL()),
    "dclw": Comparison(DCLW()),
    "nca": Comparison(NCA(softmax_scale=8.0), "NCALoss", ("softmax_scale",)),
    "lifted_structure": Comparison(LiftedStructure(), "GeneralizedLiftedStructureLoss", ("pos_margin", "neg_margin")),
}


def theirs_installed() -> bool:
    return find_spec("pytorch_metric_learning") is not None
