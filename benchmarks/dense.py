"""The losses in plain PyTorch as one would tune them, on the whole matrix of similarities: the baseline `eager-tuned`.

One function per loss: `s [B, M]` similarities, overwritten where that saves a copy, and `positive [B, M]` to a scalar.
Positives are few, so that what is about them alone uses their indices (on a GPU, that waits for it). An anchor
needs a negative; xbn_ext.reference.losses is the same for all cases.
"""

from __future__ import annotations

import torch
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


def dense_loss(loss: PairLoss, s: Tensor, positive: Tensor) -> Tensor:
    """`loss` of the similarities `s [B, M]`, all of them pairs, differentiable in s."""
    match loss:
        case Contrastive() | Margin():
            return contrastive(loss, s, positive)
        case SigLIP():
            return siglip(loss, s, positive)
        case DCL():
            return dcl(loss, s, positive)
        case DCLW():
            return dclw(loss, s, positive)
        case NCA():
            return nca(loss, s, positive)
        case LiftedStructure():
            return lifted_structure(loss, s, positive)
        case SupCon():
            return supcon(loss, s, positive)
        case NTXent():
            return ntxent(loss, s, positive)
        case MultiSimilarity(mining=None):
            return multi_similarity(loss, s, positive)
        case MultiSimilarity():
            return mined(loss, s, positive)
        case Circle():
            return circle(loss, s, positive)
        case Triplet(mining="all"):
            return triplet_all(loss, s, positive)
        case Triplet():
            return triplet(loss, s, positive)
    raise TypeError(f"unknown loss {type(loss).__name__}")


def contrastive(loss: Contrastive | Margin, s: Tensor, positive: Tensor) -> Tensor:
    s = s.sub_(loss.neg_margin)
    cost = torch.where(positive, (loss.pos_margin - loss.neg_margin) - s, s).relu_()
    if isinstance(loss, Margin):
        return cost.sum() / cost.count_nonzero().clamp(min=1)
    if loss.reduction == "mean":
        return cost.sum() / len(s)
    of_positives = torch.where(positive, cost, 0)
    positives, pairs = of_positives.count_nonzero(), cost.count_nonzero()
    pull, total = of_positives.sum(), cost.sum()
    return pull / positives.clamp(min=1) + (total - pull) / (pairs - positives).clamp(min=1)


def siglip(loss: SigLIP, s: Tensor, positive: Tensor) -> Tensor:
    x = s.div_(loss.temperature).add_(loss.bias)
    anchor, row = positive.nonzero(as_tuple=True)
    return (softplus(x).sum() - x[anchor, row].sum()) / len(s)  # log(1 + e^-x) is log(1 + e^x) - x


def dcl(loss: DCL, s: Tensor, positive: Tensor) -> Tensor:
    x = s.div_(loss.temperature)
    anchor, row = positive.nonzero(as_tuple=True)
    negatives = x.masked_fill(positive, -torch.inf).logsumexp(1)
    return (negatives[anchor] - x[anchor, row]).sum() / max(len(anchor), 1)


def dclw(loss: DCLW, s: Tensor, positive: Tensor) -> Tensor:
    anchor, row = positive.nonzero(as_tuple=True)
    share = (s.detach()[anchor, row] / loss.sigma).softmax(0)  # of the sum of e^(s / sigma)
    x = s.div_(loss.temperature)
    negatives = x.masked_fill(positive, -torch.inf).logsumexp(1)
    return (negatives[anchor] - (2 - len(anchor) * share) * x[anchor, row]).sum() / max(len(anchor), 1)


def nca(loss: NCA, s: Tensor, positive: Tensor) -> Tensor:
    x = s.mul_(loss.softmax_scale)
    anchor, row = positive.nonzero(as_tuple=True)
    pull = log_sum_exp_of(x[anchor, row], anchor, len(s))
    some = pull > -torch.inf
    cost = x.logsumexp(1) - torch.where(some, pull, 0)
    return torch.where(some, cost, 0).sum() / some.count_nonzero().clamp(min=1)


def lifted_structure(loss: LiftedStructure, s: Tensor, positive: Tensor) -> Tensor:
    anchor, row = positive.nonzero(as_tuple=True)
    pull = log_sum_exp_of(loss.pos_margin - s[anchor, row], anchor, len(s))
    push = (s - loss.neg_margin).masked_fill_(positive, -torch.inf).logsumexp(1)
    return (push + torch.where(pull > -torch.inf, pull, 0)).relu().sum() / len(s)


def supcon(loss: SupCon, s: Tensor, positive: Tensor) -> Tensor:
    x = s.div_(loss.temperature)
    positives = positive.count_nonzero(1)
    cost = x.logsumexp(1) - torch.where(positive, x, 0).sum(1) / positives.clamp(min=1)
    return torch.where(positives > 0, cost, 0).sum() / positives.count_nonzero().clamp(min=1)


