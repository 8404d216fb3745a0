"""Losses of distances: their margins, rows of unit length alone, and what they are where a distance is 0."""

import copy
import pickle

import pytest
import torch
from loss_cases import assert_right, problem, run

from xbn_ext import Contrastive, CrossBatchMemory, Triplet, reference
from xbn_ext import ops as cpu_ops
from xbn_ext.losses.learned import at


def test_margins_that_are_not_given_are_those_of_the_distance():
    assert Contrastive() == Contrastive(1.0, 0.5) != Contrastive(distance="euclidean")
    assert Contrastive(distance="euclidean") == Contrastive(0.0, 1.0, distance="euclidean")
    assert Triplet(0.1) == Triplet() and Triplet(distance="squared_euclidean").margin == 0.05
    assert Contrastive(neg_margin=0.3, distance="squared_euclidean").pos_margin == 0
    shown = "Contrastive(pos_margin=0.0, neg_margin=1.0, reduction='mean', distance='euclidean')"
    assert repr(Contrastive(distance="euclidean")) == shown
    for loss in (Contrastive(distance="euclidean"), Triplet(soft=True, distance="squared_euclidean")):
        assert pickle.loads(pickle.dumps(loss)) == copy.deepcopy(loss) == loss


def test_distances_that_there_are_not():
    for loss in (Contrastive, Triplet):
        with pytest.raises(ValueError, match="distance must be 'cosine', 'euclidean' or 'squared_euclidean'"):
            loss(distance="dot")
    with pytest.raises(ValueError, match=r"distance .* of all triplets it is .* or take InChunks"):
        Triplet(mining="all", distance="euclidean")


@pytest.mark.parametrize("option", ["normalize_embeddings", "renormalize"])
def test_distances_are_of_rows_of_unit_length(option):
    message = f'{option} must be True with distance="euclidean"'
    loss, (x, labels) = Triplet(distance="euclidean"), (torch.randn(4, 8), torch.arange(4))
    with pytest.raises(ValueError, match=message):
        CrossBatchMemory(loss, 8, 20, **{option: False})
    memory = CrossBatchMemory(loss, 8, 20)
    with pytest.raises(ValueError, match=message):
        setattr(memory, option, False)
    assert getattr(memory, option) is True
    with pytest.raises(ValueError, match=message):
        cpu_ops.step_(memory, x, labels, loss, **{option: False})
    if option == "renormalize":
        with pytest.raises(ValueError, match=message):
            cpu_ops.batch_loss(x, labels, loss, renormalize=False)
        with pytest.raises(ValueError, match=message):
            cpu_ops.memory_sums(x, labels, x, labels, loss, renormalize=False)


@pytest.mark.parametrize("loss", [Contrastive(0.0, 1.5), Triplet(0.5), Triplet(0.5, soft=True)], ids=lambda x: x.kind)
def test_rows_at_no_distance_have_no_weight(loss, ops, device, dtype):
    """As with torch.cdist, whose derivative is 0 there."""
    loss = at(loss, distance="euclidean")
    z = torch.eye(2, 4, dtype=dtype, device=device)
    bank = torch.cat([z[:1], -z[:1], z[1:]])
    labels, bank_labels = torch.tensor([0, 7], device=device), torch.tensor([0, 0, 1], device=device)
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss)
    truth, true_grad = run(reference.memory_loss, z.double(), labels, bank.double(), bank_labels, loss)
    torch.testing.assert_close([value.double(), grad.double()], [truth, true_grad], rtol=1e-6, atol=1e-7)
    assert value > 0 and grad.isfinite().all()
    # A negative at no distance.
    value, grad = run(ops.memory_loss, z[:1], labels[1:], bank[:1], bank_labels[:1], Contrastive(distance="euclidean"))
    assert value == 1 and not grad.any()


@pytest.mark.parametrize(
    "loss",
    [
        Contrastive(0.2, 1.5, distance="squared_euclidean"),
        Triplet(0.3, distance="squared_euclidean"),
        Contrastive(neg_margin=-1.0, distance="euclidean"),
        Contrastive(neg_margin=3.0, distance="euclidean"),
    ],
    ids=["mean", "hardest", "no negative pays", "all negatives pay"],
)
def test_other_distances(loss, width, ops, device, dtype):
    assert_right(ops, *problem(70, 500, width, dtype, device), loss)
