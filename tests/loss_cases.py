"""The losses under test, problems for them, and how close a result must be."""

import pytest
import torch
import torch.nn.functional as F

from xbn_ext import (
    DCL,
    DCLW,
    NCA,
    Circle,
    Contrastive,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    SigLIP,
    SupCon,
    Triplet,
    reference,
)
from xbn_ext.losses import LossWithTemperature
from xbn_ext.reference.losses import nearness

LOSSES = {
    "contrastive": Contrastive(0.9, 0.2, "avg_nonzero"),
    "supcon": SupCon(),
    "ntxent": NTXent(),
    "multi_similarity": MultiSimilarity(),
    "mined": MultiSimilarity(beta=30.0, base=0.3, mining=0.1),
    "circle": Circle(),
    "triplet": Triplet(margin=0.3),
    "triplet_soft": Triplet(margin=0.3, soft=True),
    "triplet_all": Triplet(margin=0.3, mining="all"),
    "dcl": DCL(),
    "dclw": DCLW(0.2, 0.3),
    "nca": NCA(softmax_scale=8.0),
    "margin": Margin(margin=0.3, beta=0.55),
    "siglip": SigLIP(bias=-5.0),
    "lifted_structure": LiftedStructure(pos_margin=0.5, neg_margin=4.0),
    "contrastive_euclidean": Contrastive(0.9, 1.3, "avg_nonzero", distance="euclidean"),
    "contrastive_mean_euclidean": Contrastive(neg_margin=1.3, distance="euclidean"),
    "contrastive_squared": Contrastive(0.2, 1.5, "avg_nonzero", distance="squared_euclidean"),
    "triplet_euclidean": Triplet(margin=0.2, distance="euclidean"),
    "triplet_soft_euclidean": Triplet(margin=0.2, soft=True, distance="euclidean"),
    "triplet_soft_squared": Triplet(margin=0.3, soft=True, distance="squared_euclidean"),
    "triplet_all_squared": Triplet(margin=0.3, mining="all", distance="squared_euclidean"),
}
KIN = {
    "triplet_soft", "nca", "margin", "contrastive_mean_euclidean", "contrastive_squared", "triplet_euclidean",
    "triplet_soft_squared", "triplet_all_squared",
}  # fmt: skip
"""Losses that a way computes like one of the others. `make test` has them where what they compute is tested."""


def each_of(losses, long=KIN):
    return pytest.mark.parametrize(
        "loss",
        [pytest.param(loss, id=name, marks=[pytest.mark.long] * (name in long)) for name, loss in losses.items()],
    )


every_loss = each_of(LOSSES, long=())
FEW = {"contrastive", "mined", "triplet_all"}
few_losses = each_of(LOSSES, long=LOSSES.keys() - FEW)
each_kind_of_loss = each_of(LOSSES)

NEAR = 1e-5

NOT_UNDER_TEST = {"contrastive_mean", "contrastive_mean_squared_euclidean", "triplet_hardest_squared_euclidean"}
"""Kinds that differ from the others in how they are called; some tests have them besides."""


def is_of_distance(loss):
    """Whether rows have to be of unit length."""
    return getattr(loss, "distance", "cosine") != "cosine"


def problem(B, M, D, dtype=torch.float64, device="cpu", classes=20, first_label=0):
    """Anchors and bank rows around shared centres, so that positives and negatives overlap."""
    centres = torch.randn(classes, D, dtype=torch.float64)
    labels, bank_labels = torch.randint(classes, (B,)), torch.randint(classes, (M,))
    z = F.normalize(centres[labels] + torch.randn(B, D), dim=1)
    bank = (centres[bank_labels] + torch.randn(M, D)) * (0.1 + torch.rand(M, 1))
    tensors = (z.to(dtype), labels + first_label, bank.to(dtype), bank_labels + first_label)
    return [t.to(device) for t in tensors]


def run(function, z, *args, upstream=1.0, **options):
    """Value and gradient of `upstream` times it."""
    z = z.detach().clone().requires_grad_()
    value = function(z, *args, **options)
    (grad,) = torch.autograd.grad(value * upstream, z)
    return value.detach(), grad


def run_with_pairs(module, z, *args, **options):
    """Value, gradient, pairs."""
    z = z.detach().clone().requires_grad_()
    value, pairs = module.memory_loss_and_pairs(z, *args, **options)
    (grad,) = torch.autograd.grad(value, z)
    return value.detach(), grad, pairs


def stiffness(loss):
    """By how much an error of a similarity is magnified on its way to the loss or to a weight."""
    match loss:
        case DCLW():
            return (1 + 1 / loss.sigma) / loss.temperature
        case LossWithTemperature():
            return 1 / loss.temperature
        case MultiSimilarity():
            return loss.beta
        case NCA():
            return loss.softmax_scale
        case Circle():
            return loss.gamma * (2 + abs(loss.m))
        case Contrastive(distance="euclidean") | Triplet(distance="euclidean"):
            return 8.0  # 1 / d², where d > 0.35
        case Triplet(mining="all"):
            return 4.0  # a triplet has two weights, and an anchor with many more than its share of them
    return 1.0


