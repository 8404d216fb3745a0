"""Rows of no class are negatives of all others: as if each had a label that no other row has."""

import itertools

import pytest
import torch
from loss_cases import LOSSES

from xbn_ext import Contrastive, CrossBatchMemory, CustomLoss, SupCon

D, M, NO_CLASS = 7, 40, -1
UNUSED = itertools.count(1000)


class Own(CustomLoss):
    def positive(self, s):
        return (0.9 - s).relu()

    def negative(self, s):
        return (s - 0.2).relu()


def batches(steps):
    """Embeddings, labels, and labels in which each row of no class has one of its own."""
    for _ in range(steps):
        labels = torch.randint(-1, 4, (20,))
        known = torch.tensor([next(UNUSED) if label == NO_CLASS else label for label in labels.tolist()])
        yield torch.randn(20, D), labels, known


@pytest.mark.parametrize("options", [{}, {"enqueue": "before", "update": "deferred", "batch_weight": 0.0}], ids=str)
@pytest.mark.parametrize("loss", [*LOSSES.values(), Own()], ids=[*LOSSES, "own"])
def test_as_with_labels_of_their_own(loss, options):
    marked, distinct = (
        CrossBatchMemory(loss, D, M, no_class=NO_CLASS, **options),
        CrossBatchMemory(loss, D, M, **options),
    )
    both = (marked, distinct)
    first = list(batches(2))
    marked.fill_from([(x, labels) for x, labels, _ in first])
    distinct.fill_from([(x, known) for x, _, known in first])
    for step, (x, labels, known) in enumerate(batches(5)):
        leaves = [x.clone().requires_grad_() for _ in both]
        for m in both:
            m.train(step != 3)
        values = [m(leaf, y) for m, leaf, y in zip(both, leaves, (labels, known), strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(*values, rtol=0, atol=0)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=0)
        stored = distinct.label_memory
        assert torch.equal(marked.label_memory, torch.where(stored >= 1000, NO_CLASS, stored))
    again = CrossBatchMemory(loss, D, M, no_class=NO_CLASS, **options)
    again.load_state_dict(marked.state_dict())
    assert torch.equal(again(x, labels), marked(x, labels))


def test_under_a_compiler():
    eager, compiled = (CrossBatchMemory(SupCon(), D, M, no_class=NO_CLASS) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x, labels, _ in batches(3):
        torch.testing.assert_close(step(x, labels), eager(x, labels))


def test_what_is_wrong_is_named():
    for wrong in (1.5, "none", True, 2**63, torch.ones(2)):
        with pytest.raises(ValueError, match="no_class must be None or an integer that int64 holds, got"):
            CrossBatchMemory(Contrastive(), D, no_class=wrong)
    memory = CrossBatchMemory(Contrastive(), D)
    memory.no_class = 3
    with pytest.raises(ValueError, match="no_class must be"):
        memory.no_class = 0.5
    assert memory.no_class == 3


def test_the_last_label_that_a_class_may_have():
    memory, labels = CrossBatchMemory(Contrastive(), D, M, no_class=-1), torch.tensor([-(2**62), -1, 5])
    memory(torch.randn(3, D), labels)
    assert torch.equal(memory.label_memory, labels)
