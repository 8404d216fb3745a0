"""ops.batch_loss, value and gradient on both sides, against the float64 reference."""

import pytest
import torch
import torch.nn.functional as F
from conftest import only
from loss_cases import (
    LOSSES,
    assert_close,
    clear_anchors,
    each_kind_of_loss,
    every_loss,
    few_losses,
    is_of_distance,
    problem,
    run,
)
from shapes import SIZES
from torch import nn

from xbn_ext import Contrastive, NTXent, SupCon, reference
from xbn_ext import ops as cpu_ops


def assert_right(ops, z, labels, loss, **options):
    """Over the anchors whose loss does not hang on rounding, as in `loss_cases`."""
    ids, renormalize = options.get("ids"), options.get("renormalize", True)
    rows = torch.arange(len(z), device=z.device)
    own = rows if ids is None else torch.where(ids >= 0, ids, -2 - rows)
    clear = clear_anchors(loss, z, labels, z, labels, renormalize=renormalize, exclude=own, bank_ids=own)
    anchors = options.get("anchors")
    options["anchors"] = clear if anchors is None else anchors & clear
    truth = run(reference.batch_loss, z.double(), labels, loss, **options)
    largest = float(reference.similarity(z.double(), z.double(), renormalize).abs().max()) if len(z) else 0.0
    same_dtype = run(reference.batch_loss, z, labels, loss, **options)
    assert_close(run(ops.batch_loss, z, labels, loss, **options), truth, same_dtype, loss, largest)


@every_loss
@pytest.mark.parametrize("B", SIZES[:-1])
@pytest.mark.parametrize("D", [1, 7, 65])
def test_ragged_shapes(B, D, loss, ops, device, dtype):
    z, labels, _, _ = problem(B, 1, D, dtype, device)
    assert_right(ops, z, labels, loss)


@few_losses
def test_a_large_batch(loss, ops, device, dtype):
    z, labels, _, _ = problem(1000, 1, 20, dtype, device)
    assert_right(ops, z, labels, loss)


@every_loss
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("chosen", [True, False], ids=["anchors", "all"])
@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "no-ids"])
def test_options(loss, renormalize, chosen, with_ids, ops, device, dtype):
    z, labels, _, _ = problem(70, 1, 33, dtype, device)
    options = {"renormalize": renormalize or is_of_distance(loss)}
    if renormalize:
        z = z * (0.1 + torch.rand(70, 1, dtype=dtype, device=device))
    if chosen:
        options["anchors"] = torch.rand(70, device=device) < 0.6
    if with_ids:  # several rows each, positives and negatives; negative ids mean none
        options["ids"] = torch.randint(-3, 20, (70,), device=device)
    assert_right(ops, z, labels, loss, **options)


@each_kind_of_loss
@pytest.mark.parametrize("labels", [torch.zeros(9), torch.arange(9), torch.arange(9) % 8 - 2**40], ids=["1", "9", "8"])
def test_without_positives_or_negatives(labels, loss, ops, device):
    z = F.normalize(torch.randn(9, 5, dtype=torch.float64, device=device), dim=1)
    assert_right(ops, z, labels.long().to(device), loss)


@pytest.mark.singly
@each_kind_of_loss
def test_an_empty_batch(loss, ops, device, dtype):
    """Its products with itself have no column either."""
    z = torch.zeros(0, 5, dtype=dtype, device=device)
    value, grad = run(ops.batch_loss, z, torch.zeros(0, dtype=torch.int64, device=device), loss)
    assert value == 0 and grad.shape == (0, 5)


@each_kind_of_loss
def test_rows_of_no_length(loss, ops, device, dtype):
    """A row shorter than eps is not blown up, and gets the gradient of a division by eps."""
    z, labels, _, _ = problem(20, 1, 6, dtype, device, classes=3)
    z[3], z[4] = 0, z[4] * 1e-8
    assert_right(ops, z, labels, loss, eps=1e-3)


@each_kind_of_loss
@pytest.mark.parametrize("length", [1e14, 1e-15])
def test_rows_of_any_length(length, loss, ops, device, dtype):
    """The gradient by a norm has the third power of its inverse, which float32 does not hold."""
    z, labels, _, _ = problem(20, 1, 6, dtype, device, classes=3)
    assert_right(ops, z * length, labels, loss, eps=1e-18)


@each_kind_of_loss
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite(bad, loss, ops, device, dtype):
    """As memory_loss has it: a row that is not finite makes the loss NaN, and so the gradient of all that it meets."""
    z, labels, _, _ = problem(20, 1, 6, dtype, device, classes=2)
    z[7, 2] = bad
    value, grad = run(ops.batch_loss, z, labels, loss)
    assert value.isnan() and grad.isnan().all()


@pytest.mark.parametrize("loss", [loss for loss in LOSSES.values() if not is_of_distance(loss)], ids=lambda x: x.kind)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinite_row_that_is_no_anchor(sign, loss, ops, device, dtype):
    """Not normalised, its products are Inf, and a pair of Inf could cost nothing."""
    z = torch.ones(4, 2, dtype=dtype, device=device)
    z[0, 0] = sign * torch.inf
    labels, anchors = torch.tensor([0, 0, 1, 1], device=device), torch.tensor([False, True, True, True], device=device)
    value, grad = run(ops.batch_loss, z, labels, loss, anchors=anchors, renormalize=False)
    assert value.isnan() and grad[0].isnan().all()
    assert reference.batch_loss(z, labels, loss, anchors=anchors, renormalize=False).isnan()