def crowding(loss, s):
    """By how much more than `stiffness` says errors are magnified, where rows are close: the weight 1 / d of a pair has
    a relative error of 1 / d² times that of its similarity."""
    if getattr(loss, "distance", None) != "euclidean" or not s.numel():
        return 1.0
    return max(1.0, 1 / (stiffness(loss) * float((2 - 2 * s).min().clamp(min=200 * NEAR))))


def clear_anchors(loss, z, labels, bank, bank_labels, *, renormalize=True, exclude=None, bank_ids=None, **_):
    """`[B]` bool: anchors whose loss does not hang on rounding. Where a pair counts or not, or which is the hardest,
    is decided by a comparison; where that is closer than NEAR, float32 may decide otherwise than float64."""
    near = NEAR
    s = reference.similarity(z.double(), bank.double(), renormalize)
    pair = torch.ones_like(s, dtype=torch.bool)
    if exclude is not None:
        row_ids = torch.arange(s.shape[1], device=s.device) if bank_ids is None else bank_ids
        pair = (exclude[:, None] == -1) | (exclude[:, None] != row_ids)
    p, n = pair & (labels[:, None] == bank_labels), pair & (labels[:, None] != bank_labels)
    if s.shape[1] == 0:
        return torch.ones_like(labels, dtype=torch.bool)
    at_one = torch.zeros_like(labels, dtype=torch.bool)
    if getattr(loss, "distance", None) == "euclidean":  # 1 / d
        at_one = (pair & (s > 1 - 100 * near)).any(1)
    s = nearness(loss, s)
    match loss:
        case Contrastive() | Margin():
            pos_limit, neg_limit = loss.limits
            close = (p & ((s - pos_limit).abs() < near)) | (n & ((s - neg_limit).abs() < near))
            return ~(close.any(1) | at_one)
        case MultiSimilarity() if loss.mining is not None:
            hardest_positive = s.masked_fill(~p, torch.inf).amin(1, keepdim=True)
            hardest_negative = s.masked_fill(~n, -torch.inf).amax(1, keepdim=True)
            close = (n & ((s + loss.mining - hardest_positive).abs() < near)) | (
                p & ((s - loss.mining - hardest_negative).abs() < near)
            )
            return ~close.any(1)
        case Triplet(mining="all"):
            thresholds = s.masked_fill(~p, torch.inf).sort(1).values
            x = s + loss.margin
            above = torch.searchsorted(thresholds, x)
            near_one = torch.zeros_like(x, dtype=torch.bool)
            for place in (above - 1, above):
                near_one |= (x - thresholds.gather(1, place.clamp(0, x.shape[1] - 1))).abs() < near
            return ~(n & near_one).any(1)
        case Triplet():
            hardest = [(-s).masked_fill(~p, -torch.inf), s.masked_fill(~n, -torch.inf)]
            tied = torch.zeros_like(labels, dtype=torch.bool)
            for x in hardest:
                if x.shape[1] > 1:
                    first, second = x.topk(2, dim=1).values.unbind(1)
                    tied |= (first - second < near) & second.isfinite()
            cost = hardest[0].amax(1) + hardest[1].amax(1) + loss.margin
            return ~(tied | (cost.abs() < near) | at_one)
    return torch.ones_like(labels, dtype=torch.bool)


def assert_close(result, truth, same_dtype, loss, similarities):
    """Value and gradient within four times PyTorch's own error in that dtype, or within the rounding of similarities up
    to `similarities`: relative to the result, or to what an anchor contributes where that cancels."""
    share = 1 / max(len(truth[1]), 1) if truth[0] else 1.0  # where no anchor pays, there is no number to divide by
    for ours, true, torchs, least in zip(result, truth, same_dtype, (1.0, share), strict=True):
        assert ours.dtype == torchs.dtype and ours.shape == true.shape
        if not true.numel():
            continue
        budget = 4 * float((torchs.double() - true).abs().max())
        rounding = torch.finfo(ours.dtype).eps * stiffness(loss) * max(similarities, 1.0)
        budget += 32 * rounding * max(float(true.abs().max()), least)
        off = float((ours.double() - true).abs().max())
        assert off <= budget, f"{'gradient' if true.dim() else 'value'} off by {off:.2e}, budget {budget:.2e}"


def assert_right(ops, z, labels, bank, bank_labels, loss, **options):
    """ops.memory_loss against the float64 reference, over the anchors whose loss does not hang on rounding."""
    rows = bank.double() if options.get("scale") is None else bank.double() * options["scale"] + options["shift"]
    clear = clear_anchors(loss, z, labels, rows, bank_labels, **options)
    anchors = options.pop("anchors", None)
    options["anchors"] = clear if anchors is None else anchors & clear
    args = (labels, bank, bank_labels, loss)
    *result, pairs = run_with_pairs(ops, z, *args, **options)
    *truth, true_pairs = run_with_pairs(reference, z.double(), labels, bank.double(), bank_labels, loss, **options)
    rounding = 32 * torch.finfo(z.dtype).eps * stiffness(loss) if isinstance(loss, SigLIP) else 1e-7  # else whole
    torch.testing.assert_close(pairs, true_pairs, rtol=rounding, atol=rounding)
    s = reference.similarity(z.double(), rows, options.get("renormalize", True))
    largest = float(s.abs().max()) if s.numel() else 0.0
    largest = max(largest, 1.0) * crowding(loss, s[options["anchors"]])
    assert_close(result, truth, run(reference.memory_loss, z, *args, **options), loss, largest)
