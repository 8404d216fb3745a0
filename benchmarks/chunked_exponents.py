"""What more losses do with a chunk of the bank, for chunked.py: those of two log-sum-exps, and the sigmoid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext.losses import DCL, DCLW, NCA, LiftedStructure, SigLIP

from .chunked_losses import Chunk, Pairs
from .dense import log_sum_exp_of, softplus


class SigLIPPairs(Pairs):
    def __init__(self, loss: SigLIP, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        x = s.div_(self.loss.temperature).add_(self.loss.bias)
        anchor, row = positive.nonzero(as_tuple=True)
        pull = x[anchor, row]
        self.value += (F.softplus(x).sum() - pull.sum()) / self.B  # log(1 + e^-x) is log(1 + e^x) - x
        weight = x.sigmoid_()
        weight[anchor, row] -= 1
        return weight.div_(self.B * self.loss.temperature)


class ExponentPairs(Pairs):
    """`lse` is that of the negatives at a slope and offset; `pull` that of the positives."""

    def __init__(self, loss: DCL | DCLW | NCA | LiftedStructure, z: Tensor) -> None:
        super().__init__(z)
        self.loss = loss
        self.looks = [self.look]
        match loss:
            case LiftedStructure():
                self.slope, self.offset = 1.0, -loss.neg_margin
                self.of_positives = (-1.0, loss.pos_margin)
            case NCA():
                self.slope, self.offset = loss.softmax_scale, 0.0
                self.of_positives = (self.slope, 0.0)
            case DCL() | DCLW():
                self.slope, self.offset = 1 / float(loss.temperature), 0.0
                self.of_positives = (self.slope, 0.0)

    def look(self, chunk: Chunk) -> None:
        self.collect(chunk.s, chunk.positive)
        x = chunk.s.mul_(self.slope).add_(self.offset)
        self.add(x.masked_fill_(chunk.positive, -torch.inf))

    def finish(self) -> None:
        anchor, s = self.positives()
        slope, offset = self.of_positives
        x = slope * s + offset
        self.pull = log_sum_exp_of(x, anchor, self.B)
        some = self.pull > -torch.inf
        match self.loss:
            case DCL() | DCLW():
                number = torch.zeros_like(self.lse).index_add_(0, anchor, torch.ones_like(x))
                pairs = number.sum().clamp(min=1)
                weight = torch.ones_like(s)
                if isinstance(self.loss, DCLW):
                    self.log_mean = (s / self.loss.sigma).logsumexp(0) - pairs.log()
                    weight = self.weight_of(s)
                self.value = ((number * self.lse).sum() - (weight * x).sum()) / pairs
                self.push_share, self.pull_share = number / pairs, None
                self.each = slope / pairs
            case NCA():
                gap = torch.where(some, self.lse - self.pull, -torch.inf)
                anchors = self.number(some)
                self.value = softplus(gap).sum() / anchors
                self.push_share = gap.sigmoid() / anchors
                self.pull_share = -slope * self.push_share
            case LiftedStructure():
                cost = (self.lse + torch.where(some, self.pull, 0)).relu()
                self.value = cost.sum() / self.B
                self.push_share = cost.sign() / self.B
                self.pull_share = slope * self.push_share

    def weight_of(self, s: Tensor) -> Tensor:
        """DCLW's, of positives."""
        return 2 - (s / self.loss.sigma - self.log_mean).exp()  # type: ignore[union-attr]

    def weigh(self, s: Tensor, positive: Tensor) -> Tensor:
        anchor, row = positive.nonzero(as_tuple=True)
        if self.pull_share is None:
            pull = -self.each.expand(len(anchor))
            if isinstance(self.loss, DCLW):
                pull = pull * self.weight_of(s[anchor, row])
        else:
            slope, offset = self.of_positives
            x = slope * s[anchor, row] + offset
            pull = self.pull_share[anchor] * (x - self.pull[anchor]).exp_()
        x = s.mul_(self.slope).add_(self.offset)
        weight = x.sub_(self.lse[:, None]).exp_().mul_(self.slope * self.push_share[:, None])
        weight[anchor, row] = pull
        return weight
