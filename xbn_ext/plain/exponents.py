"""Losses of exponents of similarities, a chunk of the bank at a time, with dLoss/ds in closed form."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..losses import DCLW, NCA, Circle, LiftedStructure, MultiSimilarity, NTXent, SigLIP, SupCon
from ..losses.pair_loss import LossWithTemperature
from ..reference.losses import softplus
from ..reference.programs import LARGEST_EXPONENT
from .pairs import Chunk, Hardest, L, LogSum, Pairs

T = TypeVar("T", bound=LossWithTemperature)


class SigLIPPairs(Pairs[SigLIP]):
    """What sums are divided by is known before."""

    def finish(self) -> None:
        self.number[0] = self.number_of_anchors()

    def weigh(self, chunk: Chunk) -> Tensor:
        x = chunk.s / self.loss.temperature + self.loss.bias
        x = torch.where(chunk.positive, -x, x)
        some = chunk.positive | chunk.negative
        self.value[0] += torch.where(some, softplus(x), 0).sum()
        weight = torch.where(some, x.sigmoid_(), 0)
        pull, push = torch.where(chunk.positive, weight, 0), weight.masked_fill_(chunk.positive, 0)
        self.counts += torch.stack([pull.sum(dtype=torch.float64), push.sum(dtype=torch.float64)])
        return push.sub_(pull).mul_((self.shares()[0] / self.loss.temperature).to(self.dtype))


class LookedAt(Pairs[L]):
    """A loss that counts each anchor's pairs as it first looks."""

    def __init__(self, loss: L, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.positives, self.negatives = self.zeros(), self.zeros()
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        self.positives += chunk.positive.sum(1)
        self.negatives += chunk.negative.sum(1)


class PullAndLogSum(LookedAt[T]):
    """A loss of a sum over an anchor's positives, and of a log-sum-exp over some of its pairs."""

    def __init__(self, loss: T, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.lse, self.sums = LogSum(self.zeros()), self.zeros()

    def pushed(self, chunk: Chunk) -> Tensor:
        """What the log-sum-exp is over."""
        raise NotImplementedError

    def look(self, chunk: Chunk) -> None:
        super().look(chunk)
        x = chunk.s / self.loss.temperature
        self.sums += torch.where(chunk.positive, x, 0).sum(1)
        self.lse.add(x, self.pushed(chunk))


class SupConPairs(PullAndLogSum[SupCon]):
    def pushed(self, chunk: Chunk) -> Tensor:
        return chunk.positive | chunk.negative

    def finish(self) -> None:
        some = self.positives > 0
        paying = some & (self.positives + self.negatives > 1)  # an only pair costs nothing
        self.count(self.positives * paying, self.negatives * paying)
        of_each = self.positives.clamp(min=1)
        self.value[0] = torch.where(some, self.lse.value - self.sums / of_each, 0).sum()
        self.number[0] = paying.sum()
        self.share = torch.where(some, self.shares()[0] / self.loss.temperature, 0)
        self.pull = self.share / of_each

    def weigh(self, chunk: Chunk) -> Tensor:
        x = chunk.s / self.loss.temperature
        softmax = x.sub_(self.narrow(self.lse.value)).exp_().mul_(self.narrow(self.share))
        weight = softmax.masked_fill_(~self.pushed(chunk), 0)
        return weight.sub_(torch.where(chunk.positive, self.narrow(self.pull), 0))


class NTXentPairs(LookedAt[NTXent]):
    """What a positive costs needs the sum over the negatives, and what a negative weighs what all positives cost."""

    def __init__(self, loss: NTXent, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.lse = LogSum(self.zeros())
        self.share, self.cost = self.zeros(), self.zeros()
        self.looks = [self.look_at_negatives, self.look_at_positives]

    def look_at_negatives(self, chunk: Chunk) -> None:
        super().look(chunk)
        self.lse.add(chunk.s / self.loss.temperature, chunk.negative)

    def gap(self, chunk: Chunk) -> Tensor:
        return self.narrow(self.lse.value) - chunk.s / self.loss.temperature

    def look_at_positives(self, chunk: Chunk) -> None:
        gap = self.gap(chunk)
        self.cost += torch.where(chunk.positive, softplus(gap), 0).sum(1)
        self.share += torch.where(chunk.positive, gap.sigmoid(), 0).sum(1)

    def finish(self) -> None:
        both = (self.positives > 0) & (self.negatives > 0)
        self.count(self.positives * both, self.negatives * both)
        self.value[0], self.number[0] = self.cost.sum(), self.positives.sum()
        self.scale = (self.shares()[0] / self.loss.temperature).to(self.dtype)

    def weigh(self, chunk: Chunk) -> Tensor:
        gap = self.gap(chunk)
        push = torch.where(chunk.negative, gap.neg().exp_().mul_(self.narrow(self.share)), 0)
        return push.sub_(torch.where(chunk.positive, gap.sigmoid_(), 0)).mul_(self.scale)


class DCLPairs(PullAndLogSum[T]):
    def pushed(self, chunk: Chunk) -> Tensor:
        return chunk.negative

    def finish(self) -> None:
        self.both = both = (self.positives > 0) & (self.negatives > 0)
        self.count(self.positives * both, self.negatives * both)
        self.value[0] = torch.where(both, self.positives * self.lse.value - self.sums, 0).sum()
        self.number[0] = self.counts[0]
        self.pull = torch.where(both, self.shares()[0] / self.loss.temperature, 0)
        self.push = self.pull * self.positives

    def weigh(self, chunk: Chunk) -> Tensor:
        x = chunk.s / self.loss.temperature
        push = (
            x.sub_(self.narrow(self.lse.value)).exp_().mul_(self.narrow(self.push)).masked_fill_(~self.pushed(chunk), 0)
        )
        return push.sub_(torch.where(chunk.positive, self.narrow(self.pull), 0))


class DCLWPairs(DCLPairs[DCLW]):
    """The look also adds up e^(s / sigma) over positives, and s times it: a weight is 1, as in DCL, and 1 less
    e^(s / sigma) over its mean."""

    def __init__(self, loss: DCLW, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.lse_of_positives = LogSum(self.zeros())
        self.products = self.zeros()  # of s / temperature and e^(s / sigma), over the sum of the latter

    def look(self, chunk: Chunk) -> None:
        super().look(chunk)
        before = self.lse_of_positives.value
        self.lse_of_positives.add(chunk.s / self.loss.sigma, chunk.positive)
        after = self.lse_of_positives.value
        exponents = (chunk.s / self.loss.sigma - self.narrow(after)).exp_()
        products = torch.where(chunk.positive, chunk.s / self.loss.temperature * exponents, 0).sum(1)
        kept = torch.where(before == -torch.inf, 0, (before - after).exp())
        self.products = self.products * kept + products

    def finish(self) -> None:
        super().finish()
        of_anchors = self.lse_of_positives.value
        common = self.both & of_anchors.isfinite()
        number = torch.where(common, self.positives, 0).sum()
        log_sum = torch.where(common.any(), of_anchors.masked_fill(~common, -torch.inf), 0).logsumexp(0)
        self.log_mean = log_sum - number.clamp(min=1).log()
        relative = torch.where(self.both, (of_anchors - self.log_mean).exp() * self.products, 0)
        self.value[0] += (relative - torch.where(self.both, self.sums, 0)).sum()

    def weigh(self, chunk: Chunk) -> Tensor:
        exponents = chunk.s / self.loss.sigma - self.log_mean.to(self.dtype)
        more = 1 - exponents.clamp_(max=LARGEST_EXPONENT).exp_()
        weight = super().weigh(chunk)  # it overwrites the similarities
        return weight.sub_(torch.where(chunk.positive, self.narrow(self.pull) * more, 0))


class TwoLogSums(LookedAt[L]):
    """A loss of two log-sum-exps: of an anchor's positives and of its negatives, the exponents multiples of s."""

    slopes: tuple[float, float]

    def __init__(self, loss: L, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.sums = LogSum(self.zeros()), LogSum(self.zeros())

    def look(self, chunk: Chunk) -> None:
        super().look(chunk)
        for slope, lse, keep in zip(self.slopes, self.sums, (chunk.positive, chunk.negative), strict=True):
            lse.add(slope * chunk.s, keep)

    def finish(self) -> None:
        by_sums = self.settle()
        share = self.shares()[0]
        self.weights = [slope * by * share for slope, by in zip(self.slopes, by_sums, strict=True)]

    def settle(self) -> tuple[Tensor, Tensor]:
        """Sets value and number. Returns dCost/dlog-sum-exp `[B]` of both."""
        raise NotImplementedError

    def weigh(self, chunk: Chunk) -> Tensor:
        parts = []
        for slope, lse, weight, keep in zip(
            self.slopes, self.sums, self.weights, (chunk.positive, chunk.negative), strict=True
        ):
            x = slope * chunk.s
            parts.append(x.sub_(self.narrow(lse.value)).exp_().mul_(self.narrow(weight)).masked_fill_(~keep, 0))
        return parts[0].add_(parts[1])


class NCAPairs(TwoLogSums[NCA]):
    def __init__(self, loss: NCA, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.slopes = loss.softmax_scale, loss.softmax_scale

    def settle(self) -> tuple[Tensor, Tensor]:
        has_positives = self.positives > 0
        both = has_positives & (self.negatives > 0)
        self.count(self.positives * both, self.negatives * both)
        pull, push = (lse.value for lse in self.sums)
        x = torch.where(has_positives, push - pull, -torch.inf)  # without negatives -inf, or the NaN of a positive
        self.value[0], self.number[0] = softplus(x).sum(), has_positives.sum()
        return -x.sigmoid(), x.sigmoid()


class LiftedStructurePairs(TwoLogSums[LiftedStructure]):
    def __init__(self, loss: LiftedStructure, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.slopes = -1.0, 1.0

    def settle(self) -> tuple[Tensor, Tensor]:
        numbers = self.positives, self.negatives
        margins = self.loss.pos_margin, -self.loss.neg_margin
        pull, push = (
            torch.where(n > 0, lse.value + margin, 0)
            for n, lse, margin in zip(numbers, self.sums, margins, strict=True)
        )
        cost = (pull + push).relu()
        pays = ~(cost <= 0)
        self.count(*(n * pays for n in numbers))
        self.value[0], self.number[0] = cost.sum(), self.number_of_anchors()
        return pays.double(), pays.double()


class MultiSimilarityPairs(Pairs[MultiSimilarity]):
    """With mining it looks twice: for the hardest pairs, and at what they leave."""

    def __init__(self, loss: MultiSimilarity, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.pulls, self.pushes = LogSum(self.zeros()), LogSum(self.zeros())
        self.hardest = Hardest(z)
        self.looks = [self.look] if loss.mining is None else [self.hardest.look, self.look]

    def kept(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        epsilon = self.loss.mining
        if epsilon is None:
            return chunk.positive, chunk.negative
        easy_positive = chunk.s - epsilon >= self.hardest.negative[:, None]
        easy_negative = chunk.s + epsilon <= self.hardest.positive[:, None]
        return chunk.positive & ~easy_positive, chunk.negative & ~easy_negative

    def exponents(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return -self.loss.alpha * s, self.loss.beta * s

    def look(self, chunk: Chunk) -> None:
        kept = self.kept(chunk)
        self.count(*kept)
        for lse, x, keep in zip((self.pulls, self.pushes), self.exponents(chunk.s), kept, strict=True):
            lse.add(x, keep)

    def finish(self) -> None:
        loss = self.loss
        of_pulls, of_pushes = loss.alpha * loss.base, -loss.beta * loss.base  # what all exponents are to be more
        pull, push = softplus(self.pulls.value + of_pulls), softplus(self.pushes.value + of_pushes)
        self.value[0] = (pull / loss.alpha + push / loss.beta).sum()
        self.pull, self.push = pull - of_pulls, push - of_pushes
        self.number[0] = self.number_of_anchors()

    def weigh(self, chunk: Chunk) -> Tensor:
        positive, negative = self.kept(chunk)
        pull, push = self.exponents(chunk.s)
        pull.sub_(self.narrow(self.pull)).exp_().masked_fill_(~positive, 0)
        push.sub_(self.narrow(self.push)).exp_().masked_fill_(~negative, 0)
        return push.sub_(pull).mul_(self.shares()[0].to(self.dtype))


class CirclePairs(LookedAt[Circle]):
    def __init__(self, loss: Circle, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(loss, z, anchors)
        self.pulls, self.pushes = LogSum(self.zeros()), LogSum(self.zeros())

    def pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Pace, exponent."""
        pace = (1 + self.loss.m - s).relu_().mul_(self.loss.gamma)
        return pace, -pace * (s - (1 - self.loss.m))

    def push(self, s: Tensor) -> tuple[Tensor, Tensor]:
        pace = (s + self.loss.m).relu_().mul_(self.loss.gamma)
        return pace, pace * (s - self.loss.m)

    def look(self, chunk: Chunk) -> None:
        super().look(chunk)
        self.pulls.add(self.pull(chunk.s)[1], chunk.positive)
        self.pushes.add(self.push(chunk.s)[1], chunk.negative)

    def finish(self) -> None:
        both = (self.positives > 0) & (self.negatives > 0)
        self.count(self.positives * both, self.negatives * both)
        x = torch.where(both, self.pulls.value + self.pushes.value, -torch.inf)
        self.value[0], self.number[0] = softplus(x).sum(), both.sum()
        self.share = x.sigmoid() * self.shares()[0]

    def weigh(self, chunk: Chunk) -> Tensor:
        weights = []
        for lse, (pace, x), keep in (
            (self.pushes, self.push(chunk.s), chunk.negative),
            (self.pulls, self.pull(chunk.s), chunk.positive),
        ):
            weights.append(x.sub_(self.narrow(lse.value)).exp_().mul_(pace).masked_fill_(~keep, 0))
        push, pull = weights
        return push.sub_(pull).mul_(self.narrow(self.share))


BY_FORMULA = {
    "siglip": SigLIPPairs,
    "supcon": SupConPairs,
    "ntxent": NTXentPairs,
    "dcl": DCLPairs,
    "dclw": DCLWPairs,
    "nca": NCAPairs,
    "lifted_structure": LiftedStructurePairs,
    "multi_similarity": MultiSimilarityPairs,
    "circle": CirclePairs,
}
