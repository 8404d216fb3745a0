"""Every loss of ops.memory_loss, value and gradient, against the float64 reference, with every option and any rows."""

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from conftest import only
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    LOSSES,
    NOT_UNDER_TEST,
    assert_right,
    each_kind_of_loss,
    every_loss,
    is_of_distance,
    problem,
    run,
    run_with_pairs,
)
from shapes import PAIRS, name
from state import NARROW_DTYPES

from xbn_ext import DCLW, Circle, Contrastive, MultiSimilarity, NTXent, SupCon, Triplet, reference
from xbn_ext import ops as cpu_ops
from xbn_ext.losses import DISTANCES, KINDS
from xbn_ext.plain.losses import BY_FORMULA
from xbn_ext.reference.losses import FORMULAS


def test_every_kind_of_loss_is_everywhere():
    """In the reference, in plain PyTorch, among the losses under test and in the kernels."""
    assert set(KINDS) == {loss.kind for loss in LOSSES.values()} | NOT_UNDER_TEST
    assert {loss.formula for loss in KINDS.values()} == set(FORMULAS) == set(BY_FORMULA)
    for loss in KINDS.values():
        assert_right(cpu_ops, *problem(20, 100, 9), loss)


@every_loss
@pytest.mark.parametrize("shape", PAIRS, ids=name)
def test_ragged_shapes(loss, shape, ops, device, dtype):
    assert_right(ops, *problem(*shape, dtype, device), loss)


@every_loss
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("pending", [True, False], ids=["deferred", "plain"])
@pytest.mark.parametrize("chosen", [True, False], ids=["anchors", "all"])
@pytest.mark.parametrize("excluding", ["rows", "ids", None])
def test_options(loss, renormalize, pending, chosen, excluding, width, ops, device, dtype):
    B, M, D = 70, 500, width
    z, labels, bank, bank_labels = problem(B, M, D, dtype, device)
    options = {"renormalize": renormalize or is_of_distance(loss)}
    if not renormalize:
        bank /= bank.norm(dim=1, keepdim=True) * (1 + torch.rand(M, 1, dtype=dtype, device=device))
    if pending:
        options["scale"] = (0.5 + torch.rand(D, dtype=torch.float64)).to(device)
        options["shift"] = (0.1 * torch.randn(D, dtype=torch.float64)).to(device)
    if chosen:
        options["anchors"] = torch.rand(B, device=device) < 0.6
    if excluding == "rows":
        options["exclude"] = torch.randint(-1, M, (B,), device=device)
    if excluding == "ids":  # several rows each, positives and negatives; -1 means none
        options["exclude"] = torch.randint(-1, 20, (B,), device=device)
        options["bank_ids"] = torch.randint(-3, 20, (M,), device=device)
    assert_right(ops, z, labels, bank, bank_labels, loss, **options)


@only(ways=["composite", "tensor"])  # simt refuses: test_memory_loss
@each_kind_of_loss
@pytest.mark.parametrize("memory_dtype", NARROW_DTYPES, ids=str)
def test_16_bit_banks(memory_dtype, loss, implementation, ops, device, dtype):
    D = 72 if implementation.way == "tensor" else 63
    z, labels, bank, bank_labels = problem(65, 257, D, dtype, device)
    scale, shift = (0.5 + torch.rand(D, dtype=torch.float64)).to(device), torch.randn(D).double().to(device) / 10
    assert_right(ops, z, labels, bank.to(memory_dtype), bank_labels, loss, scale=scale, shift=shift)
    assert_right(ops, z, labels, bank.to(memory_dtype), bank_labels, loss)


@each_kind_of_loss
@pytest.mark.parametrize("count", [0, 1, 64, 130, 499])
def test_rows_beyond_the_count_do_not_exist(loss, count, width, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, width, dtype, device)
    cut = run(ops.memory_loss, z, labels, bank[:count].clone(), bank_labels[:count], loss)
    bank[count:] = torch.nan
    counted = run(ops.memory_loss, z, labels, bank, bank_labels, loss, count=torch.tensor(count, device=device))
    for a, b in zip(cut, counted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-6)


