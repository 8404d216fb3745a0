"""ops.memory_loss, value and gradient, against the float64 reference."""

import dataclasses
from functools import partial

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from conftest import only
from loss_cases import run
from shapes import SHAPES, name

import xbn_ext
from xbn_ext import Contrastive, reference
from xbn_ext import ops as cpu_ops
from xbn_ext.dtypes import MEMORY_DTYPES

REDUCTIONS = ["mean", "avg_nonzero"]


problem = partial(loss_cases.problem, first_label=-2)


def truth_of(z, labels, bank, bank_labels, loss, **options):
    return run(reference.memory_loss, z.double(), labels, bank.double(), bank_labels, loss, **options)


def pairs_at_a_margin(z, bank, loss, options, width):
    """Per anchor, how many similarities lie so close to a margin that rounding decides whether they are active."""
    rows = bank.double()
    if options.get("scale") is not None:
        rows = rows * options["scale"] + options["shift"]
    s = reference.similarity(z.double(), rows, options.get("renormalize", True))
    return (((s - loss.pos_margin).abs() < width) | ((s - loss.neg_margin).abs() < width)).sum(1)


def assert_right(ops, z, labels, bank, bank_labels, loss, **options):
    """Value and gradient within a small multiple of what PyTorch loses in the same dtype."""
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss, **options)
    true_value, true_grad = truth_of(z, labels, bank, bank_labels, loss, **options)
    torch_value, torch_grad = run(reference.memory_loss, z, labels, bank, bank_labels, loss, **options)
    assert value.dtype == grad.dtype == z.dtype and value.shape == () and grad.shape == z.shape

    # A pair within rounding of a margin may count or not: the truth with the margins moved a little shows how much
    # hangs on that. The gradient jumps there by the pair's whole share.
    eps = torch.finfo(z.dtype).eps
    width = 64 * eps
    spread = 0.0
    for dp, dn in ((width, 0), (-width, 0), (0, width), (0, -width)):
        moved = dataclasses.replace(loss, pos_margin=loss.pos_margin + dp, neg_margin=loss.neg_margin + dn)
        spread += float((truth_of(z, labels, bank, bank_labels, moved, **options)[0] - true_value).abs())
    torch_error = float((torch_value - true_value).abs())
    assert (value - true_value).abs() <= 4 * torch_error + 64 * eps * true_value.abs() + spread
    ambiguous = pairs_at_a_margin(z, bank, loss, options, width)
    if loss.reduction == "mean":
        share = 1 / len(z)
    else:  # a pair on the margin also changes the number of pairs that the others are averaged over
        share = 4 * float(true_grad.norm(dim=1).max()) if ambiguous.any() else 0.0
        ambiguous = ambiguous.sum().clamp(max=1).expand(len(z))
    largest = bank.double().norm(dim=1).max() if options.get("renormalize") is False else 1.0
    scale = float(true_grad.abs().max())
    torch_error = float((torch_grad - true_grad).abs().max()) if not ambiguous.any() else 0.0
    budget = 4 * torch_error + 64 * eps * scale + ambiguous * share * largest
    excess = (grad - true_grad).abs().amax(1) - budget
    assert excess.max() <= 0, f"gradient off by {float((grad - true_grad).abs().max()):.2e}, scale {scale:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_ragged_shapes(shape, ops, device, dtype):
    reduction = REDUCTIONS[sum(shape) % 2]
    loss = Contrastive(pos_margin=0.9, neg_margin=0.2, reduction=reduction)  # at D = 1 all s are -1 or 1
    assert_right(ops, *problem(*shape, dtype, device), loss)


@pytest.mark.parametrize("D", [4, 36, 100, 128, 200, 256, 500, 512, 900, 1024])
def test_all_widths(D, ops, device, dtype):
    """Of the kernels for 64 to 1024 columns, full and not."""
    assert_right(ops, *problem(70, 150, D, dtype, device), Contrastive(pos_margin=0.9, neg_margin=0.1))


