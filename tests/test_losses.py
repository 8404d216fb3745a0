"""Every loss of ops.memory_loss, value and gradient: against the float64 reference and pytorch-metric-learning."""

import copy
import pickle

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
    clear_anchors,
    each_kind_of_loss,
    every_loss,
    few_losses,
    is_of_distance,
    problem,
    run,
    run_with_pairs,
)
from shapes import PAIRS, name
from state import NARROW_DTYPES

from xbn_ext import (
    DCL,
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
    reference,
)
from xbn_ext import ops as cpu_ops
from xbn_ext.losses import DISTANCES, KINDS
from xbn_ext.losses.learned import at
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


@only(way="composite")  # test_memory_loss has the others, which refuse
@each_kind_of_loss
@pytest.mark.parametrize("memory_dtype", NARROW_DTYPES, ids=str)
def test_16_bit_banks(memory_dtype, loss, ops, device, dtype):
    z, labels, bank, bank_labels = problem(65, 257, 63, dtype, device)
    scale, shift = (0.5 + torch.rand(63, dtype=torch.float64)).to(device), torch.randn(63).double().to(device) / 10
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


@pytest.mark.parametrize("loss", [Triplet(), Triplet(mining="all")], ids=lambda loss: loss.mining)
def test_triplets_of_infinite_similarities_touch_no_row(loss, ops, device, dtype):
    """Overflow: -inf exceeds nothing, so there is no hardest row to gather."""
    largest = torch.finfo(dtype).max
    z = torch.full((3, 2), largest, dtype=dtype, device=device)
    bank = torch.full((4, 2), -1.0, dtype=dtype, device=device) * 8
    labels, bank_labels = torch.zeros(3, dtype=torch.int64, device=device), torch.tensor([0, 1, 0, 1], device=device)
    value, grad = run(ops.memory_loss, z, labels, bank, bank_labels, loss, renormalize=False)
    assert not value.isfinite() or value == 0
    assert not grad.any()


# --- Distances --------------------------------------------------------------------------------------------


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


# --- All triplets -----------------------------------------------------------------------------------------


def assert_same_as_reference(ops, z, labels, bank, bank_labels, loss, **options):
    """Where an anchor has millions of triplets, some are always close to none: one more or less hardly matters then."""
    ours = run(ops.memory_loss, z, labels, bank, bank_labels, loss, **options)
    truth = run(reference.memory_loss, z.double(), labels, bank.double(), bank_labels, loss, **options)
    rtol = 1e-5 if z.dtype == torch.float32 else 1e-11
    for value, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=rtol * float(true.abs().max()))


@pytest.mark.long
@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
def test_more_positives_than_are_held_at_a_time(loss, ops, implementation, device, dtype):
    """Of 2100 and 1900 rows of a class, or 8200 and 800, in up to three rounds."""
    if implementation.name in ("emu", "plain") and dtype == torch.float64:
        pytest.skip("20 s; float32 goes the same way")
    B, M, rare = (1000, 4000, 1900) if implementation.name in ("cpu", "plain") else (1024, 9000, 800)
    z, labels, bank, bank_labels = problem(B, M, 4, dtype, device, classes=2)
    labels.copy_(torch.arange(B) % 2), bank_labels.copy_((torch.randperm(M) < rare).long())
    options = {"exclude": torch.randint(-1, M, (B,)).to(device), "anchors": torch.rand(B).to(device) < 0.6}
    count = torch.tensor(M - 100, device=device)
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss, count=count, **options)


@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("of_class", [20, 31, 32, 33, 34, 130, 300])
def test_few_and_many_positives(loss, of_class, ops, device, dtype):
    """Up to 32 are compared one by one on the CPU, more of them by bisection."""
    z, labels, bank, bank_labels = problem(70, 600, 16, dtype, device)
    bank_labels[torch.randperm(600)[:of_class]] = 50
    labels[3:20] = 50
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss)
    bank[100:200] = bank[200:300]  # equal similarities
    assert_same_as_reference(ops, z, labels, bank, bank_labels, loss)


