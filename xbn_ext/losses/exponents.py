"""Losses that are sums of exponents of similarities, and logarithms of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import checks
from .pair_loss import LossWithTemperature, PairLoss

# These are xbn_ext's, too.
__all__ = ["DCL", "DCLW", "NCA", "Circle", "LiftedStructure", "MultiSimilarity", "NTXent", "SigLIP", "SupCon"]


@dataclass(frozen=True)
class SupCon(LossWithTemperature):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, eq. 2).

    An anchor pays the mean over its positives of `log sum_a e^(s_a / temperature) - s / temperature`, `a` running over
    all its pairs. Averaged over the anchors that pay something: those with positives and more than one pair.

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is
            checked only when a memory is made.
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
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is
            checked only when a memory is made.
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
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is
            checked only when a memory is made.
    """

    name = "dcl"
    temperature: float | Tensor = 0.1


@dataclass(frozen=True)
class DCLW(LossWithTemperature):
    """Weighted decoupled contrastive loss with labels (Yeh et al. 2021, arXiv 2110.06848): `DCL`, with less weight on
    positives that are similar already.

    A positive pair costs `log sum_n e^(s_n / temperature) - w s / temperature`, `n` running over the anchor's
    negatives. Its weight is `w = 2 - e^(s / sigma) / E`, E being the mean of `e^(s / sigma)` over the positive pairs of
    all anchors that have negatives and are finite; it is taken for a constant in the gradient. Averaged over the
    positive pairs of anchors that have negatives.

    Args:
        temperature: positive. It cannot be learned: the weights would not be those of the same sigma.
        sigma: at least 1e-4; the smaller, the more do weights differ. (Of less, float32 would round e^(s / sigma) by
            more than a thousandth.)
    """

    name = "dclw"
    must_be_positive = ("temperature", "sigma")
    may_be_learned = ()
    gives_in_common = True
    temperature: float = 0.1
    sigma: float = 0.5

    def _check_number(self, name: str, value: Any) -> None:
        super()._check_number(name, value)
        if name == "sigma":
            checks.within(name, value, 1e-4, 1e30)

    @property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        return (0, 1), (1,)


@dataclass(frozen=True)
class SigLIP(LossWithTemperature):
    """Sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, eq. 1) with labels.

    With `x = s / temperature + bias`, an anchor pays `log(1 + e^-x)` for a positive and `log(1 + e^x)` for a negative.
    Averaged over the anchors. The paper begins at these values and learns both.

    Args:
        temperature: positive. A tensor of shape [] or [1] is learned if it requires a gradient; its value is
            checked only when a memory is made.
        bias: what similarities are shifted by, below 0 as nearly all pairs are negatives. A tensor of shape [] or [1]
            is learned if it requires a gradient. The host waits for a tensor's value in each step, and a compiled graph
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

    def with_parameters(self, parameters: Sequence[float]) -> PairLoss:
        *others, mining = parameters
        return self._with_numbers([*others, None if mining < 0 else mining])


@dataclass(frozen=True)
class Circle(PairLoss):
    """Circle loss with class labels (Sun et al. 2020, arXiv 2002.10857, eqs. 6 to 8).

    An anchor with positives and negatives pays
    `log(1 + sum_n e^(gamma a_n (s_n - m)) * sum_p e^(-gamma a_p (s_p - 1 + m)))` with `a_n = max(s_n + m, 0)` and
    `a_p = max(1 + m - s_p, 0)`, which count as constants in the gradient. Averaged over those anchors.

    Args:
        m: relaxation of the margin, within [-10, 10].
        gamma: positive, scale of the similarities.
    """

    name = "circle"
    must_be_positive = ("gamma",)
    m: float = 0.4
    gamma: float = 80.0

    def _check_number(self, name: str, value: Any) -> None:
        super()._check_number(name, value)
        if name == "m":  # beside a larger square of it, float32 would round similarities away
            checks.within(name, value, -10, 10)


KINDS = SupCon(), NTXent(), DCL(), DCLW(), SigLIP(), NCA(), LiftedStructure(), MultiSimilarity(), Circle()
