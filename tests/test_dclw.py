"""The weighted decoupled contrastive loss, as its formula has it."""

import pytest
import state
import torch
import torch.nn.functional as F

from xbn_ext import DCL, DCLW, CrossBatchMemory, ops

B, M, D = 12, 150, 7


def expected(loss, s, positive, negative):
    """From all similarities `[B, n]`."""
    both = positive.any(1) & negative.any(1)
    positive = positive & both[:, None]
    scale = (s.detach() / loss.sigma).exp()
    weight = 2 - scale / scale[positive].mean()
    push = torch.where(negative, s / loss.temperature, -torch.inf).logsumexp(1)[:, None]
    cost = push - weight * s / loss.temperature
    return cost[positive].mean() if positive.any() else s.sum() * 0


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("loss", [DCLW(), DCLW(0.3, 0.05)], ids=str)
def test_against_a_memory(loss, renormalize, few_at_a_time):
    m = state.filled(M, D, 130, torch.float64, pending=True)
    z = F.normalize(torch.randn(B, D, dtype=torch.float64)).requires_grad_()
    labels, anchors = torch.randint(-3, 9, (B,)), torch.rand(B) < 0.8
    labels[0] = 99  # has no positives
    told = {"count": m.count, "scale": m.scale, "shift": m.shift, "anchors": anchors, "renormalize": renormalize}
    value, pairs = ops.memory_loss_and_pairs(z, labels, m.bank, m.bank_labels, loss, **told)
    value.backward()
    again = z.detach().clone().requires_grad_()
    rows = (m.bank * m.scale + m.shift)[: int(m.count)]
    s = again @ (F.normalize(rows, eps=1e-6) if renormalize else rows).T
    positive = labels[:, None] == m.bank_labels[: s.shape[1]]
    truth = expected(loss, s, positive & anchors[:, None], ~positive & anchors[:, None])
    truth.backward()
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(pairs, ops.memory_loss_and_pairs(z, labels, m.bank, m.bank_labels, DCL(), **told)[1])


@pytest.mark.parametrize("renormalize", [True, False])
def test_of_a_batch_against_itself(renormalize):
    loss, z = DCLW(0.3), torch.randn(B, D, dtype=torch.float64).requires_grad_()
    labels, ids = torch.randint(4, (B,)), torch.randint(-1, 9, (B,))
    value = ops.batch_loss(z, labels, loss, ids=ids, renormalize=renormalize)
    value.backward()
    again = z.detach().clone().requires_grad_()
    s = again @ (F.normalize(again) if renormalize else again).T
    pair = ~torch.eye(B, dtype=torch.bool) & ((ids[:, None] < 0) | (ids[:, None] != ids))
    positive = labels[:, None] == labels
    truth = expected(loss, s, positive & pair, ~positive & pair)
    truth.backward()
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, again.grad, rtol=1e-9, atol=1e-12)


def test_one_positive_each_is_the_papers(dtype):
    """Two views, each other's positives: the mean is over the batch."""
    a, b = F.normalize(torch.randn(B, D, dtype=dtype)), F.normalize(torch.randn(B, D, dtype=dtype))
    s = a @ b.T
    own = s.diagonal()
    weight = 2 - B * (own / 0.5).softmax(0)
    others = s.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf)
    truth = ((others / 0.1).logsumexp(1) - weight * own / 0.1).mean()
    value = ops.memory_loss(a, torch.arange(B), b, torch.arange(B), DCLW())
    torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("options", [{}, {"update": "deferred", "enqueue": "before"}, {"memory_dtype": torch.float16}])
def test_a_memory_trains_with_it(options, dtype):
    criterion = CrossBatchMemory(DCLW(), D, 50, **options)
    for _ in range(4):
        x, labels = torch.randn(20, D, dtype=dtype, requires_grad=True), torch.randint(5, (20,))
        criterion(x, labels, ids=torch.randint(0, 30, (20,))).backward()
        assert x.grad.isfinite().all() and x.grad.any()
    x = torch.randn(20, D, requires_grad=True)
    value = criterion(x, torch.arange(20) + 100)  # no positives
    value.backward()
    assert value == 0 and not x.grad.any()
    with torch.no_grad():
        x[3] = torch.nan
    assert criterion(x, labels).isnan()


def test_what_is_wrong_is_named():
    for name, value in (("temperature", 0.0), ("sigma", -1.0), ("sigma", float("nan")), ("sigma", torch.ones(()))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            DCLW(**{name: value})
        criterion = CrossBatchMemory(DCLW(), D, 20)
        setattr(criterion.loss, name, value)
        with pytest.raises(ValueError, match=f"{name} must be"):
            criterion(torch.randn(3, D), torch.arange(3))
        assert int(criterion.count) == 0
    assert str(DCLW(0.2)) == "DCLW(temperature=0.2, sigma=0.5)"
