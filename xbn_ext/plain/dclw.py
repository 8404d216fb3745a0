"""`DCLW` over a batch or a memory, in the chunks of `DCL`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import DCL, DCLW
from .custom import Result
from .exponents import DCLPairs
from .loss import result_of
from .loss_of_batch import Rows
from .loss_of_memory import BankSimilarities
from .pairs import Chunk, LogSum, Similarities


class DCLWPairs(DCLPairs):
    """The look also adds up e^(s / sigma) over positives, and s times it."""

    def __init__(self, loss: DCLW, z: Tensor, anchors: Tensor | None) -> None:
        super().__init__(DCL(loss.temperature), z, anchors)
        self.sigma = loss.sigma
        self.lse_of_positives = LogSum(self.zeros())
        self.products = self.zeros()  # of s / temperature and e^(s / sigma), relative to the largest so far

    def look(self, chunk: Chunk) -> None:
        super().look(chunk)
        before = self.lse_of_positives.value
        self.lse_of_positives.add(chunk.s / self.sigma, chunk.positive)
        after = self.lse_of_positives.value
        exponents = (chunk.s / self.sigma - self.narrow(after)).exp_()
        products = torch.where(chunk.positive, chunk.s / self.loss.temperature * exponents, 0).sum(1)
        kept = torch.where(before == -torch.inf, 0, (before - after).exp())
        self.products = self.products * kept + products

    def finish(self) -> None:
        super().finish()
        both = (self.positives > 0) & (self.negatives > 0)
        of_anchors = torch.where(both, self.lse_of_positives.value, -torch.inf)
        self.log_mean = torch.where(both.any(), of_anchors, 0).logsumexp(0) - self.number[0].clamp(min=1).log()
        relative = torch.where(both, (of_anchors - self.log_mean).exp() * self.products, 0)
        self.value[0] += (relative - torch.where(both, self.sums, 0)).sum()

    def weigh(self, chunk: Chunk) -> Tensor:
        more = 1 - (chunk.s / self.sigma - self.log_mean.to(self.dtype)).exp_()  # of a positive's weight
        weight = super().weigh(chunk)
        return weight.sub_(torch.where(chunk.positive, self.narrow(self.pull) * more, 0))


def over_bank(loss: DCLW, similarities: BankSimilarities, need_grad: bool) -> Result:
    """The loss against a memory."""
    return _loss_of(loss, similarities, need_grad)


def over_batch(loss: DCLW, batch: Rows, need_grad: bool) -> Result:
    """The loss of a batch against itself."""
    result = _loss_of(loss, batch.similarities(), need_grad)
    return result._replace(grad=batch.by_rows(result.grad))


def try_out(loss: DCLW, z: Tensor, labels: Tensor) -> None:
    """Raises ValueError for a number of the loss that was set to something else."""
    loss.check()


def _loss_of(loss: DCLW, similarities: Similarities, need_grad: bool) -> Result:
    value, grad, pairs = result_of(DCLWPairs(loss, similarities.grad, similarities.anchors), similarities, need_grad)
    return Result(value, grad if need_grad else None, [], pairs)
