"""What a batch may be: embeddings of any dtype, length and number, labels of any integer dtype, and ids."""

import pytest
import torch
import torch.nn.functional as F
from memory_cases import B, D, M, X, Y, batches, train
from torch import nn

from xbn_ext import Contrastive, CrossBatchMemory, SelectPairs, SigLIP, SupCon, reference


def learned():
    return SupCon(torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))


@pytest.mark.parametrize("batch_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batches_of_another_dtype_do_not_change_the_bank(batch_dtype, device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    for x, labels in batches(3, batch_dtype, device=device):
        x.requires_grad_()
        loss = criterion(x, labels)
        loss.backward()
        assert x.grad.dtype == batch_dtype and loss.isfinite()
    assert criterion.bank.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-4, 1e30])
def test_embeddings_of_any_length(size, device):
    plain, other = (CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device) for _ in range(2))
    for x, labels in batches(3, device=device):
        a, b = x.clone().requires_grad_(), (size * x).requires_grad_()
        plain(a, labels).backward()
        other(b, labels).backward()
        torch.testing.assert_close(size * b.grad, a.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.bank, plain.bank, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: Contrastive(1.0, -0.5), lambda: SupCon(0.3), learned], ids=["contrastive", "supcon", "learned"]
)
@pytest.mark.parametrize("length", [0, 1e-8, 1e-7])
def test_a_row_shorter_than_eps_is_divided_by_it_once(length, make, device):
    """Twice, its gradient would be a million times as large."""
    loss = make()
    x, labels = X.double().clone().to(device), (Y % 5).to(device)
    x[1] = length * F.normalize(x[1], dim=0)
    x.requires_grad_()
    for training in (True, False):
        criterion = CrossBatchMemory(loss, D, M, memory_weight=0.0, memory_dtype=torch.float64).to(device)
        (grad,) = torch.autograd.grad(criterion.train(training)(x, labels), x)
        z = F.normalize(x, dim=1, eps=criterion.eps)
        value = reference.batch_loss(z, labels, loss, renormalize=False)
        torch.testing.assert_close(criterion(x, labels), value)
        torch.testing.assert_close(grad, *torch.autograd.grad(value, x))


def test_batches_of_any_size(device):
    criterion = CrossBatchMemory(Contrastive(), D, 10).to(device)
    for size in (1, 10, 11, 37, 0, 3):
        ((x, labels),) = batches(1, size=size, device=device)
        x.requires_grad_()
        criterion(x, labels).backward()
        assert x.grad.isfinite().all()
    assert criterion.count == 10


@pytest.mark.parametrize("integer", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(integer, device):
    a, b = (CrossBatchMemory(Contrastive(), D, M).to(device) for _ in range(2))
    for x, labels in batches(3, device=device):
        assert torch.equal(a(x, labels), b(x, labels.to(integer)))


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_unsigned_dtypes(kind):
    """int64 holds all but the last."""
    criterion = CrossBatchMemory(Contrastive(), D, M)
    if kind == torch.uint64:
        for call in (lambda: criterion(X, Y.to(kind)), lambda: criterion.fill_from([(X, Y.to(kind))])):
            with pytest.raises(TypeError, match="labels must be of a dtype that int64 holds"):
                call()
        assert criterion.count == 0
    else:
        expected = CrossBatchMemory(Contrastive(), D, M)(X, Y)
        assert criterion(X, Y.to(kind)) == expected and torch.equal(criterion.label_memory, Y)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("enqueue", ["after", "before"])
@pytest.mark.parametrize(
    "make", [Contrastive, lambda: SelectPairs(Contrastive()), lambda: SigLIP(bias=nn.Parameter(torch.tensor(-1.0)))]
)
def test_rows_of_the_memory_may_be_a_batch(make, enqueue, normalize, device):
    """What is given is read before it is overwritten."""
    options = {"normalize_embeddings": normalize, "drift": "xbn", "enqueue": enqueue}
    given, copied = (CrossBatchMemory(make(), D, M, **options).to(device) for _ in range(2))
    for criterion in (given, copied):
        train(criterion, batches(5, device=device), ids=torch.arange(B, device=device))
    assert given.head == 20
    rows = given.bank[18 : 18 + B], given.bank_labels[18 : 18 + B]
    ids = given.bank_ids[18 : 18 + B]
    expected = copied(*(t.clone() for t in rows), ids=ids.clone())
    assert torch.equal(given(*rows, ids=ids), expected)
    for name, tensor in copied.named_state():
        assert torch.equal(getattr(given, name), tensor), name


@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_rows_of_the_same_sample_are_no_pair(enqueue, device):
    """With one sample only, seen again and again in other views, nothing is left to rank."""
    options = {"drift": "none", "enqueue": enqueue}
    criterion = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
    labels = torch.zeros(B, dtype=torch.int64, device=device)
    for x, _ in batches(3, device=device):
        assert criterion(x, labels, ids=labels + 7) == 0
    assert criterion(x, labels, ids=labels - 1) > 0, "no id, no copy"
    assert criterion(x, labels) > 0
    assert torch.equal(criterion.id_memory.unique(), torch.tensor([-1, 7], device=device))


def test_an_older_copy_is_no_positive(device):
    """As if the copy had never been stored."""
    (x, labels), (older, _), (other, _) = batches(3, device=device)
    ids = torch.arange(B, device=device)
    with_copies = CrossBatchMemory(Contrastive(), D, M, drift="none").to(device)
    with_copies(older, labels, ids=ids)
    with_copies(other, labels, ids=ids + B)
    without = CrossBatchMemory(Contrastive(), D, M, drift="none").to(device)
    for i in range(B):
        without.reset_queue()
        without(torch.cat([older[:i], older[i + 1 :]]), torch.cat([labels[:i], labels[i + 1 :]]))
        without(other, labels)
        anchor = torch.arange(B, device=device) == i
        for criterion in (with_copies, without):
            criterion.eval()
        torch.testing.assert_close(
            with_copies(x, labels, ids=ids, enqueue_mask=~anchor), without(x, labels, enqueue_mask=~anchor)
        )
        without.train()


def test_ages_and_ids(device):
    criterion = CrossBatchMemory(Contrastive(), D, 10).to(device)
    assert criterion.age_memory.shape == criterion.id_memory.shape == (0,)
    for t, size in enumerate((4, 3, 5)):
        x, labels = torch.randn(size, D, device=device), torch.arange(size, device=device)
        criterion(x, labels, ids=100 * t + labels if t != 1 else None)
    assert criterion.age_memory.tolist() == [1, 1, 3, 3, 2, 2, 2, 1, 1, 1]
    assert criterion.id_memory.tolist() == [203, 204, 2, 3, -1, -1, -1, 200, 201, 202]
    criterion.eval()(x, labels)
    assert criterion.age_memory.max() == 3, "evaluation is no step"
    rows = [(x, labels, labels + 50), (x, labels)]
    criterion.fill_from(rows)
    assert criterion.id_memory.tolist() == [50, 51, 52, 53, 54, -1, -1, -1, -1, -1]
    assert not criterion.age_memory.any()
