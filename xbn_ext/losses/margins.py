"""Losses with margins: a pair, or a triplet, that keeps its margin costs nothing. Margins are of similarities, or of
distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from torch import Tensor

from .. import checks
from .pair_loss import PairLoss, number

# These are xbn_ext's, too.
__all__ = ["Contrastive", "Margin", "Triplet"]

Reduction = Literal["mean", "avg_nonzero"]
TripletMining = Literal["hardest", "all"]
Distance = Literal["cosine", "euclidean", "squared_euclidean"]
DISTANCES: tuple[Distance, ...] = ("euclidean", "squared_euclidean")

BY_DISTANCE = cast(float, None)
"""A margin that is not given."""


class LossOfDistances(PairLoss):
    """A loss whose margins may be of distances, between rows that are taken to be of unit length: `d² = 2 - 2s`. A
    margin that is not given is resolved when the loss is made: it is the default for its distance."""

    default_margins: ClassVar[dict[str, tuple[float, float]]]
    """Of each margin, for similarities and for distances."""
    distance: Distance

    def __post_init__(self) -> None:
        checks.one_of(*get_args(Distance))("distance", self.distance)
        for name, of_both in self.default_margins.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, of_both[self.distance != "cosine"])
        super().__post_init__()

    @property
    def kind(self) -> str:
        return self.formula if self.distance == "cosine" else f"{self.formula}_{self.distance}"


@dataclass(frozen=True)
class Contrastive(LossOfDistances):
    """Contrastive loss (Hadsell et al. 2006), by default on similarities (in the cosine form of XBM, arXiv 1912.06798,
    eq. 2).

    An anchor pays `max(pos_margin - s, 0)` for a positive and `max(s - neg_margin, 0)` for a negative. With a distance
    it pays `max(d - pos_margin, 0)` and `max(neg_margin - d, 0)`.

    Args:
        pos_margin: positives more similar than this cost nothing; with a distance, those closer than this. 1 by
            default; 0 with a distance.
        neg_margin: negatives less similar than this cost nothing; with a distance, those farther than this. 0.5 by
            default; 1 with a distance.
        reduction: `"mean"` divides the sum over all pairs by the number of anchors (XBM's gradient; its code
            reports `s` instead of `s - neg_margin` for an active negative, a constant per pair).
            `"avg_nonzero"` averages positives and negatives separately, each over the pairs that cost something
            (pytorch-metric-learning's ContrastiveLoss with its default reducer).
        distance: `"cosine"`, similarities; `"euclidean"`, the distance d of rows of unit length, with the default
            margins of pytorch-metric-learning's ContrastiveLoss, whose default distance it is; or
            `"squared_euclidean"`, d² instead of d (`LpDistance(power=2)`). Where d is 0, its derivative is, too.

    Raises:
        ValueError: a margin is not finite or beyond 1e15, or the reduction or the distance is unknown.
    """

    name = "contrastive"
    words = ("reduction", "distance")
    default_margins: ClassVar[dict[str, tuple[float, float]]] = {"pos_margin": (1.0, 0.0), "neg_margin": (0.5, 1.0)}
    pos_margin: float = BY_DISTANCE
    neg_margin: float = BY_DISTANCE
    reduction: Reduction = "mean"
    distance: Distance = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("mean", "avg_nonzero")("reduction", self.reduction)

    @property
    def formula(self) -> str:
        return f"{self.name}_mean" if self.reduction == "mean" else self.name

    @property
    def groups(self) -> int:
        return 1 if self.reduction == "mean" else 2

    @property
    def takes_screen(self) -> bool:
        return self.distance != "euclidean"

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),) if self.reduction == "mean" and self.distance != "euclidean" else ((0, 1),)

    @property
    def limits(self) -> tuple[float, float]:
        """How near (`reference.losses.nearness`) positives cost nothing from, and negatives up to."""
        sign = 1 if self.distance == "cosine" else -1
        return sign * self.pos_margin, sign * self.neg_margin


@dataclass(frozen=True)
class Margin(PairLoss):
    """Margin loss (Wu et al. 2017, arXiv 1706.07567, eq. 4, on similarities): `Contrastive` around a boundary.

    An anchor pays `max(beta + margin - s, 0)` for a positive and `max(s - beta + margin, 0)` for a negative. Averaged
    over all pairs that cost something. (pytorch-metric-learning's MarginLoss averages over triplets: a pair counts as
    often as it is in one.)

    Args:
        margin: how far from the boundary a pair must be to cost nothing.
        beta: the boundary between positives and negatives. A tensor of shape [] or [1] is learned if it requires a
            gradient. The host waits for a tensor's value in each step, and a compiled graph ends there.
    """

    name = "margin"
    may_be_learned = ("beta",)
    offset = "beta"
    margin: float = 0.1
    beta: float | Tensor = 0.5

    @property
    def pos_margin(self) -> float | Tensor:
        """Positives more similar than this cost nothing."""
        return self.beta + self.margin

    @property
    def neg_margin(self) -> float | Tensor:
        """Negatives less similar than this cost nothing."""
        return self.beta - self.margin

    @property
    def limits(self) -> tuple[float | Tensor, float | Tensor]:
        """As those of `Contrastive`."""
        return self.pos_margin, self.neg_margin

    @property
    def parameters(self) -> list[float]:
        beta = number(self.beta)
        return [beta + self.margin, beta - self.margin]

    @property
    def takes_screen(self) -> bool:
        return True

    def slope(self, positives: Tensor, negatives: Tensor) -> Tensor:
        some = positives + negatives
        return (positives - negatives) / some.where(some > 0, 1)

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),)

    def with_parameters(self, parameters: Sequence[float]) -> PairLoss:
        pos_margin, neg_margin = parameters
        return self._with_numbers([(pos_margin - neg_margin) / 2, (pos_margin + neg_margin) / 2])


@dataclass(frozen=True)
class Triplet(LossOfDistances):
    """Triplet margin loss, by default on similarities, of the hardest triplet of each anchor or of all triplets.

    Args:
        margin: by how much a positive has to be more similar or, with a distance, closer. 0.1 by default; 0.05 with a
            distance.
        mining: `"hardest"`: an anchor with positives and negatives pays `max(max_n s_n - min_p s_p + margin, 0)`
            (Hermans et al. 2017, arXiv 1703.07737, eq. 5). Averaged over the anchors that pay something:
            pytorch-metric-learning's TripletMarginLoss with CosineSimilarity and its BatchHardMiner. Of equally hard
            rows the first in the memory counts.
            `"all"`: an anchor pays `max(s_n - s_p + margin, 0)` for each of its positives with each of its negatives
            (Schroff et al. 2015, arXiv 1503.03832, eqs. 1 to 3, on similarities). Averaged over the triplets that cost
            something: pytorch-metric-learning's TripletMarginLoss with CosineSimilarity and no miner.
        soft: of the hardest triplets, an anchor pays `log(1 + e^(max_n s_n - min_p s_p + margin))` (Hermans et al.'s
            soft margin, pytorch-metric-learning's `smooth_loss`). Averaged over the anchors with positives and
            negatives.
        distance: `"cosine"`, similarities; or, instead of `s_n - s_p`, `"euclidean"`, the difference `d_p - d_n` of
            distances between rows of unit length, with the default margin of pytorch-metric-learning's
            TripletMarginLoss, whose default distance it is; or `"squared_euclidean"`, `d_p² - d_n²`
            (`LpDistance(power=2)`). Where d is 0, its derivative is, too.

    Raises:
        ValueError: the margin is not finite or beyond 1e15, the mining or the distance is unknown, or all triplets are
            to be soft or Euclidean (of all triplets the distance may be squared; `InChunks` has the others).
    """

    name = "triplet"
    words = ("mining", "soft", "distance")
    default_margins: ClassVar[dict[str, tuple[float, float]]] = {"margin": (0.1, 0.05)}
    margin: float = BY_DISTANCE
    mining: TripletMining = "hardest"
    soft: bool = False
    distance: Distance = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("hardest", "all")("mining", self.mining)
        if checks.flag("soft", self.soft) and self.mining == "all":
            raise ValueError('soft goes with mining="hardest"')
        if self.mining == "all" and self.distance == "euclidean":
            raise ValueError(
                'distance "euclidean" goes with mining="hardest": of all triplets it is "cosine" or '
                '"squared_euclidean", or take InChunks(TripletMarginLoss())'
            )

    @property
    def formula(self) -> str:
        return f"{self.name}_soft" if self.soft else f"{self.name}_{self.mining}"

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return ((0, 1),) if self.mining == "hardest" else ()


KINDS = (
    Contrastive(),
    Contrastive(reduction="avg_nonzero"),
    Margin(),
    Triplet(),
    Triplet(soft=True),
    Triplet(mining="all"),
    *(Contrastive(reduction=how, distance=d) for d in DISTANCES for how in get_args(Reduction)),
    *(Triplet(soft=soft, distance=d) for d in DISTANCES for soft in (False, True)),
    Triplet(mining="all", distance="squared_euclidean"),
)