@each_kind_of_loss
@pytest.mark.parametrize("case", ["one class", "no positives", "lone pairs", "duplicates", "zero vectors", "far apart"])
def test_edge_cases(case, loss, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    if case == "one class":
        labels.fill_(3), bank_labels.fill_(3)
    if case == "no positives":
        labels += 1000
    if case == "lone pairs":  # one positive in the bank for each of some anchors, and a single class besides
        labels.copy_(torch.arange(70)), bank_labels.fill_(5)
    if case == "duplicates":
        z[:] = z[0]
        bank[:250] = bank[250:]
    if case == "zero vectors":
        z[::3] = 0
        bank[::4] = 0
    if case == "far apart":  # positives at 1, negatives at -1
        z[:] = z[0]
        bank[:] = torch.where((bank_labels == 3)[:, None], z[0], -z[0])
        labels.fill_(3)
    assert_right(ops, z, labels, bank, bank_labels, loss)


@pytest.mark.parametrize(
    "loss",
    [SupCon(0.002), NTXent(0.002), MultiSimilarity(50.0, 500.0, 0.1), Circle(0.25, 256.0), Circle(-0.2, 1000.0)],
    ids=lambda loss: loss.kind,
)
def test_exponents_beyond_float32(loss, ops, device, dtype):
    """e^88 is the end of float32: exponents of hundreds, growing and falling along the bank."""
    for falling in (False, True):
        z, labels, bank, bank_labels = problem(70, 1500, 8, dtype, device)
        order = (F.normalize(bank, dim=1) @ z[0]).argsort(descending=falling)
        assert_right(ops, z, labels, bank[order], bank_labels[order], loss)


@pytest.mark.singly
@each_kind_of_loss
def test_embeddings_that_are_not_normalised(loss, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 8, dtype, device)
    if is_of_distance(loss):
        with pytest.raises(
            ValueError, match=r'renormalize must be True with distance=".*", which is that of rows of u'
        ):
            ops.memory_loss(z, labels, bank, bank_labels, loss, renormalize=False)
        return
    assert_right(ops, z * 30, labels, bank * 3, bank_labels, loss, renormalize=False)


@pytest.mark.singly
@each_kind_of_loss
def test_empty_batch_and_empty_bank(loss, ops, device, dtype):
    for B, M in ((0, 10), (10, 0), (0, 0)):
        value, grad = run(ops.memory_loss, *problem(B, M, 5, dtype, device), loss)
        assert value == 0 and grad.shape == (B, 5) and not grad.any()


@pytest.mark.singly
@each_kind_of_loss
def test_a_row_that_is_not_finite(loss, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 48, dtype, device)
    clean, grad_of_clean = run(ops.memory_loss, z, labels, bank, bank_labels, loss)
    z[3, 2] = torch.nan
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss)
    assert clean.isfinite() and grad_of_clean.isfinite().all()
    assert value.isnan() and reference.memory_loss(z, labels, bank, bank_labels, loss).isnan()
    assert grad[3].isnan().all()
    # Left out of the anchors it changes no loss; its own gradient still shows it.
    others = torch.arange(70, device=device) != 3
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss, anchors=others)
    assert value.isfinite() and grad[3].isnan().all() and grad[others].isfinite().all()


@every_loss
@pytest.mark.parametrize("their_label", [0, 30], ids=["only positives", "only negatives"])
def test_a_row_that_is_not_finite_in_one_class_or_none(their_label, loss, ops, device, dtype):
    z, labels, bank, bank_labels = problem(20, 130, 16, dtype, device)
    labels.fill_(0), bank_labels.fill_(their_label)
    z[3, 2] = torch.nan
    value, grad, pairs = run_with_pairs(ops, z, labels, bank, bank_labels, loss)
    true_value, _, true_pairs = run_with_pairs(reference, z, labels, bank, bank_labels, loss)
    assert value.isnan() == true_value.isnan() and torch.equal(pairs.isnan(), true_pairs.isnan())
    assert grad[3].isnan().all() and grad[4:].isfinite().all()


