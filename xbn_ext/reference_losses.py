"""The pair losses in plain PyTorch, on the whole matrix of similarities: what `csrc/math/losses.h` computes without it.

`s [B, n]` similarities of B anchors with n rows; `positive [B, n]` whether a row is of the anchor's class;
`pair [B, n]` whether the pair exists at all. A NaN similarity counts, so that it makes the loss NaN. No data-dependent
shapes and no host sync, so that it can be compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import Circle, Contrastive, MultiSimilarity, NTXent, PairLoss, SupCon, Triplet


def pair_loss(loss: PairLoss, s: Tensor, positive: Tensor, pair: Tensor, anchors: Tensor | None = None) -> Tensor:
    """`loss` of the similarities `s [B, n]` over the pairs `pair [B, n]` of the rows `anchors [B]` (None: all)."""
    if s.shape[1] == 0:
        return s.sum()
    if anchors is not None:
        pair = pair & anchors[:, None]
    p, n = pair & positive, pair & ~positive
    match loss:
        case Contrastive():
            return contrastive(loss, s, p, n, anchors)
        case SupCon():
            return supcon(loss, s, p, n)
        case NTXent():
            return ntxent(loss, s, p, n)
        case MultiSimilarity():
            return multi_similarity(loss, s, p, n, anchors)
        case Circle():
            return circle(loss, s, p, n)
        case Triplet(mining="all"):
            return triplet_all(loss, s, p, n)
        case Triplet():
            return triplet(loss, s, p, n)
    raise TypeError(f"unknown loss {type(loss).__name__}")


def weighted_pairs(loss: PairLoss, s: Tensor, positive: Tensor, pair: Tensor, anchors: Tensor | None = None) -> Tensor:
    """`[2]` float64: how many positives and negatives of an anchor have a weight, on average over the anchors."""
    if anchors is not None:
        pair = pair & anchors[:, None]
    p, n = pair & positive, pair & ~positive
    match loss:
        case Contrastive():
            p, n = p & ~(s >= loss.pos_margin), n & ~(s <= loss.neg_margin)
        case MultiSimilarity() if loss.mining is not None and s.shape[1] > 0:
            p, n = mine(loss.mining, s, p, n)
        case Circle():
            both = p.any(1, keepdim=True) & n.any(1, keepdim=True)
            p, n = p & both, n & both
        case Triplet(mining="all") if s.shape[1] > 0:
            hardest_positive, hardest_negative = hardest(s, p, n)
            both = p.any(1, keepdim=True) & n.any(1, keepdim=True)
            p = p & both & ~(hardest_negative[:, None] + loss.margin <= s)
            n = n & both & ~(s + loss.margin <= hardest_positive[:, None])
        case Triplet() if s.shape[1] > 0:
            hardest_positive, hardest_negative = hardest(s, p, n)
            both = p.any(1, keepdim=True) & n.any(1, keepdim=True)
            p = n = both & ~(hardest_negative - hardest_positive + loss.margin <= 0)[:, None]
    return torch.stack([p.sum(), n.sum()]).double() / number_of_anchors(s, anchors)


def contrastive(loss: Contrastive, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor | None) -> Tensor:
    positives = torch.where(p, loss.pos_margin - s, 0.0).relu()
    negatives = torch.where(n, s - loss.neg_margin, 0.0).relu()
    if loss.reduction == "mean":
        return (positives.sum() + negatives.sum()) / number_of_anchors(s, anchors)
    return average_nonzero(positives) + average_nonzero(negatives)


def supcon(loss: SupCon, s: Tensor, p: Tensor, n: Tensor) -> Tensor:
    x = s / loss.temperature
    has_positives = p.any(1)
    cost = torch.where(has_positives, log_sum_exp(x, p | n), 0.0) - torch.where(p, x, 0.0).sum(1) / p.sum(1).clamp(
        min=1
    )
    return cost.sum() / (has_positives & ((p | n).sum(1) > 1)).sum().clamp(min=1)  # an only pair costs nothing


def ntxent(loss: NTXent, s: Tensor, p: Tensor, n: Tensor) -> Tensor:
    x = s / loss.temperature
    cost = torch.where(p, softplus(log_sum_exp(x, n)[:, None] - x), 0.0)
    return cost.sum() / p.sum().clamp(min=1)


def multi_similarity(loss: MultiSimilarity, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor | None) -> Tensor:
    if loss.mining is not None:
        p, n = mine(loss.mining, s.detach(), p, n)
    pull = softplus(log_sum_exp(-loss.alpha * (s - loss.base), p)) / loss.alpha
    push = softplus(log_sum_exp(loss.beta * (s - loss.base), n)) / loss.beta
    return (pull + push).sum() / number_of_anchors(s, anchors)


def circle(loss: Circle, s: Tensor, p: Tensor, n: Tensor) -> Tensor:
    pace_positive = (1 + loss.m - s.detach()).relu()
    pace_negative = (s.detach() + loss.m).relu()
    pull = log_sum_exp(-loss.gamma * pace_positive * (s - (1 - loss.m)), p)
    push = log_sum_exp(loss.gamma * pace_negative * (s - loss.m), n)
    both = p.any(1) & n.any(1)
    return softplus(torch.where(both, pull + push, -torch.inf)).sum() / both.sum().clamp(min=1)


def triplet(loss: Triplet, s: Tensor, p: Tensor, n: Tensor) -> Tensor:
    hardest_positive, hardest_negative = hardest(s, p, n)
    both = p.any(1) & n.any(1)
    return average_nonzero(torch.where(both, hardest_negative - hardest_positive + loss.margin, 0.0).relu())


def triplet_all(loss: Triplet, s: Tensor, p: Tensor, n: Tensor) -> Tensor:
    """Without the triplets themselves: a negative with k positives below `x = s_n + margin` is in k triplets that cost
    something, a positive in as many as there are x above it; together those cost the sum of k x less that of the
    positives so often. Both counts are constants of the derivative, which is what it is wherever they could change."""
    x, k = s + loss.margin, s.detach()
    # What the counts look at: a NaN positive is below every x, a NaN x above every positive.
    thresholds = torch.where(k.isnan(), -torch.inf, k)
    raised = torch.where(k.isnan(), torch.inf, x.detach())
    below = torch.searchsorted(thresholds.masked_fill(~p, torch.inf).sort(1).values, raised)
    above = s.shape[1] - torch.searchsorted(raised.masked_fill(~n, -torch.inf).sort(1).values, thresholds, right=True)
    negatives, positives = n & (below > 0), p & (above > 0)
    cost = torch.where(negatives, below * x, 0.0) - torch.where(positives, above * s, 0.0)
    return cost.sum() / torch.where(n, below, 0).sum().clamp(min=1)


# --- Helpers ----------------------------------------------------------------------------------------------


def number_of_anchors(s: Tensor, anchors: Tensor | None) -> Tensor:
    return (s.new_full((), s.shape[0]) if anchors is None else anchors.sum()).clamp(min=1)


def hardest(s: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` the similarity of each anchor's hardest positive and of its hardest negative."""
    return s.masked_fill(~p, torch.inf).min(1).values, s.masked_fill(~n, -torch.inf).max(1).values


def mine(epsilon: float, s: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs `p, n [B, n]` those that are within epsilon of the anchor's hardest pair of the other kind."""
    hardest_positive, hardest_negative = hardest(s, p, n)
    return p & ~(s - epsilon >= hardest_negative[:, None]), n & ~(s + epsilon <= hardest_positive[:, None])


def average_nonzero(costs: Tensor) -> Tensor:
    """Mean of the costs that are not zero; 0 if all are."""
    return costs.sum() / (~(costs <= 0)).sum().clamp(min=1)


def log_sum_exp(x: Tensor, keep: Tensor) -> Tensor:
    """`log sum_j e^x_ij` over the `keep [B, n]`; -inf, with no gradient, where the sum is empty."""
    some = keep.any(1)
    masked = torch.where(some[:, None], x.masked_fill(~keep, -torch.inf), 0.0)
    return torch.where(some, masked.logsumexp(1), -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)`, exact where torch's own cuts off at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))
