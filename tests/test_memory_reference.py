"""A step of CrossBatchMemory is that of reference.step, and with the right options that of pytorch-metric-learning."""

import itertools

import pytest
import state
import torch
import torch.nn.functional as F
from memory_cases import OF_EACH_WAY, B, D, M, batches, memory_of

from xbn_ext import Contrastive, CrossBatchMemory, reference

OPTIONS = [
    {"drift": drift, "update": update, "enqueue": enqueue}
    for drift, update, enqueue in itertools.product(
        ("none", "xbn", "axbn", "ema"), ("inplace", "deferred"), ("after", "before")
    )
]
OPTIONS += [
    {"normalize_embeddings": False},
    {"renormalize": False},
    {"batch_weight": 0.0, "memory_weight": 0.3},
    {"batch_weight": 0.7, "memory_weight": 0.0},
    {"warmup_steps": 3},
    {"center_gradient": True, "memory_weight": 0.3},
    {"center_gradient": True, "normalize_embeddings": False, "batch_weight": 0.0},
    {"process_noise": 0.5, "measurement_noise": 2.0},
    {"measurement_noise": 2.0, "update": "deferred"},
    {"eps": 0.05, "normalize_embeddings": False},
    {"eps": 0.2, "update": "deferred"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
@pytest.mark.parametrize("reduction", ["mean", "avg_nonzero"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
def test_step_is_the_reference_step(options, reduction, masked, with_ids, device):
    loss = Contrastive(pos_margin=0.95, neg_margin=0.3, reduction=reduction)
    criterion = CrossBatchMemory(loss, D, M, memory_dtype=torch.float64, **options).to(device)
    memory = state.to(reference.Memory.empty(M, D), device)
    for x, labels in batches(8, torch.float64, device=device):
        mask = labels % 2 == 0 if masked else None
        ids = torch.randint(-2, 30, (B,), device=device) if with_ids else None
        ours, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
        value = criterion(ours, labels, enqueue_mask=mask, ids=ids)
        true_value = reference.step(memory, truth, labels, loss, enqueue_mask=mask, ids=ids, **options)
        value.backward(), true_value.backward()
        torch.testing.assert_close(value, true_value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-8, atol=1e-11)
        state.assert_same_state(memory_of(criterion), memory, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", OF_EACH_WAY.values(), ids=OF_EACH_WAY)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_centred_gradient_is_the_other_without_what_turns_all_anchors(make, masked, training, device):
    def step(**options):
        torch.manual_seed(0)
        criterion = CrossBatchMemory(make(), D, M, memory_dtype=torch.float64, batch_weight=0.0, **options).to(device)
        *stored, (x, labels) = batches(4, torch.float64, device=device)
        for rows, their_labels in stored:
            criterion(rows, their_labels)
        z = F.normalize(x).requires_grad_()
        criterion.normalize_embeddings = False
        criterion.train(training)
        mask = labels % 2 == 0 if masked else torch.zeros_like(labels, dtype=torch.bool)
        value = criterion(z, labels, enqueue_mask=mask if masked else None)
        value.backward()
        return value.detach(), z.grad, [p.grad for p in criterion.parameters()], ~mask, z.detach()

    (value, grad, learned, anchors, z), (plain_value, plain, plain_learned, *_) = step(center_gradient=True), step()
    assert torch.equal(value, plain_value), "the loss stays"
    torch.testing.assert_close(learned, plain_learned, rtol=1e-12, atol=1e-14)
    mean = (plain - (plain * z).sum(1, keepdim=True) * z)[anchors].mean(0)
    expected = torch.where(anchors[:, None], plain - mean, plain)
    assert mean.norm() > 1e-6
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-13)


def test_beside_an_estimated_noise_the_other_does_nothing(device):
    found = []
    for noise in (1.0, 1e-320, 1e308):
        criterion = CrossBatchMemory(Contrastive(), D, M, measurement_noise=noise).to(device)
        for x, labels in batches(6, device=device):
            criterion(x, labels)
        found.append(criterion.state_dict())
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_numbers_of_pytorch_metric_learning(device):
    """`batch_weight=0, enqueue="before", drift="none"` is its CrossBatchMemory."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import CosineSimilarity

    theirs = losses.CrossBatchMemory(
        losses.ContrastiveLoss(pos_margin=0.95, neg_margin=0.3, distance=CosineSimilarity()), D, M
    )
    loss = Contrastive(pos_margin=0.95, neg_margin=0.3, reduction="avg_nonzero")
    ours = CrossBatchMemory(loss, D, M, drift="none", batch_weight=0.0, enqueue="before").to(device)
    for t, (x, labels) in enumerate(batches(12, device=device)):
        mask = labels % 2 == 0 if t >= 8 else None
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, their_value = ours(a, labels, enqueue_mask=mask), theirs(b, labels, enqueue_mask=mask)
        value.backward(), their_value.backward()
        torch.testing.assert_close(value, their_value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_positions_of_pytorch_metric_learning():
    x, labels = next(batches(1))
    mask = labels % 2 == 0
    calls = [((), {"enqueue_mask": mask}), ((None, mask), {}), ((None,), {"enqueue_mask": mask}),
             ((), {"indices_tuple": None, "enqueue_mask": mask})]  # fmt: skip
    values = [CrossBatchMemory(Contrastive(), D, M)(x, labels, *args, **named) for args, named in calls]
    assert all(torch.equal(value, values[0]) for value in values)
    plain = [CrossBatchMemory(Contrastive(), D, M)(x, labels, *args) for args in ((), (None,), (None, None))]
    assert all(torch.equal(value, plain[0]) for value in plain) and plain[0] != values[0]