@pytest.mark.parametrize(
    "B, M, D",
    [
        (65, 6243, 8),
        *(
            pytest.param(*shape, marks=pytest.mark.long)
            for shape in [(1, 6145, 600), (1, 20011, 4), (65, 20011, 7), (300, 6145, 5), (70, 6243, 600)]
        ),
    ],
)
def test_a_split_of_many_tiles(B, M, D, ops, device, dtype):
    """Splits hold one tile each at the sizes above; here several, the last one down to a few rows or a single one."""
    assert_right(ops, *problem(B, M, D, dtype, device), Contrastive(pos_margin=0.9, neg_margin=0.2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("pending", [True, False], ids=["deferred", "plain"])
@pytest.mark.parametrize("chosen", [True, False], ids=["anchors", "all"])
@pytest.mark.parametrize("excluding", ["rows", "ids", None])
@pytest.mark.parametrize("count", [0, 1, 300, 777])
def test_options(reduction, renormalize, pending, chosen, excluding, count, width, ops, device, dtype):
    B, M, D = 130, 777, width
    z, labels, bank, bank_labels = problem(B, M, D, dtype, device)
    options = {"renormalize": renormalize, "count": torch.tensor(count, device=device)}
    if pending:
        options |= {
            "scale": (0.5 + torch.rand(D, dtype=torch.float64)).to(device),
            "shift": (0.1 * torch.randn(D, dtype=torch.float64)).to(device),
        }
    if chosen:
        options["anchors"] = torch.rand(B, device=device) < 0.6
    if excluding == "rows":
        options["exclude"] = torch.randint(-1, M, (B,), device=device)
    if excluding == "ids":  # several rows each, positives and negatives; -1 means none
        options["exclude"] = torch.randint(-1, 20, (B,), device=device)
        options["bank_ids"] = torch.randint(-3, 20, (M,), device=device)
    assert_right(ops, z, labels, bank, bank_labels, Contrastive(neg_margin=0.2, reduction=reduction), **options)


@pytest.mark.parametrize("has_exclude", [False, True])
def test_numbers_that_are_no_id(has_exclude, ops, device, dtype):
    """-1 and the smallest int64 exclude nothing and are excluded by nothing; all other numbers are ids."""
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    loss, no_ids, ids = Contrastive(neg_margin=0.2), [-1, -(2**63)], [-2, 0, -(2**63) + 1, 2**63 - 1]
    bank_ids = torch.tensor((no_ids + ids) * 84, device=device)[:500]
    some = torch.tensor((no_ids + ids if has_exclude else no_ids) * 35, device=device)[:70]
    assert_right(ops, z, labels, bank, bank_labels, loss, exclude=some, bank_ids=bank_ids)
    value = run(ops.memory_loss, z, labels, bank, bank_labels, loss, exclude=some, bank_ids=bank_ids)[0]
    assert (value == run(ops.memory_loss, z, labels, bank, bank_labels, loss)[0]) != has_exclude


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("margins", [(1.0, 0.5), (0.8, 0.0), (0.3, -0.2), (1.5, -2.0), (-2.0, 2.0)])
def test_margins(margins, reduction, ops, device, dtype):
    loss = Contrastive(*margins, reduction=reduction)
    assert_right(ops, *problem(70, 500, 48, dtype, device), loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "case", ["one class", "no positives", "all zero labels", "huge labels", "duplicates", "zero vectors"]
)
def test_edge_cases(case, reduction, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    if case == "one class":
        labels.fill_(3), bank_labels.fill_(3)
    if case == "no positives":
        labels += 1000
    if case == "all zero labels":
        labels.zero_(), bank_labels.zero_()
    if case == "huge labels":  # equal in the low 32 bits
        labels, bank_labels = labels * 2**32 + 7, bank_labels * 2**32 + 7
        labels[0], bank_labels[0] = -(2**63), 2**63 - 1
    if case == "duplicates":
        z[:] = z[0]
        bank[:250] = bank[250:]
    if case == "zero vectors":
        z[::3] = 0
        bank[::4] = 0
    assert_right(ops, z, labels, bank, bank_labels, Contrastive(neg_margin=0.2, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_excluded_rows_that_are_negatives(reduction, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    loss = Contrastive(neg_margin=-0.5, reduction=reduction)
    exclude = torch.arange(70, device=device) * 7
    assert_right(ops, z, labels + 1000, bank, bank_labels, loss, exclude=exclude)
    kept, _ = run(ops.memory_loss, z, labels + 1000, bank, bank_labels, loss)
    assert (kept - run(ops.memory_loss, z, labels + 1000, bank, bank_labels, loss, exclude=exclude)[0]).abs() > 1e-6


def test_a_pair_exactly_at_the_margin_is_inactive(ops, device, dtype):
    one = torch.ones(3, 1, dtype=dtype, device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    for bank_labels in (labels, labels + 1):  # s = 1: positives at pos_margin, negatives at neg_margin
        loss = Contrastive(pos_margin=1.0, neg_margin=1.0)
        value, grad = run(ops.memory_loss, one, labels, one, bank_labels, loss)
        assert value == 0 and not grad.any()
    # A pair at the margin is not counted among those that are averaged over.
    z, bank = torch.tensor([[1.0], [1.0]], device=device), torch.tensor([[1.0], [-1.0]], device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    value, _ = run(ops.memory_loss, z, labels, bank, labels, Contrastive(reduction="avg_nonzero"))
    assert value == 2


@pytest.mark.parametrize("off", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("D", [64, 512])
def test_pairs_close_to_the_margin(D, off, ops, device, dtype):
    """Once or twice `off` above or below: a way that looks at some pairs only must not overlook one."""
    B, M, margin = 70, 1000, 0.5
    z = F.normalize(torch.randn(1, D), dim=1)
    bank = torch.randn(M, D)
    bank = F.normalize(bank - bank @ z.T * z, dim=1)
    s = margin + off * (1 + torch.rand(M, 1)) * torch.randn(M, 1).sign()
    bank = (s * z + (1 - s**2).sqrt() * bank) * (0.1 + torch.rand(M, 1))
    labels, bank_labels = torch.zeros(B).long(), torch.ones(M).long()
    args = [t.to(device) for t in (z.repeat(B, 1).to(dtype), labels, bank.to(dtype), bank_labels)]
    _, pairs = ops.memory_loss_and_pairs(*args, Contrastive(neg_margin=margin))
    assert pairs.tolist() == [0, int((s > margin).sum())]


def test_short_rows_are_divided_by_eps(ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    bank /= bank.norm(dim=1).median()
    loss = Contrastive(pos_margin=0.9, neg_margin=0.2)
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss, eps=1.0)
    true_value, true_grad = truth_of(z, labels, bank, bank_labels, loss, eps=1.0)
    torch.testing.assert_close(value, true_value, check_dtype=False, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, true_grad, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
def test_the_bank_has_its_own_dtype(memory_dtype, implementation, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    way, refused = implementation.way, None
    if way not in ("auto", "composite"):
        if dtype == torch.float64 or memory_dtype == torch.float64:
            refused = f"way '{way}' takes float32 embeddings, no float64 bank, and at most 1024"
        elif way == "simt" and memory_dtype != torch.float32:
            refused = "way 'simt' takes a float32 bank"
    if refused:
        with pytest.raises(RuntimeError, match=refused):
            ops.memory_loss(z, labels, bank.to(memory_dtype), bank_labels, Contrastive())
        return
    assert_right(ops, z, labels, bank.to(memory_dtype), bank_labels, Contrastive(neg_margin=0.2))


def test_non_contiguous(ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    wide, stretched = (
        torch.zeros(48, 140, dtype=dtype, device=device),
        torch.zeros(1000, dtype=torch.int64, device=device),
    )
    wide[:, ::2], stretched[::2] = z.T, bank_labels
    assert_right(ops, wide[:, ::2].T, labels.flip(0).flip(0), bank, stretched[::2], Contrastive(neg_margin=0.2))


def test_empty_batch_and_empty_bank(ops, device, dtype):
    loss = Contrastive(neg_margin=0.2)
    for B, M in ((0, 10), (10, 0), (0, 0)):
        value, grad = run(ops.memory_loss, *problem(B, M, 5, dtype, device), loss)
        assert value == 0 and grad.shape == (B, 5) and not grad.any()


def test_upstream_gradient_and_a_second_use_of_the_graph(ops, device, dtype):
    z, *rest = problem(70, 500, 48, dtype, device)
    loss = Contrastive(neg_margin=0.2)
    _, grad = run(ops.memory_loss, z, *rest, loss)
    _, scaled = run(ops.memory_loss, z, *rest, loss, upstream=-2.0)
    assert torch.equal(scaled, -2 * grad)
    z.requires_grad_()
    value = ops.memory_loss(z, *rest, loss)
    value.backward(retain_graph=True)
    value.backward()
    assert torch.equal(z.grad, 2 * grad)


@only(dtype="f64")
def test_gradcheck(ops, device, dtype):
    z, *rest = problem(5, 40, 6, torch.float64, device)
    for reduction in REDUCTIONS:
        loss = Contrastive(0.9, 0.1, reduction)
        assert pairs_at_a_margin(z, rest[1], loss, {}, 1e-5).sum() == 0
        assert torch.autograd.gradcheck(
            lambda z, loss=loss: ops.memory_loss(z, *rest, loss), z.detach().requires_grad_()
        )


def test_a_second_derivative_raises():
    z, *rest = problem(5, 40, 6, torch.float64)
    z.requires_grad_()
    (grad,) = torch.autograd.grad(cpu_ops.memory_loss(z, *rest, Contrastive()), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        (grad.square().sum() + z.square().sum()).backward()  # a gradient penalty


def test_without_grad_the_value_is_the_same(ops, device, dtype):
    z, *rest = problem(70, 500, 48, dtype, device)
    loss = Contrastive(neg_margin=0.2)
    value, _ = run(ops.memory_loss, z, *rest, loss)
    with torch.no_grad():
        assert torch.equal(ops.memory_loss(z, *rest, loss), value)
    assert not ops.memory_loss(z, *rest, loss).requires_grad


def test_autocast_changes_no_bit(ops, device, dtype):
    z, *rest = problem(70, 500, 48, dtype, device)
    expected = run(ops.memory_loss, z, *rest, Contrastive(neg_margin=0.2))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = run(ops.memory_loss, z, *rest, Contrastive(neg_margin=0.2))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_the_loss_nan(bad, ops, device, dtype):
    z, *rest = problem(70, 500, 48, dtype, device)
    z[3, 2] = bad
    z = F.normalize(z, dim=1)
    for reduction in REDUCTIONS:
        loss = Contrastive(neg_margin=0.2, reduction=reduction)
        assert ops.memory_loss(z, *rest, loss).isnan()
        assert reference.memory_loss(z, *rest, loss).isnan()


def test_same_bits_on_any_number_of_threads_and_every_time():
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(run(cpu_ops.memory_loss, *problem(300, 5000, 65, torch.float32), Contrastive(neg_margin=0.2)))
    torch.set_num_threads(1)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx512", "avx_vnni", "avx2", "baseline"])
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", isa)
    try:
        assert xbn_ext.build_info()["cpu_isa"] == isa
    except RuntimeError as lacking:
        pytest.skip(str(lacking))
    for B, M, D in ((1, 1, 1), (65, 257, 63), (300, 1000, 130)):
        assert_right(cpu_ops, *problem(B, M, D, dtype), Contrastive(neg_margin=0.2))


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="XBN_CPU_ISA must be"):
        cpu_ops.memory_loss(*problem(2, 2, 2, torch.float32), Contrastive())
