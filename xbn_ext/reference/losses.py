"""The pair losses in plain PyTorch, on the whole matrix of similarities: what `csrc/math/losses.h` computes without it.

`s [B, n]` similarities of B anchors with n rows; `positive [B, n]` whether a row is of the anchor's class;
`pair [B, n]` whether the pair exists at all. A NaN similarity counts, so that it makes the loss NaN. No data-dependent
shapes and no host sync, so that it can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses import (
    DCL,
    DCLW,
    NCA,
    Circle,
    Contrastive,
    LiftedStructure,
    LossOfDistances,
    Margin,
    MultiSimilarity,
    NTXent,
    PairLoss,
    SigLIP,
    SupCon,
    Triplet,
    check_loss,
)

Result = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


def pair_loss(loss: PairLoss, s: Tensor, positive: Tensor, pair: Tensor, anchors: Tensor | None = None) -> Tensor:
    """`loss` of the similarities `s [B, n]` over the pairs `pair [B, n]` of the rows `anchors [B]` (None: all)."""
    return average(*evaluate(loss, s, positive, pair, anchors)[:2])


def pair_loss_and_pairs(
    loss: PairLoss, s: Tensor, positive: Tensor, pair: Tensor, anchors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`pair_loss`, and `pairs [2]` float64: how many positives and negatives of an anchor have a weight, on average."""
    cost, count, p, n = evaluate(loss, s, positive, pair, anchors)
    return average(cost, count), torch.stack([p.sum(dtype=torch.float64), n.sum(dtype=torch.float64)]) / at_least_one(
        number_of_anchors(s, anchors)
    )


def evaluate(loss: PairLoss, s: Tensor, positive: Tensor, pair: Tensor, anchors: Tensor | None) -> Result:
    """The cost of each group and what that is divided by; which positives and which negatives have a weight: as the
    losses below have it."""
    check_loss("pair_loss", loss)
    if anchors is not None:
        pair = pair & anchors[:, None]
    p, n = pair & positive, pair & ~positive
    if s.shape[1] == 0:
        return [s.sum()], [s.new_zeros(())], p, n
    return FORMULAS[loss.formula](loss, s, p, n, number_of_anchors(s, anchors))


def average(costs: list[Tensor], counts: list[Tensor]) -> Tensor:
    """The loss: the sum over its groups of what they cost on average."""
    return torch.stack([cost / at_least_one(count) for cost, count in zip(costs, counts, strict=True)]).sum()


def number_of_anchors(s: Tensor, anchors: Tensor | None) -> Tensor:
    return s.new_full((), s.shape[0]) if anchors is None else anchors.sum()


# --- The losses -------------------------------------------------------------------------------------------
#
# Each takes the positives `p [B, n]`, the negatives `n [B, n]` and the number of anchors. It returns what pairs cost
# and what that is divided by, if not by 0: a number of each or, where negatives and positives are averaged apart, two.
# And which positives and which negatives have a weight: as bools, or each its weight.