def ntxent(loss: NTXent, s: Tensor, positive: Tensor) -> Tensor:
    x = s.div_(loss.temperature)
    anchor, row = positive.nonzero(as_tuple=True)
    negatives = x.masked_fill(positive, -torch.inf).logsumexp(1)
    return softplus(negatives[anchor] - x[anchor, row]).sum() / max(len(anchor), 1)


def multi_similarity(loss: MultiSimilarity, s: Tensor, positive: Tensor) -> Tensor:
    anchor, row = positive.nonzero(as_tuple=True)
    pull = log_sum_exp_of(-loss.alpha * (s[anchor, row] - loss.base), anchor, len(s))
    push = ((s - loss.base) * loss.beta).masked_fill_(positive, -torch.inf).logsumexp(1)
    return (softplus(pull) / loss.alpha + softplus(push) / loss.beta).sum() / len(s)


def mined(loss: MultiSimilarity, s: Tensor, positive: Tensor) -> Tensor:
    assert loss.mining is not None
    hardest_positive, hardest_negative = (t.detach() for t in hardest(s, positive))
    keep = (s.detach() + loss.mining > hardest_positive[:, None]).logical_and_(~positive)
    scaled = torch.where(keep, (s - hardest_negative[:, None]) * loss.beta, -torch.inf).exp().sum(1)
    some = scaled > 0  # then the hardest negative is one of them, and the sum is at least 1
    push = loss.beta * (hardest_negative - loss.base) + torch.where(some, scaled, 1).log()
    anchor, row = positive.nonzero(as_tuple=True)
    kept = s.detach()[anchor, row] - loss.mining < hardest_negative[anchor]
    anchor, row = anchor[kept], row[kept]
    pull = log_sum_exp_of(-loss.alpha * (s[anchor, row] - loss.base), anchor, len(s))
    return (softplus(pull) / loss.alpha + torch.where(some, softplus(push), 0) / loss.beta).sum() / len(s)


def circle(loss: Circle, s: Tensor, positive: Tensor) -> Tensor:
    anchor, row = positive.nonzero(as_tuple=True)
    of_positives = s[anchor, row]
    pace = (1 + loss.m - of_positives.detach()).relu_()
    pull = log_sum_exp_of(-loss.gamma * pace * (of_positives - (1 - loss.m)), anchor, len(s))
    pace = (s.detach() + loss.m).relu_().mul_(loss.gamma)
    push = ((s - loss.m) * pace).masked_fill_(positive, -torch.inf).logsumexp(1)
    return softplus(pull + push).sum() / positive.any(1).count_nonzero().clamp(min=1)


def triplet(loss: Triplet, s: Tensor, positive: Tensor) -> Tensor:
    hardest_positive, hardest_negative = hardest(s, positive)
    violation = hardest_negative - hardest_positive + loss.margin  # without positives: minus infinity
    if loss.soft:
        return softplus(violation).sum() / positive.any(1).count_nonzero().clamp(min=1)
    cost = violation.relu()
    return cost.sum() / cost.count_nonzero().clamp(min=1)


def triplet_all(loss: Triplet, s: Tensor, positive: Tensor) -> Tensor:
    """A negative with k positives below `x = s_n + margin` is in k triplets that cost k x less the sum of those."""
    most = int(positive.count_nonzero(1).max())
    thresholds = s.masked_fill(~positive, torch.inf).topk(max(most, 1), largest=False).values  # ascending
    x = s + loss.margin
    active = torch.searchsorted(thresholds.detach(), x.detach()).masked_fill_(positive, 0)
    sums = torch.where(thresholds == torch.inf, 0, thresholds).cumsum(1)
    below = sums.gather(1, (active - 1).clamp_(min=0))
    return torch.where(active > 0, active * x - below, 0).sum() / active.sum().clamp(min=1)


def hardest(s: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` the similarity of each anchor's hardest positive and of its hardest negative."""
    return s.masked_fill(~positive, torch.inf).amin(1), s.masked_fill(positive, -torch.inf).amax(1)


def log_sum_exp_of(x: Tensor, anchor: Tensor, B: int) -> Tensor:
    """`[B]` log of the sum of e^x over the entries `x [n]` of each anchor in `anchor [n]`; -inf where it has none."""
    top = x.new_full((B,), -torch.inf).scatter_reduce(0, anchor, x.detach(), "amax")
    sums = x.new_zeros(B).index_add(0, anchor, (x - top[anchor]).exp())
    some = top > -torch.inf
    return torch.where(some, top + torch.where(some, sums, 1).log(), -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)` of few numbers, exact where torch's own cuts off at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))