def test_anchors_that_pay_next_to_nothing_count(ops, device, dtype):
    """SupCon averages over anchors with several pairs, however little float32 sees them pay."""
    centres = torch.eye(10, 16, dtype=torch.float64)
    for M in (90, 200, 1000):
        labels, bank_labels = torch.arange(10), torch.arange(M) % 10
        bank_labels[10:] = 10  # one positive for each anchor
        bank = torch.where((bank_labels < 10)[:, None], centres[bank_labels % 10], -torch.ones(16).double())
        z = centres.clone()
        z[9] = -torch.ones(16).double() / 4
        tensors = [t.to(device) for t in (z.to(dtype), labels, bank.to(dtype), bank_labels)]
        assert_right(ops, *tensors, SupCon(0.05))


@pytest.mark.singly
@only(dtype="f64")
@every_loss
def test_gradcheck(loss, ops, device, dtype):
    if isinstance(loss, (Circle, DCLW)):
        pytest.skip("its gradient takes factors for constants: the self-paced ones, or the positives' weights")
    z, labels, bank, bank_labels = problem(5, 40, 6, torch.float64, device, classes=4)
    anchors = loss_cases.clear_anchors(loss, z, labels, bank, bank_labels)
    assert anchors.sum() >= 4
    assert torch.autograd.gradcheck(
        lambda z: ops.memory_loss(z, labels, bank, bank_labels, loss, anchors=anchors), z.requires_grad_()
    )


@pytest.mark.singly
@each_kind_of_loss
def test_without_grad_the_value_is_the_same(loss, ops, device, dtype):
    z, *rest = problem(70, 500, 48, dtype, device)
    value, _ = run(ops.memory_loss, z, *rest, loss)
    with torch.no_grad():
        assert torch.equal(ops.memory_loss(z, *rest, loss), value)


@every_loss
def test_same_bits_on_any_number_of_threads(loss):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(run(cpu_ops.memory_loss, *problem(130, 5000, 33, torch.float32), loss))
    torch.set_num_threads(1)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.singly
@every_loss
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set(isa, loss, dtype, monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", isa)
    try:
        cpu_ops.moments(torch.ones(2, 2))
    except RuntimeError as lacking:
        pytest.skip(str(lacking))
    assert_right(cpu_ops, *problem(65, 257, 63, dtype), loss)


parameters = st.one_of(
    st.builds(SupCon, st.floats(0.01, 2)),
    st.builds(NTXent, st.floats(0.01, 2)),
    st.builds(
        MultiSimilarity, st.floats(0.1, 10), st.floats(0.5, 80), st.floats(-0.5, 1), st.none() | st.floats(0, 0.5)
    ),
    st.builds(Circle, st.floats(0, 0.6), st.floats(1, 128)),
    st.builds(DCLW, st.floats(0.01, 2), st.floats(0.05, 2)),
    st.builds(Triplet, st.floats(0, 1), st.sampled_from(["hardest", "all"])),
    st.builds(Triplet, st.floats(0, 1), soft=st.booleans(), distance=st.sampled_from(DISTANCES)),
    st.builds(
        Contrastive,
        st.floats(0, 1),
        st.floats(0.5, 1.8),
        st.sampled_from(["mean", "avg_nonzero"]),
        distance=st.sampled_from(DISTANCES),
    ),
    st.builds(Contrastive, st.floats(0.3, 1), st.floats(-0.3, 0.7), st.sampled_from(["mean", "avg_nonzero"])),
)


@settings(max_examples=120, deadline=None)
@given(
    loss=parameters,
    shape=st.tuples(st.integers(1, 80), st.integers(1, 300), st.integers(1, 40)),
    classes=st.integers(1, 30),
    skew=st.sampled_from([0.0, 0.35, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_parameters_labels_and_skews(loss, shape, classes, skew, dtype, seed):
    torch.manual_seed(seed)
    B, M, D = shape
    z, labels, bank, bank_labels = problem(B, M, D, dtype, classes=classes)
    labels[torch.rand(B) < skew] = 0
    bank_labels[torch.rand(M) < skew] = 0
    assert_right(cpu_ops, z, labels, bank, bank_labels, loss)
