"""step_, a training step as one op, against the other ops in turn and against the reference."""

import dataclasses
from types import SimpleNamespace

import pytest
import state
import torch
import torch.nn.functional as F
from conftest import only
from op_calls import ARGUMENTS, STATE
from torch import nn

from xbn_ext import Contrastive, SupCon, reference
from xbn_ext.filter import Filter, make_filter
from xbn_ext.ops.step import MEASURED

B, M, D = 9, 23, 12


def memory(dtype, device, count=20):
    torch.manual_seed(3)
    return state.to(state.filled(M, D, count, dtype, pending=True), device)


def batch(dtype, device):
    torch.manual_seed(4)
    return torch.randn(B, D, dtype=dtype, device=device), torch.arange(B, device=device) % 4


OPTIONS = {
    "default": {},
    "not normalised": {"normalize_embeddings": False},
    "raw products": {"normalize_embeddings": False, "renormalize": False},
    "deferred": {"update": "deferred", "enqueue": "before"},
    "before": {"enqueue": "before"},
    "no drift": {"filter": None},
    "ema, warming up": {"filter": make_filter("ema", 1.0, 1.0, 0.3), "warmup_steps": 1},
    "batch only": {"memory_weight": 0.0, "batch_weight": 0.7},
    "memory only": {"batch_weight": 0.0, "memory_weight": 0.3},
    "process noise": {"filter": Filter(0.5, 2.0, None)},
    "centred": {"center_gradient": True, "memory_weight": 0.3},
    "centred, batch only": {"center_gradient": True, "memory_weight": 0.0, "normalize_embeddings": False},
}


@pytest.mark.parametrize("masked, with_ids", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_step(options, masked, with_ids, temperature, ops, device, dtype):
    ours = memory(dtype, device)
    truth = state.clone(ours, torch.float64)
    x, labels = batch(dtype, device)
    if temperature is not None and "center_gradient" in options:
        with pytest.raises(TypeError, match="centres no gradient where the temperature is a tensor"):
            ops.step_(ours, x, labels, SupCon(torch.tensor(temperature)), **options)
        return
    rows = {
        "enqueue_mask": labels != 1 if masked else None,
        "ids": torch.arange(-2, B - 2, device=device) if with_ids else None,
    }
    results = []
    for module, m, given in ((ops, ours, x), (reference, truth, x.double())):
        leaves = [given.clone().requires_grad_()]
        loss = Contrastive(0.9, 0.2)
        if temperature is not None:
            leaves.append(nn.Parameter(torch.tensor([temperature], dtype=given.dtype, device=device)))
            loss = SupCon(leaves[-1])
        for _ in range(2):  # the second finds the rows of the first in the memory
            value = module.step_(m, leaves[0], labels, loss, **rows, **options)
            results.append([value, *torch.autograd.grad(2 * value, leaves)])
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (2e-4, 2e-5)
    for got, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)
    for field in dataclasses.fields(truth):
        got, expected = getattr(ours, field.name), getattr(truth, field.name)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


@pytest.mark.parametrize("spoiled", ["an anchor", "a key"])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_row_that_is_not_finite_spoils_no_other_gradient(spoiled, normalized, ops, device, dtype):
    """Neither does the mean that centring takes off: it is that of the other anchors."""
    options = {"center_gradient": True, "batch_weight": 0.0, "normalize_embeddings": normalized}
    given, labels = batch(dtype, device)
    given[2, 3] = torch.inf
    mask = torch.arange(B, device=device) >= (B - 3 if spoiled == "an anchor" else 2)
    mask[2] = spoiled == "a key"
    grads = []
    ours = memory(dtype, device)
    for module, m in ((reference, state.clone(ours, torch.float64)), (ops, ours)):
        x = given.to(m.bank.dtype, copy=True).requires_grad_()
        value = module.step_(m, x, labels, Contrastive(0.9, 0.2), enqueue_mask=mask, **options)
        value.backward()
        assert value.isfinite() == (spoiled == "a key")
        grads.append(x.grad)
    others = torch.arange(B, device=device) != 2
    expected, found = (grad[others] for grad in grads)
    assert found.isfinite().all() and found[~mask[others]].norm() > 1e-3
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (2e-4, 2e-5)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)


