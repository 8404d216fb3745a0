"""Every loss is that of pytorch-metric-learning, if there is one, and so are its distances and their margins."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import clear_anchors, each_kind_of_loss, every_loss, problem, run

from xbn_ext import (
    DCL,
    DCLW,
    NCA,
    Circle,
    Contrastive,
    CrossBatchMemory,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    SigLIP,
    SupCon,
    Triplet,
)
from xbn_ext import ops as cpu_ops


def peer(loss):
    """`f(z, labels, bank, bank_labels)` of pytorch-metric-learning."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, miners

    cosine = distances.CosineSimilarity()
    by_name = {"euclidean": distances.LpDistance(), "squared_euclidean": distances.LpDistance(power=2)}
    distance, miner = by_name.get(getattr(loss, "distance", None), cosine), None
    match loss:
        case Contrastive(reduction="mean"):
            pytest.skip("theirs averages over pairs")
        case Contrastive():
            theirs = losses.ContrastiveLoss(loss.pos_margin, loss.neg_margin, distance=distance)
        case SupCon():
            theirs = losses.SupConLoss(loss.temperature)
        case NTXent():
            theirs = losses.NTXentLoss(loss.temperature)
        case MultiSimilarity():
            theirs = losses.MultiSimilarityLoss(loss.alpha, loss.beta, loss.base)
            miner = None if loss.mining is None else miners.MultiSimilarityMiner(loss.mining)
        case Circle():
            theirs = losses.CircleLoss(loss.m, loss.gamma)
        case NCA():
            theirs = losses.NCALoss(loss.softmax_scale, distance=cosine)
        case LiftedStructure():
            theirs = losses.GeneralizedLiftedStructureLoss(loss.neg_margin, loss.pos_margin, distance=cosine)
        case DCL() | DCLW():
            pytest.skip("version 3 has it")
        case Margin():
            pytest.skip("theirs averages over triplets")
        case SigLIP():
            pytest.skip("not there")
        case Triplet():
            theirs = losses.TripletMarginLoss(loss.margin, smooth_loss=loss.soft, distance=distance)
            miner = miners.BatchHardMiner(distance=distance) if loss.mining == "hardest" else None

    def function(z, labels, bank, bank_labels):
        mined = None if miner is None else miner(z, labels, bank, bank_labels)
        return theirs(z, labels, mined, bank, bank_labels)

    return function, theirs, miner


@every_loss
@pytest.mark.parametrize("classes", [4, 20, 300])
def test_is_what_pytorch_metric_learning_computes(loss, classes, dtype):
    z, labels, bank, bank_labels = problem(48, 240, 64, dtype, classes=classes)
    clear = clear_anchors(loss, z, labels, bank, bank_labels)  # of the others rounding decides which pairs count
    z, labels = z[clear], labels[clear]
    # Their float64, for their float32 rounds, too.
    theirs, grad_of_theirs = run(peer(loss)[0], z.double(), labels, bank.double(), bank_labels)
    ours, grad_of_ours = run(cpu_ops.memory_loss, z, labels, bank, bank_labels, loss)
    assert ours > 0
    # Theirs differentiates the normalisation of z: project ours likewise.
    grad_of_ours = grad_of_ours - (grad_of_ours * z).sum(1, keepdim=True) * z
    assert abs(float(ours) - float(theirs)) <= 1e-5 * abs(float(theirs))
    assert (grad_of_ours - grad_of_theirs).abs().max() <= 1e-5 * grad_of_theirs.abs().max()


@each_kind_of_loss
def test_the_memory_is_that_of_pytorch_metric_learning(loss):
    """Their CrossBatchMemory in a loop, with the drift correction left out and the batch in the memory first."""
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    _, theirs, miner = peer(loss)
    if isinstance(loss, NCA):
        pytest.skip("their memory names the pairs, and by that NCALoss weighs the anchors")
    theirs = pml.CrossBatchMemory(theirs, 16, 100, miner)
    ours = CrossBatchMemory(loss, 16, 100, drift="none", batch_weight=0, enqueue="before", memory_dtype=torch.float64)
    theirs.embedding_memory = theirs.embedding_memory.double()
    centres = torch.randn(12, 16, dtype=torch.float64)
    for _ in range(8):
        labels = torch.randint(12, (30,))
        x = F.normalize(centres[labels] + torch.randn(30, 16), dim=1)
        torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-5, atol=0)


def of_pytorch_metric_learning(name):
    """By default: loss and miner; and ours, with what it takes besides."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, miners

    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    raw = {"normalize_embeddings": False, "renormalize": False}
    squared, hardest = distances.LpDistance(power=2), miners.BatchHardMiner()
    return {
        "contrastive": (losses.ContrastiveLoss(), None, Contrastive(reduction="avg_nonzero", distance="euclidean"), {}),
        "hardest": (losses.TripletMarginLoss(), hardest, Triplet(distance="euclidean"), {}),
        "soft": (losses.TripletMarginLoss(smooth_loss=True), hardest, Triplet(soft=True, distance="euclidean"), {}),
        "all": (
            losses.TripletMarginLoss(distance=squared),
            None,
            Triplet(mining="all", distance="squared_euclidean"),
            {},
        ),
        "squared": (
            losses.ContrastiveLoss(distance=squared),
            None,
            Contrastive(reduction="avg_nonzero", distance="squared_euclidean"),
            {},
        ),
        "dot product": (losses.ContrastiveLoss(9, 2, distance=dot), None, Contrastive(9, 2, "avg_nonzero"), raw),
        "dot product, all triplets": (losses.TripletMarginLoss(distance=dot), None, Triplet(0.05, mining="all"), raw),
    }[name]


@pytest.mark.parametrize(
    "name", ["contrastive", "hardest", "soft", "all", "squared", "dot product", "dot product, all triplets"]
)
def test_distances_and_their_margins_are_those_of_pytorch_metric_learning(name):
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    their_loss, miner, loss, options = of_pytorch_metric_learning(name)
    theirs = pml.CrossBatchMemory(their_loss, 16, 100, miner)
    theirs.embedding_memory = theirs.embedding_memory.double()
    ours = CrossBatchMemory(
        loss, 16, 100, drift="none", batch_weight=0, enqueue="before", memory_dtype=torch.float64, **options
    )
    centres = torch.randn(12, 16, dtype=torch.float64)
    for _ in range(8):
        labels = torch.randint(12, (30,))
        x = (centres[labels] + torch.randn(30, 16)).requires_grad_()
        values = ours(x, labels), theirs(x, labels)
        torch.testing.assert_close(*values, rtol=1e-7, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values), rtol=1e-6, atol=1e-9)
        assert values[0] > 0