@pytest.mark.parametrize("loss", [SupCon(0.3), NTXent(0.3)], ids=["supcon", "ntxent"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_learned_temperature(renormalize, loss, ops, device):
    z, labels, _, _ = problem(40, 1, 8, torch.float64, device)
    results = []
    for module in (ops, reference):
        temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64, device=device))
        rows = (3 * z).requires_grad_()
        value = module.batch_loss(rows, labels, type(loss)(temperature), renormalize=renormalize)
        results.append([value.detach(), *torch.autograd.grad(value, [rows, temperature])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_gradcheck(ops, device):
    z, labels, _, _ = problem(6, 1, 4, torch.float64, device, classes=2)
    torch.autograd.gradcheck(lambda z: ops.batch_loss(z, labels, SupCon(0.5)), (2 * z).requires_grad_())


def test_without_a_gradient(ops, device, dtype):
    z, labels, _, _ = problem(65, 1, 7, dtype, device)
    assert torch.equal(
        ops.batch_loss(z, labels, SupCon()), ops.batch_loss(z.clone().requires_grad_(), labels, SupCon()).detach()
    )


@pytest.mark.parametrize("threads", [1, 3])
@each_kind_of_loss
def test_same_bits_on_any_number_of_threads(loss, threads):
    z, labels, _, _ = problem(130, 1, 7, torch.float32)
    dots = z @ z.T
    args = (dots, labels, None, None, loss.kind, loss.parameters, True, 1e-6, True)
    once = torch.ops.xbn_ext.batch_loss(*args)
    torch.set_num_threads(threads)
    try:
        again = torch.ops.xbn_ext.batch_loss(*args)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, once, again))


@pytest.mark.singly
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
@each_kind_of_loss
def test_every_instruction_set(loss, isa, dtype, monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", isa)
    z, labels, _, _ = problem(130, 1, 20, dtype)
    try:
        assert_right(cpu_ops, z, labels, loss)
    except RuntimeError as error:
        if "XBN_CPU_ISA" not in str(error):  # this processor does not have it
            raise
        pytest.skip(str(error))


@only(compiled=True)
def test_the_op(ops, device, dtype):
    """torch's own checks of it: schema, fake kernel, autograd, compiled."""
    z, labels, _, _ = problem(9, 1, 5, dtype, device)
    dots = (z @ z.T).requires_grad_()
    op = torch.ops.xbn_ext.batch_loss
    torch.library.opcheck(op, (dots, labels, None, None, "supcon", [0.5], True, 1e-6, True), raise_exception=True)


def test_second_derivatives_are_refused():
    z, labels, _, _ = problem(9, 1, 5, torch.float64)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(cpu_ops.batch_loss(z, labels, SupCon()), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dots": torch.zeros(3, 4)}, r"dots must be \[B, B\]"),
        ({"dots": torch.zeros(5, 5)}, r"dots must be \[B, B\]"),
        ({"dots": torch.zeros(4, 4, dtype=torch.int64)}, "dots must be"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, "labels must be"),
        ({"ids": torch.zeros(4)}, "ids must be"),
        ({"anchors": torch.zeros(4)}, "anchors must be"),
        ({"eps": 0.0}, "eps must be"),
        ({"loss": "hinge"}, "unknown loss"),
    ],
)
def test_bad_input_names_the_argument(change, words):
    args = {
        "dots": torch.zeros(4, 4), "labels": torch.zeros(4, dtype=torch.int64), "ids": None, "anchors": None,
        "loss": "supcon", "parameters": [0.5], "renormalize": True, "eps": 1e-6, "need_grad": True,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        torch.ops.xbn_ext.batch_loss(*(args | change).values())


def test_under_autocast(ops, device):
    z, labels, _, _ = problem(40, 1, 9, torch.float32, device)
    value, _ = run(ops.batch_loss, z, labels, SupCon())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.batch_loss(z, labels, SupCon()), value)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_a_backward_pass_under_autocast(learned, renormalize, ops, device):
    """PyTorch advises against one, and takes every product of it in 16 bits."""
    z, labels, _, _ = problem(40, 1, 9, torch.float32, device)
    results = []
    for enabled in (False, True):
        temperature = torch.nn.Parameter(torch.tensor(0.1, device=device)) if learned else 0.1
        rows = z.clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            ops.batch_loss(rows, labels, SupCon(temperature), renormalize=renormalize).backward()
        results.append((rows.grad, temperature.grad if learned else rows.grad))
    assert all(map(torch.equal, *results))


def test_margins_apart(ops, device, dtype):
    """Positives and negatives averaged apart: two factors in one row."""
    z, labels, _, _ = problem(40, 1, 9, dtype, device)
    assert_right(ops, z, labels, Contrastive(0.95, 0.05, "avg_nonzero"))
