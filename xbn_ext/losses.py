"""Pair losses over cosine similarities: what the pairs of an anchor cost. The formulas are in `reference/losses.py`
(PyTorch) and `csrc/math/losses.h` (kernels). Parameters and values are those of pytorch-metric-learning with
`CosineSimilarity`, where it has the loss; so are the defaults, except for the margins of `Contrastive` and `Triplet`,
whose defaults there are meant for Euclidean distances. These two have them with `distance="euclidean"`.

An anchor's *positives* are the other rows of its class, its *negatives* all rows of other classes; `s` is the
similarity of a pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from torch import Tensor

from . import checks
from ._autograd import needs_grad

Reduction = Literal["mean", "avg_nonzero"]
TripletMining = Literal["hardest", "all"]
Distance = Literal["cosine", "euclidean", "squared_euclidean"]


@dataclass(frozen=True)
class PairLoss:
    """A loss that `CrossBatchMemory` and `memory_loss` take: one of the classes below.

    Its parameters are numbers. A temperature, `SigLIP`'s bias and `Margin`'s boundary may be tensors of shape [] or [1]
    and be learned; margins, scales and the like may not: a learned margin would shrink until the loss vanished.

    Raises:
        ValueError: a parameter is not finite or out of its range, naming it.
    """

    name: ClassVar[str]
    """What users and kernels call the loss."""
    words: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are words; the others are numbers."""
    must_be_positive: ClassVar[tuple[str, ...]] = ()
    """Its parameters that are."""
    may_be_learned: ClassVar[tuple[str, ...]] = ()
    """Its parameters that may be tensors, whose values are not checked here."""
    offset: ClassVar[str] = ""
    """The one among them that similarities are shifted by, if there is one. Its value is read on the host in each step,
    and must be finite."""

    def __post_init__(self) -> None:
        for name in self.numbers():
            self._check_number(name, getattr(self, name))

    def _check_number(self, name: str, value: Any) -> None:
        if name in self.may_be_learned and isinstance(value, Tensor):
            if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
                got = f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"{name} must be a number or a floating-point tensor [] or [1], got {got}")
            return
        checks.finite(name, value)
        if name in self.must_be_positive:
            checks.positive(name, value)

    def numbers(self) -> list[str]:
        """The names of the parameters that are numbers."""
        return [field.name for field in dataclasses.fields(self) if field.name not in self.words]

    @property
    def formula(self) -> str:
        """The kind, whatever the distance."""
        return self.name

    @property
    def kind(self) -> str:
        """The name by which the kernels know the loss: it and what its words say."""
        return self.formula

    @property
    def parameters(self) -> list[float]:
        """The numbers the kernels take, in their order."""
        return [number(getattr(self, name)) for name in self.numbers()]

    def slope(self, positives: Tensor, negatives: Tensor) -> Tensor:
        """dLoss/doffset, by how many positives and negatives of an anchor have a weight, or what these add up to."""
        raise NotImplementedError

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        """The passes over a bank that it takes, and of each the slots that it fills (`csrc/math/losses.h`). None where
        their sums cannot be added up over parts of a bank."""
        return ((0, 1),)

    def with_parameters(self, parameters: Sequence[float]) -> PairLoss:
        """The same kind of loss with other `parameters`."""
        return dataclasses.replace(self, **dict(zip(self.numbers(), parameters, strict=True)))


@dataclass(frozen=True)
class LossWithTemperature(PairLoss):
    """A loss of `s / temperature`. A temperature may be a tensor of shape [] or [1], whose value is not checked."""

    must_be_positive = ("temperature",)
    may_be_learned: ClassVar[tuple[str, ...]] = ("temperature",)
    temperature: float | Tensor


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


BY_DISTANCE = cast(float, None)
"""A margin that is not given."""


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
        ValueError: a margin is not finite, or the reduction or the distance is unknown.
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
            gradient: then the host waits for its value in each step, and a compiled graph ends there.
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

    def slope(self, positives: Tensor, negatives: Tensor) -> Tensor:
        some = positives + negatives
        return (positives - negatives) / some.where(some > 0, 1)

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),)

    def with_parameters(self, parameters: Sequence[float]) -> Margin:
        pos_margin, neg_margin = parameters
        return Margin((pos_margin - neg_margin) / 2, (pos_margin + neg_margin) / 2)


@dataclass(frozen=True)
class SigLIP(LossWithTemperature):
    """Sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, eq. 1) with labels.

    With `x = s / temperature + bias`, an anchor pays `log(1 + e^-x)` for a positive and `log(1 + e^x)` for a negative.
    Averaged over the anchors. The paper begins at these values and learns both.

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is not
            checked.
        bias: what similarities are shifted by, below 0 as nearly all pairs are negatives. A tensor of shape [] or [1]
            is learned if it requires a gradient: then the host waits for its value in each step, and a compiled graph
            ends there.
    """

    name = "siglip"
    may_be_learned = ("temperature", "bias")
    offset = "bias"
    temperature: float | Tensor = 0.1
    bias: float | Tensor = -10.0

    def slope(self, positives: Tensor, negatives: Tensor) -> Tensor:
        return negatives - positives