def one_by_one(z, labels, bank, bank_labels, margin, count, bank_ids, exclude, anchors):
    """Value, gradient and pairs from all triplets `[B, positive, negative]`."""
    s = reference.similarity(z, bank[:count].to(z.dtype), renormalize=False)
    pair = anchors[:, None] & ((exclude[:, None] == -1) | (exclude[:, None] != bank_ids[:count]))
    positive = labels[:, None] == bank_labels[:count]
    cost = s[:, None, :] - s[:, :, None] + margin
    paying = (pair & positive)[:, :, None] & (pair & ~positive)[:, None, :] & ~(cost <= 0)
    value = torch.where(paying, cost, 0.0).sum() / paying.sum().clamp(min=1)
    (grad,) = torch.autograd.grad(value, z)
    pairs = torch.stack([paying.any(2).sum(), paying.any(1).sum()]).double() / anchors.sum().clamp(min=1)
    return value.detach(), grad, pairs


@pytest.mark.parametrize("loss", [Triplet(mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("margin", [0.0, 0.25, -0.5, -10.0, 50.0, 1e6])
@pytest.mark.parametrize("classes", [1, 2, 20, 200])
@pytest.mark.parametrize("nan", [True, False], ids=["nan", "finite"])
def test_all_triplets_are_what_going_through_them_finds(loss, margin, classes, nan, ops, device, dtype):
    """On numbers whose products and sums are exact: many similarities are equal, or just the margin apart."""
    loss = Triplet(margin, mining="all")
    for memory_dtype in (dtype, *NARROW_DTYPES):
        B, M, D = torch.randint(1, 100, (3,)).tolist()
        z, bank = (torch.randint(-3, 4, (n, D), device=device) / 4 for n in (B, M))
        if nan:
            z[torch.randint(B, ())] = torch.nan
        labels, bank_labels = (torch.randint(classes, (n,), device=device) for n in (B, M))
        options = {
            "count": torch.tensor(M - M // 8, device=device),
            "bank_ids": torch.randint(-3, 20, (M,), device=device),
            "exclude": torch.randint(-1, 20, (B,), device=device),
            "anchors": torch.rand(B, device=device) < 0.7,
        }
        z = z.to(dtype).requires_grad_()
        tensors = (z, labels, bank.to(memory_dtype), bank_labels)
        *truth, true_pairs = one_by_one(*tensors, margin, **options)
        for module in (ops, reference):
            *result, pairs = run_with_pairs(module, *tensors, loss, renormalize=False, **options)
            torch.testing.assert_close(pairs, true_pairs)
            rtol = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(result[0], truth[0], rtol=rtol, atol=rtol, equal_nan=True)
            if truth[0].isfinite():
                rows = z.isfinite().all(1)
                atol = rtol * max(1.0, float(truth[1][rows].abs().sum()))
                torch.testing.assert_close(result[1][rows], truth[1][rows], rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", [Triplet(0.2, mining="all")], ids=["triplet_all"])
@pytest.mark.parametrize("classes", [1, 2, 20])
@pytest.mark.parametrize("of", ["positive", "negative", "nobody"])
def test_a_bank_row_that_is_not_finite_makes_the_loss_nan(loss, classes, of, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 16, dtype, device, classes=classes)
    labels.fill_(0)
    bank_labels[7] = 0 if of == "positive" else 1 if classes > 1 else 0
    if of == "nobody":
        labels.fill_(30)
    bank[7, 3] = torch.nan
    value, _ = run(ops.memory_loss, z, labels, bank, bank_labels, loss)
    assert value.isnan() == reference.memory_loss(z, labels, bank, bank_labels, loss).isnan()
    assert value.isnan() == (of != "nobody" and classes > 1)


@pytest.mark.parametrize("their_label", [0, 30], ids=["only positives", "only negatives"])
def test_an_anchor_without_a_triplet_gets_nothing_from_rows_that_are_not_finite(their_label, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, 16, dtype, device)
    bank.fill_(torch.nan)
    value, grad = run(ops.memory_loss, z, labels.fill_(0), bank, bank_labels.fill_(their_label), Triplet(0.2))
    assert value == 0 and not grad.any()


@pytest.mark.singly
@only(dtype="f64")
@every_loss
def test_gradcheck(loss, ops, device, dtype):
    if isinstance(loss, Circle):
        pytest.skip("its gradient takes the self-paced factors for constants")
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


# --- A temperature that is learned ------------------------------------------------------------------------


def test_what_a_memory_begins_with_is_in_its_range():
    own = torch.nn.Parameter
    for loss, why in [
        (lambda: SupCon(own(torch.tensor(0.0))), "temperature must be positive"),
        (lambda: NTXent(torch.tensor(-0.1)), "temperature must be positive"),
        (lambda: SigLIP(bias=own(torch.tensor(torch.nan))), "bias must be a finite number"),
        (lambda: Margin(beta=torch.tensor(torch.inf)), "beta must be a finite number"),
        (lambda: SigLIP(bias=own(torch.tensor(-1e30))), "bias must be within"),
    ]:
        with pytest.raises(ValueError, match=why):
            CrossBatchMemory(loss(), 8, 16)
    CrossBatchMemory(SupCon(own(torch.empty((), device="meta"))), 8, 16)


@pytest.mark.parametrize(
    "loss, name",
    [
        (Contrastive, "pos_margin"),
        (Contrastive, "neg_margin"),
        (Margin, "margin"),
        (Margin, "beta"),
        (SigLIP, "bias"),
        (MultiSimilarity, "base"),
        (MultiSimilarity, "mining"),
        (Circle, "m"),
        (LiftedStructure, "pos_margin"),
        (Triplet, "margin"),
    ],
)
def test_a_number_beyond_those_of_similarities_is_refused(loss, name):
    """The loss was 0, infinite or NaN, and not the same with the kernels and without."""
    loss(**{name: 1e15})
    with pytest.raises(ValueError, match=rf"{name} must be within \[-1e15, 1e15\], got 1e\+38"):
        loss(**{name: 1e38})


@pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)
def test_a_loss_is_found_by_its_parameters(loss):
    """As an op is told of it, which looks at them itself."""
    again = loss.with_parameters(loss.parameters)
    assert type(again) is type(loss) and again.kind == loss.kind
    assert again.parameters == pytest.approx(loss.parameters, rel=1e-15)
    loss.with_parameters([1e300 for _ in loss.parameters])


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_gradient_of_the_temperature(loss, width, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, width, dtype, device)

    def run(function, z, bank, temperature):
        temperature = torch.tensor(temperature, dtype=z.dtype, device=device, requires_grad=True)
        z = z.clone().requires_grad_()
        value = function(z, labels, bank, bank_labels, loss(temperature))
        return [value.detach(), *torch.autograd.grad(value, (z, temperature))]

    results = run(ops.memory_loss, z, bank, 0.2)
    fixed = ops.memory_loss(z, labels, bank, bank_labels, loss(0.2))
    torch.testing.assert_close(results[0], fixed, rtol=1e-5, atol=0)
    for result, truth in zip(results, run(reference.memory_loss, z.double(), bank.double(), 0.2), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_learned_temperature_is_a_parameter_of_the_memory(loss):
    criterion = CrossBatchMemory(loss(torch.nn.Parameter(torch.tensor(0.5))), 8, 64)
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert copied.loss.temperature is copied.temperature is not criterion.temperature
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.05)
    step = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        step(torch.randn(24, 8), torch.randint(5, (24,))).backward()
        optimizer.step()
    assert criterion.temperature != 0.5 and criterion.temperature.isfinite()
    criterion.fill_from([(torch.randn(24, 8), torch.randint(5, (24,)))])
    assert criterion.loss.temperature is criterion.temperature


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_parameter_that_replaces_the_temperature_is_the_one_that_counts(loss):
    def memory(temperature):
        return CrossBatchMemory(loss(torch.nn.Parameter(torch.tensor(temperature))), 8, 64)

    x, labels = torch.randn(24, 8), torch.randint(5, (24,))
    other = memory(0.2)
    other(x, labels)
    state = copy.deepcopy(other.state_dict())
    expected = other(x, labels)
    assigned, emptied = memory(0.5), memory(0.5).to("meta").to_empty(device="cpu")
    assigned.load_state_dict(copy.deepcopy(state), assign=True)
    emptied.load_state_dict(state)
    for criterion in (assigned, emptied):
        assert criterion.loss.temperature is criterion.temperature
        value = criterion(x, labels)
        value.backward()
        assert torch.equal(value, expected) and criterion.temperature.grad != 0
    called = memory(0.5)
    called.load_state_dict(state | {"temperature": called.temperature.detach()})
    value = torch.func.functional_call(called, {"temperature": torch.tensor(0.2)}, (x, labels))
    assert torch.equal(value, expected)


# --- A bias or a boundary that is learned -----------------------------------------------------------------


def learned(kind, dtype, device, shape=()):
    """A loss, and what it learns."""
    own = [torch.full(shape, x, dtype=dtype, device=device).requires_grad_() for x in (0.3, -1.5, 0.45)]
    loss = SigLIP(*own[:2]) if kind == "siglip" else Margin(0.3, own[2])
    return loss, own[:2] if kind == "siglip" else own[2:]


@pytest.mark.parametrize("kind", ["siglip", "margin"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_of_an_offset(kind, renormalize, width, ops, device, dtype):
    z, labels, bank, bank_labels = problem(70, 500, width, dtype, device)
    anchors, options = torch.rand(70, device=device) < 0.8, {"renormalize": renormalize}

    def run(module, z, bank, shape):
        loss, own = learned(kind, z.dtype, device, shape)
        z = z.clone().requires_grad_()
        value = module.memory_loss(z, labels, bank, bank_labels, loss, anchors=anchors, **options)
        value = value + 2 * module.batch_loss(z, labels, loss, anchors=anchors, **options)
        return [value.detach(), *(g.reshape(-1) for g in torch.autograd.grad(value, (z, *own)))]

    truth = run(reference, z.double(), bank.double(), ())
    for shape in ((), (1,)):
        for result, true in zip(run(ops, z, bank, shape), truth, strict=True):
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            largest = float(true.abs().max())
            torch.testing.assert_close(result.double(), true, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["siglip", "margin"])
def test_a_memory_learns_an_offset(kind):
    loss, own = learned(kind, torch.float64, "cpu")
    names = [name for name in type(loss).may_be_learned]
    parameters = {name: torch.nn.Parameter(t.detach().clone()) for name, t in zip(names, own, strict=True)}
    memory = CrossBatchMemory(at(loss, **parameters), 12, 50, memory_dtype=torch.float64)
    truth = reference.Memory.empty(50, 12)
    assert [name for name, _ in memory.named_parameters()] == names
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in (memory.parameters(), own)]
    for _ in range(4):
        x, labels = torch.randn(16, 12, dtype=torch.float64), torch.randint(6, (16,))
        expected = reference.step(truth, x, labels, loss)
        value = memory(x, labels)
        for optimizer, v in zip(optimizers, (value, expected), strict=True):
            optimizer.zero_grad()
            v.backward()
            optimizer.step()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(list(memory.parameters()), own, check_dtype=False)
    memory.eval()
    with torch.no_grad():
        torch.testing.assert_close(memory(x, labels), CrossBatchMemory.__call__(copy.deepcopy(memory), x, labels))
    memory.reset_parameters()
    assert float(getattr(memory, names[-1]).detach()) == pytest.approx(-1.5 if kind == "siglip" else 0.45)


def test_one_op_has_no_gradient_for_an_offset():
    loss, _ = learned("margin", torch.float32, "cpu")
    memory = CrossBatchMemory(Margin(), 8, 50)
    with pytest.raises(TypeError, match="step_: this op has no gradient for a beta that is learned"):
        cpu_ops.step_(memory, torch.randn(4, 8), torch.arange(4), loss)
    with torch.no_grad():
        cpu_ops.step_(memory, torch.randn(4, 8), torch.arange(4), loss)


@pytest.mark.parametrize("kind", ["siglip", "margin"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_offset_that_is_not_finite_leaves_the_memory_alone(kind, number):
    loss, _ = learned(kind, torch.float32, "cpu")
    name = loss.offset
    for value in (torch.nn.Parameter(torch.tensor(0.1)), torch.tensor(0.1)):
        memory = CrossBatchMemory(
            at(loss, temperature=0.1, bias=value) if kind == "siglip" else at(loss, beta=value), 8
        )
        batch = torch.randn(6, 8), torch.arange(6) % 2
        memory(*batch)
        before = {name: tensor.clone() for name, tensor in memory.named_state()}
        value.data.fill_(number)
        with pytest.raises(ValueError, match=f"{name} must be a finite number, got {number}"):
            memory(*batch)
        torch.testing.assert_close(dict(memory.named_state()), before, rtol=0, atol=0, equal_nan=True)
    memory = CrossBatchMemory(at(memory.loss, **{name: torch.empty((), device="meta")}), 8)
    with pytest.raises(ValueError, match=f"{name} is on the meta device, which holds no values"):
        memory(*batch)


@pytest.mark.parametrize("first", ["x", "temperature", "bias"])
@pytest.mark.parametrize("second", ["x", "temperature", "bias"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_no_second_derivative_is_left_out(first, second, weights):
    """Not even one by what the first was not by."""
    loss = SigLIP(torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Parameter(torch.tensor(-1.0)))
    memory = CrossBatchMemory(loss, 8, 20, batch_weight=weights[0], memory_weight=weights[1])
    x, labels = torch.randn(6, 8, requires_grad=True), torch.arange(6) % 2
    memory(x, labels)
    by = {"x": x, **dict(memory.named_parameters())}
    (grad,) = torch.autograd.grad(memory(x, labels), by[first], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.grad(grad.sum(), by[second], allow_unused=True)


def test_an_offset_has_no_forward_mode_derivative():
    z, labels, bank, bank_labels = problem(4, 10, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(-1.0), torch.tensor(1.0))
        for function, given in ((cpu_ops.memory_loss, (bank, bank_labels)), (cpu_ops.batch_loss, ())):
            for loss in (SigLIP(0.1, dual), Margin(0.1, dual)):
                with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                    function(z, labels, *given, loss)


# --- What cannot be learned -------------------------------------------------------------------------------


def test_a_learned_temperature_that_is_no_parameter():
    with pytest.raises(ValueError, match=r"must be an nn\.Parameter to be learned"):
        CrossBatchMemory(SupCon(torch.tensor(0.0, requires_grad=True).exp()), 8, 64)
    with torch.autograd.forward_ad.dual_level():
        temperature = torch.autograd.forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            cpu_ops.memory_loss(*problem(3, 4, 5, torch.float32), SupCon(temperature))
    learned = CrossBatchMemory(SupCon(torch.nn.Parameter(torch.tensor(0.5))), 8, 64)
    trained = CrossBatchMemory(SupCon(), 8, 64)
    trained(torch.randn(5, 8), torch.arange(5))
    with pytest.raises(RuntimeError, match="temperature"):
        learned.load_state_dict(trained.state_dict())
    assert torch.equal(learned.bank, trained.bank), "as everywhere in torch, what is known has been loaded by then"


@pytest.mark.parametrize("temperature", [torch.ones(2), torch.tensor(1), torch.ones(1, 1), torch.ones(0)], ids=str)
def test_a_temperature_of_several_elements_or_dimensions(temperature):
    with pytest.raises(ValueError, match=r"temperature must be a number or a floating-point tensor \[\] or \[1\]"):
        SupCon(temperature)


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_temperature_of_one_element_is_a_number(loss):
    """FSDP2 shards no scalars."""
    z, labels, bank, bank_labels = problem(9, 40, 5, torch.float64)
    values, gradients = [], []
    for shape in ((), (1,)):
        temperature = torch.nn.Parameter(torch.full(shape, 0.3, dtype=torch.float64))
        value = cpu_ops.memory_loss(z, labels, bank, bank_labels, loss(temperature))
        value = value + cpu_ops.batch_loss(z, labels, loss(temperature))
        assert value.dim() == 0
        value.backward()
        values.append(value), gradients.append(temperature.grad.reshape(()))
    assert torch.equal(*values) and torch.equal(*gradients) and gradients[0] != 0


# --- What training code relies on ---------------------------------------------------------------------------


@pytest.mark.singly
@each_kind_of_loss
def test_deterministic_algorithms_and_accumulated_gradients(loss, ops, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
    torch.use_deterministic_algorithms(True)
    try:
        z, *rest = problem(40, 300, 16, torch.float32, device)
        z.requires_grad_()
        ops.memory_loss(z, *rest, loss).backward()
        once = z.grad.clone()
        (0.5 * ops.memory_loss(z, *rest, loss)).backward()
        assert torch.equal(z.grad, once + 0.5 * once)
        criterion = CrossBatchMemory(loss, 16, 64).to(device)
        for _ in range(3):
            criterion(z, rest[0]).backward()
    finally:
        torch.use_deterministic_algorithms(False)


@each_kind_of_loss
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_16_bit_embeddings_and_autocast(loss, low):
    """Computed in float32 on the embeddings as they are; the gradient comes back in their dtype."""
    x, labels = torch.randn(24, 16), torch.randint(5, (24,))
    plain, narrow = CrossBatchMemory(loss, 16, 64), CrossBatchMemory(loss, 16, 64)
    for _ in range(3):
        rounded = x.to(low).requires_grad_()
        expected = plain(x.to(low).float(), labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = narrow(rounded, labels)
        assert value.dtype == torch.float32 and torch.equal(value, expected)
        value.backward()
        assert rounded.grad.dtype == low


# --- pytorch-metric-learning ----------------------------------------------------------------------------


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
        case DCL():
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


# --- The whole step ---------------------------------------------------------------------------------------


@pytest.mark.singly
@only(dtype="f64")  # over many steps no other agrees pair by pair
@every_loss
@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_step_is_the_reference_step(loss, update, enqueue, ops, device, dtype):
    ours = CrossBatchMemory(loss, 12, 50, update=update, enqueue=enqueue, memory_dtype=torch.float64).to(device)
    truth = reference.Memory.empty(50, 12)
    centres = torch.randn(6, 12, dtype=torch.float64)
    for _ in range(6):
        labels = torch.randint(6, (16,))
        x = (centres[labels] + torch.randn(16, 12)).requires_grad_()
        (expected_grad,) = torch.autograd.grad(
            expected := reference.step(truth, x, labels, loss, update=update, enqueue=enqueue), x
        )
        y = x.detach().to(device).requires_grad_()
        value = ours(y, labels.to(device))
        value.backward()
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(y.grad.cpu(), expected_grad, rtol=1e-8, atol=1e-10)


@few_losses
def test_compiles_without_a_break_and_trains_to_the_same_numbers(loss):
    def train(compiled):
        torch.manual_seed(0)
        network = torch.nn.Linear(10, 8)
        criterion = CrossBatchMemory(loss, 8, 64)
        step = lambda x, y: criterion(network(x), y)  # noqa: E731
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        values = []
        for _ in range(5):
            x, y = torch.randn(24, 10), torch.randint(5, (24,))
            value = step(x, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.detach())
        return torch.stack([*values, *(p.sum().detach() for p in network.parameters())])

    torch._dynamo.reset()
    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-6)


@each_kind_of_loss
def test_opcheck(loss):
    z, labels, bank, bank_labels = problem(5, 11, 7, torch.float32)
    args = (labels, bank, bank_labels, *[None] * 6, loss.kind, loss.parameters, True, 1e-6, True)
    torch.library.opcheck(torch.ops.xbn_ext.memory_loss.default, (z.requires_grad_(), *args))