@only(dtype="f32")
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_the_memory_has_the_bits_that_the_ops_give_it(deferred, enqueue, ops, device, dtype):
    m, other = memory(dtype, device), memory(dtype, device)
    x, labels = batch(dtype, device)
    for name, n in zip(MEASURED, (2, 3), strict=True):
        setattr(m, name, torch.zeros(n, dtype=torch.float64, device=device))
    ops.step_(m, x, labels, Contrastive(0.9, 0.2), update="deferred" if deferred else "inplace", enqueue=enqueue)

    z, stats = ops.normalize(x), torch.zeros(3, dtype=torch.float64, device=device)
    filtered = (other.target_mean, other.target_std, other.variance, other.scale, other.shift)
    ops.track_(
        *filtered, z, None, other.sums, other.count, *Filter(None, 1.0, None), stats=stats,
        innovation=other.innovation,
    )  # fmt: skip

    def put():
        ops.enqueue_(
            other.bank, other.bank_labels, other.sums, other.head, other.count, z, labels, None, other.scale,
            other.shift, bank_ids=other.bank_ids, bank_steps=other.bank_steps, step=other.step,
        )  # fmt: skip

    moved = (other.bank, other.sums, other.scale, other.shift, other.count)
    if deferred:
        ops.standardize_(*moved)
    if enqueue == "before":
        if not deferred:
            ops.transform_(*moved)
        put()
    if enqueue == "before" or deferred:
        _, pairs = ops.memory_loss_and_pairs(
            z, labels, other.bank, other.bank_labels, Contrastive(0.9, 0.2), count=other.count, scale=other.scale,
            shift=other.shift, exclude=torch.arange(20, 20 + B, device=device) % M if enqueue == "before" else None,
        )  # fmt: skip
    else:
        _, pairs = ops.transform_memory_loss_(*moved, z, labels, other.bank_labels, Contrastive(0.9, 0.2))
    if enqueue == "after":
        put()
    other.step += 1
    for name in STATE:
        assert torch.equal(getattr(m, name), getattr(other, name)), name
    assert torch.equal(m.drift_stats, stats) and torch.equal(m.pairs, pairs)


@only(dtype="f32")
@pytest.mark.parametrize("n", [B, 70])
def test_in_place_the_sums_follow_the_rows(n, ops, device, dtype):
    """They are those of the rows, up to the rounding of single rows, whether they are counted in a step or mapped: on a
    GPU they are counted in every 1,024th."""
    m = memory(dtype, device)
    for step in range(1022, 1027):
        m.step.fill_(step)
        if step == 1024:
            m.sums += 0.1  # which counting mends
        x, labels = torch.randn(n, D, device=device), torch.arange(n, device=device) % 4
        ops.step_(m, x, labels, Contrastive(0.9, 0.2))
        rows = m.bank[: int(m.count)].double()
        torch.testing.assert_close(m.sums, reference.sums_of(rows), rtol=1e-6, atol=1e-6)
        assert torch.equal(m.scale, torch.ones_like(m.scale)) and not m.shift.any()


def test_what_shares_memory_with_the_state_is_copied(ops, device):
    for normalizes in (True, False):
        m, other = memory(torch.float32, device), memory(torch.float32, device)
        given = [other.bank[3 : 3 + B].clone(), other.bank_labels[5 : 5 + B].clone(), other.bank_ids[:B].clone()]
        expected = ops.step_(other, *given[:2], Contrastive(), ids=given[2], normalize_embeddings=normalizes)
        value = ops.step_(
            m, m.bank[3 : 3 + B], m.bank_labels[5 : 5 + B], Contrastive(), ids=m.bank_ids[:B],
            normalize_embeddings=normalizes,
        )  # fmt: skip
        assert torch.equal(value, expected)
        state.assert_same_state(m, other, rtol=0, atol=0)


def test_an_empty_batch_moves_nothing_but_the_count_of_steps(ops, device):
    m, before = memory(torch.float32, device), memory(torch.float32, device)
    x = torch.empty(0, D, device=device, requires_grad=True)
    value = ops.step_(m, x, torch.empty(0, dtype=torch.int64, device=device), Contrastive(), update="deferred")
    value.backward()
    assert value == 0 and x.grad.shape == (0, D) and m.step == 1
    assert torch.equal(m.bank_labels, before.bank_labels) and m.count == before.count


def test_an_argument_that_is_missing_is_named(ops):
    m = memory(torch.float32, "cpu")
    x, labels = batch(torch.float32, "cpu")
    with pytest.raises(TypeError, match="step_: loss must be an xbn_ext loss"):
        ops.step_(m, x, labels, F.cross_entropy)
    for name in ("update", "enqueue"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            ops.step_(m, x, labels, Contrastive(), **{name: "later"})
    with pytest.raises(AttributeError, match="bank_labels"):
        ops.step_(SimpleNamespace(bank=m.bank), x, labels, Contrastive())


@pytest.mark.parametrize("changes", [{}, {"need_grad": False}], ids=["grad", "no grad"])
def test_opcheck_with_sides(changes):
    arguments = ARGUMENTS["step_"](normalizes=False, sides=torch.randn(10, 7), **changes)
    torch.library.opcheck(torch.ops.xbn_ext.step_.default, tuple(arguments.values()))