def contrastive(loss: Contrastive | Margin, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    near, (pos_limit, neg_limit) = nearness(loss, s), loss.limits
    pull = torch.where(p, pos_limit - near, 0.0).relu()
    push = torch.where(n, near - neg_limit, 0.0).relu()
    p, n = is_not_zero(pull), is_not_zero(push)
    if loss.groups == 2:
        return [push.sum(), pull.sum()], [n.sum(), p.sum()], p, n
    return [pull.sum() + push.sum()], [p.sum() + n.sum() if isinstance(loss, Margin) else anchors], p, n


def siglip(loss: SigLIP, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x = s / loss.temperature + loss.bias
    cost = torch.where(p, softplus(-x), 0.0) + torch.where(n, softplus(x), 0.0)
    weight = x.detach().sigmoid()
    return [cost.sum()], [anchors], torch.where(p, 1 - weight, 0.0), torch.where(n, weight, 0.0)


def supcon(loss: SupCon, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x = s / loss.temperature
    has_positives = p.any(1)
    pull = torch.where(p, x, 0.0).sum(1) / at_least_one(p.sum(1))
    cost = torch.where(has_positives, log_sum_exp(x, p | n), 0.0) - pull
    paying = has_positives & ((p | n).sum(1) > 1)  # an only pair costs nothing
    return [cost.sum()], [paying.sum()], p & paying[:, None], n & paying[:, None]


def ntxent(loss: NTXent, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x = s / loss.temperature
    cost = torch.where(p, softplus(log_sum_exp(x, n)[:, None] - x), 0.0)
    both = (p.any(1) & n.any(1))[:, None]
    return [cost.sum()], [p.sum()], p & both, n & both


def dcl(loss: DCL, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x = s / loss.temperature
    both = (p.any(1) & n.any(1))[:, None]
    p, n = p & both, n & both
    cost = torch.where(p, log_sum_exp(x, n)[:, None] - x, 0.0)
    return [cost.sum()], [p.sum()], p, n


def dclw(loss: DCLW, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x, e = s / loss.temperature, s.detach() / loss.sigma
    both = (p.any(1) & n.any(1))[:, None]
    p, n = p & both, n & both
    common = p & torch.where(p, e, 0.0).isfinite().all(1, keepdim=True)
    log_mean = e.masked_fill(~common, -torch.inf).flatten().logsumexp(0) - at_least_one(common.sum().to(s.dtype)).log()
    weight = torch.where(p, 2 - (e - log_mean).exp(), 0.0)
    cost = torch.where(p, log_sum_exp(x, n)[:, None] - weight * x, 0.0)
    return [cost.sum()], [p.sum()], p, n


def nca(loss: NCA, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    x, has_positives = loss.softmax_scale * s, p.any(1)
    cost = softplus(log_sum_exp(x, n) - torch.where(has_positives, log_sum_exp(x, p), 0.0))
    both = (has_positives & n.any(1))[:, None]
    return [torch.where(has_positives, cost, 0.0).sum()], [has_positives.sum()], p & both, n & both


def lifted_structure(loss: LiftedStructure, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    pull = torch.where(p.any(1), log_sum_exp(loss.pos_margin - s, p), 0.0)
    push = torch.where(n.any(1), log_sum_exp(s - loss.neg_margin, n), 0.0)
    cost = (push + pull).relu()
    pays = is_not_zero(cost)[:, None]
    return [cost.sum()], [anchors], p & pays, n & pays


def multi_similarity(loss: MultiSimilarity, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    if loss.mining is not None:
        p, n = mine(loss.mining, s.detach(), p, n)
    pull = softplus(log_sum_exp(-loss.alpha * (s - loss.base), p)) / loss.alpha
    push = softplus(log_sum_exp(loss.beta * (s - loss.base), n)) / loss.beta
    return [(pull + push).sum()], [anchors], p, n


def circle(loss: Circle, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    pace_positive = (1 + loss.m - s.detach()).relu()
    pace_negative = (s.detach() + loss.m).relu()
    pull = log_sum_exp(-loss.gamma * pace_positive * (s - (1 - loss.m)), p)
    push = log_sum_exp(loss.gamma * pace_negative * (s - loss.m), n)
    both = p.any(1) & n.any(1)
    cost = softplus(torch.where(both, pull + push, -torch.inf))
    return [cost.sum()], [both.sum()], p & both[:, None], n & both[:, None]


def triplet_hardest(loss: Triplet, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    violation, both = hardest_violation(loss, s, p, n)
    cost = torch.where(both, violation, 0.0).relu()
    pays = is_not_zero(cost)
    return [cost.sum()], [pays.sum()], pays, pays  # one pair of each kind


def triplet_soft(loss: Triplet, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    violation, both = hardest_violation(loss, s, p, n)
    cost = torch.where(both, softplus(torch.where(both, violation, 0.0)), 0.0)
    return [cost.sum()], [both.sum()], both, both


def triplet_all(loss: Triplet, s: Tensor, p: Tensor, n: Tensor, anchors: Tensor) -> Result:
    """Without the triplets themselves: a negative with k positives below `x = s_n + margin` is in k triplets that cost
    something, a positive in as many as there are x above it; together those cost the sum of k x less that of the
    positives so often. Both counts are constants of the derivative, which is what it is wherever they could change."""
    s = nearness(loss, s)
    x, k = s + loss.margin, s.detach()
    # What the counts look at: a NaN positive is below every x, a NaN x above every positive.
    thresholds = torch.where(k.isnan(), -torch.inf, k)
    raised = torch.where(k.isnan(), torch.inf, x.detach())
    below = torch.searchsorted(thresholds.masked_fill(~p, torch.inf).sort(1).values, raised)
    above = s.shape[1] - torch.searchsorted(raised.masked_fill(~n, -torch.inf).sort(1).values, thresholds, right=True)
    triplets = torch.where(n, below, 0).sum()
    p, n = p & (above > 0), n & (below > 0)
    cost = torch.where(n, below * x, 0.0) - torch.where(p, above * s, 0.0)
    return [cost.sum()], [triplets], p, n


FORMULAS: dict[str, Callable[[Any, Tensor, Tensor, Tensor, Tensor], Result]] = {
    "contrastive": contrastive,
    "contrastive_mean": contrastive,
    "margin": contrastive,
    "siglip": siglip,
    "supcon": supcon,
    "ntxent": ntxent,
    "multi_similarity": multi_similarity,
    "circle": circle,
    "triplet_hardest": triplet_hardest,
    "triplet_soft": triplet_soft,
    "triplet_all": triplet_all,
    "dcl": dcl,
    "dclw": dclw,
    "nca": nca,
    "lifted_structure": lifted_structure,
}
"""By `loss.formula`."""


# --- Helpers ----------------------------------------------------------------------------------------------


def at_least_one(number: Tensor) -> Tensor:
    return number.clamp(min=1)


def hardest(s: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` the similarity of each anchor's hardest positive and of its hardest negative."""
    return s.masked_fill(~p, torch.inf).min(1).values, s.masked_fill(~n, -torch.inf).max(1).values


def hardest_violation(loss: Triplet, s: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` by how much each anchor's hardest triplet falls short of the margin, and whether it has one."""
    hardest_positive, hardest_negative = hardest(s, p, n)
    both = p.any(1) & n.any(1)
    near_positive, near_negative = (
        nearness(loss, torch.where(both, s, 0.0)) for s in (hardest_positive, hardest_negative)
    )
    return near_negative - near_positive + loss.margin, both


def mine(epsilon: float, s: Tensor, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs `p, n [B, n]` those that are within epsilon of the anchor's hardest pair of the other kind."""
    hardest_positive, hardest_negative = hardest(s, p, n)
    return p & ~(s - epsilon >= hardest_negative[:, None]), n & ~(s + epsilon <= hardest_positive[:, None])


def nearness(loss: PairLoss, s: Tensor) -> Tensor:
    """What the loss compares, larger for more similar rows: `s`, or the negative of its distance between rows of unit
    length, `d² = 2 - 2s`. Where d is 0, its derivative is, too, as that of `torch.cdist`."""
    distance = loss.distance if isinstance(loss, LossOfDistances) else "cosine"
    if distance == "cosine":
        return s
    if distance == "squared_euclidean":
        return 2 * s - 2
    square = 2 - 2 * s
    is_zero = square <= 0
    return -torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).sqrt())


def nearness_slope(loss: PairLoss, s: Tensor) -> Tensor | float:
    """The derivative of `nearness`."""
    distance = loss.distance if isinstance(loss, LossOfDistances) else "cosine"
    if distance != "euclidean":
        return 1.0 if distance == "cosine" else 2.0
    d = -nearness(loss, s)
    return torch.where(d <= 0, 0.0, 1 / d)


def is_not_zero(costs: Tensor) -> Tensor:
    """A NaN is not."""
    return ~(costs <= 0)


def log_sum_exp(x: Tensor, keep: Tensor) -> Tensor:
    """`log sum_j e^x_ij` over the `keep [B, n]`; -inf, with no gradient, where the sum is empty."""
    some = keep.any(1)
    masked = torch.where(some[:, None], x.masked_fill(~keep, -torch.inf), 0.0)
    return torch.where(some, masked.logsumexp(1), -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)`, exact where torch's own cuts off at 20."""
    return torch.logaddexp(x, torch.zeros_like(x))
