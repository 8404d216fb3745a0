"""What each loss does with a chunk of the bank, for chunked.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xbn_ext.losses import Circle, Contrastive, Margin, MultiSimilarity, NTXent, PairLoss, SupCon, Triplet

from .dense import log_sum_exp_of, softplus


class Chunk(NamedTuple):
    """Some rows of the bank against the batch. Made again each time: its similarities may be overwritten."""

    s: Tensor  # [B, rows]
    positive: Tensor  # [B, rows]
    rows: Tensor  # [rows, D]
    norm: Tensor  # [rows]


Look = Callable[[Chunk], None]


def pairs_of(loss: PairLoss, z: Tensor) -> Pairs:
    match loss:
        case Contrastive(reduction="mean"):
            return ContrastivePairs(loss, z)
        case Contrastive() | Margin():
            return ContrastiveAveragePairs(loss, z)
        case SupCon():
            return SupConPairs(loss, z)
        case NTXent():
            return NTXentPairs(loss, z)
        case MultiSimilarity(mining=None):
            return MultiSimilarityPairs(loss, z)
        case MultiSimilarity():
            return MinedPairs(loss, z)
        case Circle():
            return CirclePairs(loss, z)
        case Triplet(mining="hardest"):
            return TripletPairs(loss, z)
    raise TypeError(f"no chunks for {loss}")


class Pairs:
    """What a loss knows of its pairs: `value` after all is done, `lse [B]` log-sum-exp of what it looked at, and the
    positives one by one."""

    def __init__(self, z: Tensor) -> None:
        self.B = len(z)
        self.value = z.new_zeros(())
        self.lse = z.new_full((self.B,), -torch.inf)
        self.anchors: list[Tensor] = []
        self.similarities: list[Tensor] = []
        self.looks: list[Look] = []

    def finish(self) -> None:
        """After the last look."""

    def gradient(self, chunks: Iterator[Chunk], z: Tensor) -> Tensor:
        grad = torch.zeros_like(z)
        for chunk in chunks:
            grad.addmm_(self.weigh(chunk.s, chunk.positive).div_(chunk.norm), chunk.rows)
        return grad

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        """dLoss/ds of a chunk."""
        raise NotImplementedError

    def number(self, anchors: Tensor) -> Tensor:
        """How many of the anchors are not 0, at least 1, in the dtype of the loss."""
        return anchors.count_nonzero().clamp(min=1).to(self.lse.dtype)

    def add(self, x: Tensor) -> None:
        self.lse = torch.logaddexp(self.lse, x.logsumexp(1))

    def collect(self, s: Tensor, positive: Tensor) -> None:
        anchor, row = positive.nonzero(as_tuple=True)
        self.anchors.append(anchor)
        self.similarities.append(s[anchor, row])

    def positives(self) -> tuple[Tensor, Tensor]:
        """Anchor and similarity of every positive pair."""
        return torch.cat(self.anchors), torch.cat(self.similarities)


class ContrastivePairs(Pairs):
    def __init__(self, loss: Contrastive, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        s.sub_(self.loss.neg_margin)
        cost = torch.where(positive, (self.loss.pos_margin - self.loss.neg_margin) - s, s).relu_()
        self.value += cost.sum() / self.B
        weight = cost.sign_().div_(self.B)
        return torch.where(positive, -weight, weight)


class ContrastiveAveragePairs(Pairs):
    def __init__(self, loss: Contrastive | Margin, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss
        self.sums, self.counts = z.new_zeros(2), z.new_zeros(2)  # of positives, of negatives
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        s.sub_(self.loss.neg_margin)
        cost = torch.where(positive, (self.loss.pos_margin - self.loss.neg_margin) - s, s).relu_()
        of_positives = torch.where(positive, cost, 0)
        sums, counts = (torch.stack([f(of_positives), f(cost)]) for f in (torch.sum, torch.count_nonzero))
        self.sums += torch.stack([sums[0], sums[1] - sums[0]])
        self.counts += torch.stack([counts[0], counts[1] - counts[0]])

    def finish(self) -> None:
        if isinstance(self.loss, Margin):
            self.counts[:] = self.counts.sum()
        self.counts.clamp_(min=1)
        self.value = (self.sums / self.counts).sum()

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        pull = (s < self.loss.pos_margin) / -self.counts[0]
        return torch.where(positive, pull, (s > self.loss.neg_margin) / self.counts[1])


class SupConPairs(Pairs):
    def __init__(self, loss: SupCon, z: Tensor) -> None:
        super().__init__(z)
        self.temperature = loss.temperature
        self.counts, self.sums = z.new_zeros(self.B), z.new_zeros(self.B)
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        x = s.div_(self.temperature)
        self.add(x)
        self.counts += positive.count_nonzero(1)
        self.sums += torch.where(positive, x, 0).sum(1)

    def finish(self) -> None:
        some = self.counts > 0
        self.counts.clamp_(min=1)
        anchors = self.number(some)
        self.value = torch.where(some, self.lse - self.sums / self.counts, 0).sum() / anchors
        self.share = (some / (anchors * self.temperature))[:, None]

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        softmax = s.div_(self.temperature).sub_(self.lse[:, None]).exp_()
        return softmax.sub_(positive / self.counts[:, None]).mul_(self.share)


class NTXentPairs(Pairs):
    def __init__(self, loss: NTXent, z: Tensor) -> None:
        super().__init__(z)
        self.temperature = loss.temperature
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        x = s.div_(self.temperature)
        self.collect(x, positive)
        self.add(x.masked_fill_(positive, -torch.inf))

    def finish(self) -> None:
        anchor, x = self.positives()
        gap = self.lse[anchor] - x
        self.value = softplus(gap).sum() / max(len(anchor), 1)
        self.scale = 1 / (max(len(anchor), 1) * self.temperature)
        self.share = torch.zeros_like(self.lse).index_add(0, anchor, gap.sigmoid()).mul_(self.scale)[:, None]

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        x = s.div_(self.temperature)
        anchor, row = positive.nonzero(as_tuple=True)
        pull = (self.lse[anchor] - x[anchor, row]).sigmoid_().mul_(-self.scale)
        weight = x.sub_(self.lse[:, None]).exp_().mul_(self.share)
        weight[anchor, row] = pull
        return weight


class MultiSimilarityPairs(Pairs):
    def __init__(self, loss: MultiSimilarity, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        self.collect(s, positive)
        self.add(s.sub_(self.loss.base).mul_(self.loss.beta).masked_fill_(positive, -torch.inf))

    def finish(self) -> None:
        loss = self.loss
        anchor, s = self.positives()
        self.pull = softplus(log_sum_exp_of(-loss.alpha * (s - loss.base), anchor, self.B))
        self.push = softplus(self.lse)
        self.value = (self.pull / loss.alpha + self.push / loss.beta).sum() / self.B

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        loss = self.loss
        anchor, row = positive.nonzero(as_tuple=True)
        pull = (-loss.alpha * (s[anchor, row] - loss.base) - self.pull[anchor]).exp_().div_(-self.B)
        weight = s.sub_(loss.base).mul_(loss.beta).sub_(self.push[:, None]).exp_().div_(self.B)
        weight[anchor, row] = pull
        return weight


class MinedPairs(MultiSimilarityPairs):
    """Looks twice: for the hardest pairs, and at what they leave."""

    def __init__(self, loss: MultiSimilarity, z: Tensor) -> None:
        super().__init__(loss, z)
        assert loss.mining is not None
        self.epsilon = loss.mining
        self.hardest_positive, self.hardest_negative = -self.lse, self.lse.clone()
        self.looks = [self.find_hardest, self.look]

    def find_hardest(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        self.collect(s, positive)
        negatives = s.masked_fill(positive, -torch.inf)
        torch.maximum(self.hardest_negative, negatives.amax(1), out=self.hardest_negative)
        self.hardest_positive.scatter_reduce_(0, self.anchors[-1], self.similarities[-1], "amin")

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        left_out = (s + self.epsilon <= self.hardest_positive[:, None]).logical_or_(positive)
        self.add(s.sub_(self.loss.base).mul_(self.loss.beta).masked_fill_(left_out, -torch.inf))

    def positives(self) -> tuple[Tensor, Tensor]:
        anchor, s = super().positives()
        kept = s - self.epsilon < self.hardest_negative[anchor]
        return anchor[kept], s[kept]

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        limit = torch.where(positive, self.hardest_negative[:, None], -torch.inf)
        easy_positive = positive & (s - self.epsilon >= limit)
        easy_negative = (s + self.epsilon <= self.hardest_positive[:, None]).logical_and_(~positive)
        return super().weigh(s, positive).masked_fill_(easy_positive.logical_or_(easy_negative), 0)


class CirclePairs(Pairs):
    def __init__(self, loss: Circle, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, positive, *_ = chunk
        self.collect(s, positive)
        self.add((s - self.loss.m).mul_(self.pace(s)).masked_fill_(positive, -torch.inf))

    def pace(self, s: Tensor) -> Tensor:
        return (s + self.loss.m).relu_().mul_(self.loss.gamma)

    def pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        pace = self.loss.gamma * (1 + self.loss.m - s).relu()
        return pace, -pace * (s - (1 - self.loss.m))

    def finish(self) -> None:
        anchor, s = self.positives()
        self.lse_positives = log_sum_exp_of(self.pull(s)[1], anchor, self.B)
        both = self.lse_positives > -torch.inf
        anchors = self.number(both)
        x = self.lse + self.lse_positives
        self.value = softplus(x).sum() / anchors
        self.share = x.sigmoid() / anchors

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        anchor, row = positive.nonzero(as_tuple=True)
        pace, x = self.pull(s[anchor, row])
        pull = -self.share[anchor] * pace * (x - self.lse_positives[anchor]).exp_()
        pace = self.pace(s)
        weight = s.sub_(self.loss.m).mul_(pace).sub_(self.lse[:, None]).exp_().mul_(pace).mul_(self.share[:, None])
        weight[anchor, row] = pull
        return weight


class TripletPairs(Pairs):
    """Keeps the hardest rows so far, divided by their norms."""

    def __init__(self, loss: Triplet, z: Tensor) -> None:
        super().__init__(z)
        self.margin, self.soft = loss.margin, loss.soft
        self.positive, self.negative = -self.lse, self.lse.clone()
        self.positive_rows, self.negative_rows = torch.zeros_like(z), torch.zeros_like(z)
        self.looks = [self.look]

    def look(self, chunk: Chunk) -> None:
        s, index = chunk.s.masked_fill(chunk.positive, -torch.inf).max(1)
        self.negative_rows = torch.where((s > self.negative)[:, None], self.unit(chunk, index), self.negative_rows)
        self.negative = torch.maximum(self.negative, s)
        s, index = chunk.s.masked_fill_(~chunk.positive, torch.inf).min(1)
        self.positive_rows = torch.where((s < self.positive)[:, None], self.unit(chunk, index), self.positive_rows)
        self.positive = torch.minimum(self.positive, s)

    def unit(self, chunk: Chunk, index: Tensor) -> Tensor:
        return chunk.rows[index] / chunk.norm[index, None]

    def finish(self) -> None:
        violation = self.negative - self.positive + self.margin  # without positives: minus infinity
        cost = softplus(violation) if self.soft else violation.relu()
        anchors = self.number(self.positive < torch.inf if self.soft else cost)
        self.value = cost.sum() / anchors
        self.share = (violation.sigmoid() if self.soft else cost.sign()).div_(anchors)[:, None]

    def gradient(self, chunks: Iterator[Chunk], z: Tensor) -> Tensor:
        return (self.negative_rows - self.positive_rows) * self.share