@dataclass(frozen=True)
class SupCon(LossWithTemperature):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, eq. 2).

    An anchor pays the mean over its positives of `log sum_a e^(s_a / temperature) - s / temperature`, `a` running over
    all its pairs. Averaged over the anchors that pay something: those with positives and more than one pair.

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is not
            checked.
    """

    name = "supcon"
    temperature: float | Tensor = 0.1


@dataclass(frozen=True)
class NTXent(LossWithTemperature):
    """Normalised-temperature cross entropy, or InfoNCE, with labels (Sohn 2016; Chen et al. 2020, arXiv 2002.05709,
    eq. 1, with every positive against the negatives only, as pytorch-metric-learning has it).

    A positive pair costs `log(1 + sum_n e^((s_n - s) / temperature))`, `n` running over the anchor's negatives.
    Averaged over all positive pairs. (pytorch-metric-learning adds 1e-7 inside its logarithm; this does not.)

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is not
            checked.
    """

    name = "ntxent"
    temperature: float | Tensor = 0.07

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return (0,), (1,)


@dataclass(frozen=True)
class DCL(LossWithTemperature):
    """Decoupled contrastive loss with labels (Yeh et al. 2021, arXiv 2110.06848): NTXent without the positive itself in
    its sum.

    A positive pair costs `log sum_n e^(s_n / temperature) - s / temperature`, `n` running over the anchor's negatives.
    Averaged over the positive pairs of anchors that have negatives. It may be below 0.

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is not
            checked.
    """

    name = "dcl"
    temperature: float | Tensor = 0.1


@dataclass(frozen=True)
class NCA(PairLoss):
    """Neighbourhood components analysis (Goldberger et al. 2004), as pytorch-metric-learning's NCALoss has it, on
    similarities.

    An anchor with positives pays `-log(sum_p e^(softmax_scale s_p) / sum_a e^(softmax_scale s_a))`, `a` running over
    all its pairs. Averaged over those anchors. (Of unit vectors, d² = 2 - 2s: what is a scale of 1 for squared
    Euclidean distances, pytorch-metric-learning's default, is 2 here.)

    Args:
        softmax_scale: positive, what similarities are multiplied by.
    """

    name = "nca"
    must_be_positive = ("softmax_scale",)
    softmax_scale: float = 1.0


@dataclass(frozen=True)
class LiftedStructure(PairLoss):
    """Generalised lifted structure loss (Hermans et al. 2017, arXiv 1703.07737, section 2), on similarities.

    An anchor pays `max(log sum_p e^(pos_margin - s_p) + log sum_n e^(s_n - neg_margin), 0)`, where a logarithm of no
    pairs is 0. Averaged over the anchors: pytorch-metric-learning's GeneralizedLiftedStructureLoss with
    CosineSimilarity.

    Args:
        pos_margin: the similarity at which a positive weighs 1.
        neg_margin: the similarity at which a negative weighs 1.
    """

    name = "lifted_structure"
    pos_margin: float = 1.0
    neg_margin: float = 0.5


@dataclass(frozen=True)
class MultiSimilarity(PairLoss):
    """Multi-similarity loss (Wang et al. 2019, arXiv 1904.06627, eq. 15), averaged over the anchors.

    An anchor pays `log(1 + sum_p e^(-alpha (s_p - base))) / alpha + log(1 + sum_n e^(beta (s_n - base))) / beta`.

    Args:
        alpha: positive, how sharply positives are weighted.
        beta: positive, how sharply negatives are weighted.
        base: the similarity at which a pair weighs 1.
        mining: None, all pairs; or epsilon >= 0 of the paper's pair mining (eqs. 10, 11; pytorch-metric-learning's
            MultiSimilarityMiner has 0.1): of the negatives only those more similar than the hardest positive minus
            epsilon, of the positives only those less similar than the hardest negative plus epsilon. At equality, as
            with an epsilon of 0 and one image in two classes, rounding decides.
    """

    name = "multi_similarity"
    must_be_positive = ("alpha", "beta")
    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5
    mining: float | None = None

    def _check_number(self, name: str, value: Any) -> None:
        if name == "mining" and value is None:
            return
        super()._check_number(name, value)
        if name == "mining" and value < 0:
            raise ValueError(f"mining must be None or an epsilon >= 0, got {value}")

    @property
    def parameters(self) -> list[float]:
        return [float(x) for x in (self.alpha, self.beta, self.base, -1.0 if self.mining is None else self.mining)]

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return ((0, 1),) if self.mining is None else ((1,), (0,), (1,))

    def with_parameters(self, parameters: Sequence[float]) -> MultiSimilarity:
        alpha, beta, base, mining = parameters
        return MultiSimilarity(alpha, beta, base, None if mining < 0 else mining)


@dataclass(frozen=True)
class Circle(PairLoss):
    """Circle loss with class labels (Sun et al. 2020, arXiv 2002.10857, eqs. 6 to 8).

    An anchor with positives and negatives pays
    `log(1 + sum_n e^(gamma a_n (s_n - m)) * sum_p e^(-gamma a_p (s_p - 1 + m)))` with `a_n = max(s_n + m, 0)` and
    `a_p = max(1 + m - s_p, 0)`, which count as constants in the gradient. Averaged over those anchors.

    Args:
        m: relaxation of the margin.
        gamma: positive, scale of the similarities.
    """

    name = "circle"
    must_be_positive = ("gamma",)
    m: float = 0.4
    gamma: float = 80.0


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
        ValueError: the margin is not finite, the mining or the distance is unknown, or all triplets are to be soft or
            Euclidean (of all triplets the distance may be squared; `InChunks` has the others).
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


DISTANCES: tuple[Distance, ...] = ("euclidean", "squared_euclidean")
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
KINDS: dict[str, PairLoss] = {
    loss.kind: loss
    for loss in (
        Contrastive(),
        Contrastive(reduction="avg_nonzero"),
        SupCon(),
        NTXent(),
        MultiSimilarity(),
        Circle(),
        Triplet(),
        Triplet(soft=True),
        Triplet(mining="all"),
        DCL(),
        NCA(),
        LiftedStructure(),
        Margin(),
        SigLIP(),
        *(Contrastive(reduction=how, distance=d) for d in DISTANCES for how in REDUCTIONS),
        *(Triplet(soft=soft, distance=d) for d in DISTANCES for soft in (False, True)),
        Triplet(mining="all", distance="squared_euclidean"),
    )
}
"""Every kind of loss that the kernels know, with its default parameters."""

LOSSES = {loss.name: type(loss) for loss in KINDS.values()}
"""The classes above, by name."""


def check_loss(op: str, loss: Any) -> None:
    """Raises TypeError unless the kernels know the loss: a class of `LOSSES`, or a subclass with the same numbers."""
    classes = tuple(LOSSES.values())
    if not isinstance(loss, classes):
        hint = ", which InChunks takes" if hasattr(loss, "compute_loss") else ""  # one of pytorch-metric-learning
        raise TypeError(f"{op}: loss must be an xbn_ext loss such as Contrastive(), got {type(loss).__name__}{hint}")
    if type(loss) in classes:
        return
    known = KINDS.get(loss.kind)
    if known is None or loss.numbers() != known.numbers():
        raise TypeError(
            f"{op}: loss must be one that the kernels know: {type(loss).__name__} is of the kind {loss.kind!r} and has "
            f"the numbers {', '.join(loss.numbers())}"
        )


def check_unit_rows(loss: Any, **options: bool) -> None:
    """Raises ValueError for an option that leaves rows as long as they are, if the loss is of distances between rows of
    unit length."""
    if isinstance(loss, LossOfDistances) and loss.distance != "cosine":
        for name, makes_unit in options.items():
            if not makes_unit:
                raise ValueError(
                    f'{name} must be True with distance="{loss.distance}", which is that of rows of unit length'
                )


LEARNABLE = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.may_be_learned))
"""The parameters that may be learned, of all losses."""


def number(value: float | Tensor) -> float:
    """Of a tensor, its one number, for which the host waits. Raises RuntimeError if it has a forward-mode derivative,
    which would be lost."""
    if not isinstance(value, Tensor):
        return float(value)
    needs_grad(value)
    return float(value.detach())


def at(loss: PairLoss, **values: float | Tensor) -> PairLoss:
    """A loss with other values of some parameters."""
    others = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss) if field.init}
    return type(loss)(**others | values)


def default_of(loss: PairLoss, name: str) -> float:
    """The default of a parameter."""
    return float(getattr(KINDS[loss.kind], name))


def learned_offset(loss: PairLoss) -> Tensor | None:
    """The tensor that similarities are shifted by, if it requires a gradient."""
    offset = getattr(loss, loss.offset) if loss.offset else None
    return offset if isinstance(offset, Tensor) and offset.requires_grad else None


def learned_of(loss: PairLoss) -> list[Tensor]:
    """What the value of a loss depends on besides embeddings, and is learned."""
    values = (getattr(loss, name) for name in loss.may_be_learned)
    return [t for t in values if isinstance(t, Tensor) and t.requires_grad]


def check_offset(loss: PairLoss) -> None:
    """Raises ValueError if a tensor that similarities are shifted by is not finite, or has no value."""
    offset = getattr(loss, loss.offset) if loss.offset else None
    if not isinstance(offset, Tensor):
        return
    if offset.is_meta:
        raise ValueError(f"{loss.offset} is on the meta device, which holds no values")
    checks.finite(loss.offset, number(offset))


def fold_temperature(loss: PairLoss, z: Tensor) -> tuple[PairLoss, Tensor]:
    """The same loss with a number for its temperature: a tensor divides the embeddings `z [B, D]` instead, since
    `s / t = (z / t) · r`. So it gets its gradient, and the host does not wait for its value."""
    if isinstance(loss, LossWithTemperature) and isinstance(loss.temperature, Tensor):
        return at(loss, temperature=1.0), z / loss.temperature.to(z.dtype)
    return loss, z
