"""CrossBatchMemory against reference.step, and what a training loop expects of it."""

import copy
import dataclasses
import io
import itertools
import pickle
import shutil
from fractions import Fraction

import numpy as np
import pytest
import state
import torch
import torch.nn.functional as F
from conftest import only
from own_losses import Exponents
from torch import nn

import xbn_ext
from xbn_ext import Contrastive, CrossBatchMemory, SigLIP, SmoothAP, SupCon, reference
from xbn_ext.dtypes import MEMORY_DTYPES
from xbn_ext.losses import PairLoss

B, M, D = 24, 100, 16
STATE = [f.name for f in dataclasses.fields(reference.Memory)]


def batches(n, dtype=torch.float32, size=B, device="cpu"):
    """Embeddings of a network that drifts."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(6, D, generator=generator)
    for t in range(n):
        labels = torch.randint(6, (size,), generator=generator)
        x = centres[labels] + torch.randn(size, D, generator=generator)
        x = x * (1 + 0.02 * t) + 0.05 * t
        yield x.to(dtype).to(device), labels.to(device)


def memory_of(criterion):
    return reference.Memory(**{name: getattr(criterion, name) for name in STATE})


def train(criterion, data, **call):
    losses = []
    for x, labels in data:
        x = x.clone().requires_grad_()
        loss = criterion(x, labels, **call)
        loss.backward()
        losses.append((loss.detach(), x.grad))
    return losses


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


OF_EACH_WAY = {
    "one op": lambda: Contrastive(0.95, 0.3),
    "a learned temperature": lambda: SupCon(nn.Parameter(torch.tensor(0.2, dtype=torch.float64))),
    "a temperature that is a tensor": lambda: SupCon(torch.tensor(0.2, dtype=torch.float64)),
    "a learned bias": lambda: SigLIP(bias=nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))),
    "of one's own": Exponents,
    "in chunks": SmoothAP,
}


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


@pytest.mark.parametrize("make", OF_EACH_WAY.values(), ids=OF_EACH_WAY)
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "plain"])
def test_a_key_that_is_not_finite_is_as_if_it_were_not_there(make, centred, device):
    """It is not stored, and in no pair: loss and gradients are those of the others, also of what is learned."""
    *stored, (x, labels) = batches(4, torch.float64, device=device)
    mask = torch.arange(len(x), device=device) % 2 == 1
    results = []
    for there in (True, False):
        criterion = CrossBatchMemory(
            make(), D, M, memory_dtype=torch.float64, batch_weight=0.0, center_gradient=centred
        ).to(device)
        for rows, their_labels in stored:
            criterion(rows, their_labels)
        criterion.zero_grad()
        rows = torch.arange(len(x), device=device)
        given = x.clone()
        given[3] = torch.nan
        rows = rows if there else rows[rows != 3]
        given = given[rows].requires_grad_()
        value = criterion(given, labels[rows], enqueue_mask=mask[rows])
        value.backward()
        results.append([value.detach(), given.grad[~mask[rows]], [p.grad for p in criterion.parameters()]])
    assert results[0][0].isfinite()
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", OF_EACH_WAY.values(), ids=OF_EACH_WAY)
def test_a_row_that_is_not_finite_teaches_nothing_while_the_memory_takes_no_part(make, device):
    criterion = CrossBatchMemory(make(), D, M, batch_weight=0.0, warmup_steps=2).to(device)
    x = torch.randn(B, D, device=device)
    x[1, 1] = torch.inf
    value = criterion(x.requires_grad_(), torch.arange(B, device=device) % 3)
    value.backward()
    assert value == 0 and all(p.grad is None or (p.grad == 0).all() for p in criterion.parameters())


@pytest.mark.parametrize("make", [make for name, make in OF_EACH_WAY.items() if "learned" in name])
@pytest.mark.parametrize("batch_weight", [0.0, 1.0])
def test_a_loss_that_is_not_finite_has_no_finite_gradient_of_what_is_learned(make, batch_weight, device):
    """So a gradient scaler skips the step, also that of an optimizer that has nothing else."""
    criterion = CrossBatchMemory(make(), D, M, memory_dtype=torch.float64, batch_weight=batch_weight).to(device)
    for x, labels in batches(4, torch.float64, device=device):
        criterion(x, labels)
    x, labels = x.clone(), labels.clone()
    x[1, 1] = torch.nan
    value = criterion(x.requires_grad_(), labels)
    value.backward()
    assert value.isnan() and all(p.grad.isnan() for p in criterion.parameters())


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


@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_a_resumed_run_continues_bit_for_bit(update, device):
    options = {"drift": "axbn", "update": update, "warmup_steps": 2}
    data = list(batches(20, device=device))
    straight = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
    expected = train(straight, data)
    for stop in (1, 7, 13):
        first = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
        train(first, data[:stop])
        second = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
        second.load_state_dict(first.state_dict())
        for (value, grad), (want, want_grad) in zip(train(second, data[stop:]), expected[stop:], strict=True):
            assert torch.equal(value, want) and torch.equal(grad, want_grad)
        for name, tensor in straight.state_dict().items():
            assert torch.equal(second.state_dict()[name], tensor), name


def test_what_is_no_batches_is_named():
    with pytest.raises(TypeError, match="batches must be iterable, got NoneType"):
        CrossBatchMemory(Contrastive(), D, M).fill_from(None)


def test_all_state_is_in_the_state_dict():
    assert set(CrossBatchMemory(Contrastive(), D, M).state_dict()) == set(STATE)


@pytest.mark.parametrize("options", [{}, {"update": "deferred"}, {"memory_dtype": torch.bfloat16}], ids=str)
def test_copies_are_independent(options, device):
    """Taken in the middle of a full ring."""
    data = list(batches(8, device=device))
    original = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, **options).to(device)
    train(original, data[:5])
    assert original.count == M and original.head == 20
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    copies = [
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        torch.load(file, weights_only=False),
        copy.deepcopy(original).to(torch.float16).to("cpu").to(device),
    ]
    expected = train(original, data[5:])
    for other in copies:
        assert int(other.step) == 5
        for (value, grad), (want, want_grad) in zip(train(other, data[5:]), expected, strict=True):
            assert torch.equal(value, want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("enqueue", ["after", "before"])
def test_accumulated_gradients(update, enqueue, device):
    """The memory may move on between a loss and its backward."""
    network = torch.nn.Linear(D, D).to(device)
    gradients = []
    for at_once in (True, False):
        criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update=update, enqueue=enqueue).to(device)
        network.zero_grad()
        losses = []
        for x, labels in batches(4, device=device):
            losses.append(criterion(network(x), labels) / 4)
            if not at_once:
                losses.pop().backward()
        if at_once:
            torch.stack(losses).sum().backward()
        gradients.append(network.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_the_pending_map_counts_whatever_the_update(device):
    deferred = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update="deferred").to(device)
    train(deferred, batches(9, device=device))
    inplace = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device)
    inplace.load_state_dict(deferred.state_dict())
    x, labels = next(batches(1, device=device))
    assert torch.equal(deferred.eval()(x, labels), inplace.eval()(x, labels))
    a, b = train(deferred.train(), batches(3, device=device)), train(inplace.train(), batches(3, device=device))
    for (value, grad), (want, want_grad) in zip(a, b, strict=True):
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(grad, want_grad)


def test_a_state_that_does_not_fit_is_refused_whole(device):
    trained, other = (CrossBatchMemory(Contrastive(), D, size).to(device) for size in (M, M + 1))
    train(trained, batches(3, device=device))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"bank must be \[101, 16\].* memory_size=101"):
        other.load_state_dict(trained.state_dict())
    partial = {k: v for k, v in trained.state_dict().items() if k != "head"}
    with pytest.raises(RuntimeError, match="head"):
        other.load_state_dict(partial)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_half_keeps_the_state_exact(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    train(criterion, batches(5, device=device))
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    criterion.half().double().bfloat16()
    for name, tensor in criterion.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("batch_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batches_of_another_dtype_do_not_change_the_bank(batch_dtype, device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    for x, labels in batches(3, batch_dtype, device=device):
        x.requires_grad_()
        loss = criterion(x, labels)
        loss.backward()
        assert x.grad.dtype == batch_dtype and loss.isfinite()
    assert criterion.bank.dtype == torch.float32


def test_autocast_changes_nothing(device):
    plain, cast = (CrossBatchMemory(Contrastive(), D, M).to(device) for _ in range(2))
    for x, labels in batches(4, device=device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = cast(x, labels)
        assert torch.equal(value, plain(x, labels))


def test_eval_mode_only_reads(device):
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.1), D, M, enqueue="before").to(device)
    train(criterion, batches(5, device=device))
    criterion.eval()
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    x, labels = next(batches(1, device=device))
    assert criterion(x, labels) > 0
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_warm_up_fills_but_does_not_count(device):
    data = list(batches(6, device=device))
    batch_only = train(CrossBatchMemory(Contrastive(), D, M, memory_weight=0.0).to(device), data)
    criterion = CrossBatchMemory(Contrastive(), D, M, warmup_steps=4).to(device)
    warming = train(criterion, data)
    for t, ((value, _), (want, _)) in enumerate(zip(warming, batch_only, strict=True)):
        assert torch.equal(value, want) == (t < 4)
    assert criterion.count == M


def test_reset_queue_is_a_new_start(device):
    data = list(batches(6, device=device))
    criterion = CrossBatchMemory(Contrastive(), D, M, update="deferred").to(device)
    first = train(criterion, data)
    criterion.reset_queue()
    assert criterion.embedding_memory.shape == (0, D) and criterion.label_memory.shape == (0,)
    for (value, grad), (want, want_grad) in zip(train(criterion, data), first, strict=True):
        assert torch.equal(value, want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_fill_from(update, device):
    data = list(batches(3, device=device))
    criterion = CrossBatchMemory(Contrastive(), D, M, update=update).to(device)
    train(criterion, data)
    criterion.fill_from(data)
    rows = F.normalize(torch.cat([x for x, _ in data]), dim=1)
    torch.testing.assert_close(criterion.embedding_memory, rows)
    assert torch.equal(criterion.label_memory, torch.cat([y for _, y in data]))
    mean, std = criterion.target_moments
    torch.testing.assert_close(mean.float(), rows.mean(0))
    torch.testing.assert_close(std.float(), rows.std(0, correction=0))
    assert criterion.step == 3 and criterion.variance == 0
    assert all(criterion.stats()[name].isnan() for name in ("positives", "gap_before", "gain")), "of what was replaced"
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    with pytest.raises(ValueError, match="embeddings must be"):
        criterion.fill_from([data[0], (data[0][0][:, 1:], data[0][1])])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    for odd, message in {
        (data[0][0],): "got a tuple of 1",
        (*data[0], data[0][1], 1): "got a tuple of 4",
        "ab": "got a str",
    }.items():
        with pytest.raises(ValueError, match=f"batches must yield .*embeddings, labels, ids.*, {message}"):
            criterion.fill_from([data[0], odd])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    criterion.fill_from([[criterion.embedding_memory, criterion.label_memory]])  # lists, as a DataLoader has them
    torch.testing.assert_close(criterion.embedding_memory, rows)
    train(criterion, data)
    assert criterion.count == M


@pytest.mark.parametrize("drift", ["xbn", "axbn", "ema"])
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_the_memory_has_the_target_moments(drift, update, device):
    criterion = CrossBatchMemory(
        Contrastive(), D, 21 * B, drift=drift, update=update, normalize_embeddings=False, memory_dtype=torch.float64
    ).to(device)
    train(criterion, batches(20, device=device))
    x, labels = next(batches(1, device=device))
    criterion(x + 1, labels)
    mean, std = criterion.target_moments
    rows = criterion.embedding_memory[: 20 * B]  # without those of this batch, which came after the move
    torch.testing.assert_close(rows.mean(0), mean)
    torch.testing.assert_close(rows.std(0, correction=0), std)
    if drift == "xbn":
        torch.testing.assert_close(mean, (x + 1).double().mean(0))


@pytest.mark.parametrize("update", ["inplace", "deferred"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_never_count(bad, update, device):
    clean, dirty = (CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, update=update).to(device) for _ in range(2))
    for x, labels in batches(10, device=device):
        value = clean(x, labels)
        spoilt, spoilt_labels = torch.cat([x, x[:2]]), torch.cat([labels, labels[:2]])
        spoilt[B:, 3] = bad
        assert value.isfinite() and dirty(spoilt, spoilt_labels).isnan()
        state.assert_same_state(memory_of(dirty), memory_of(clean), rtol=0, atol=0)
    x, labels = next(batches(1, device=device))
    assert torch.equal(clean(x, labels), dirty(x, labels))


def test_a_gradient_scaler_skips_the_step(device):
    network = torch.nn.Linear(D, D).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type)
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device)
    weights = network.weight.detach().clone()
    x, labels = next(batches(1, device=device))
    x[0, 0] = torch.inf
    scaler.scale(criterion(network(x), labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.weight, weights) and scaler.get_scale() < 65536
    assert criterion.bank.isfinite().all() and criterion.count == B - 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_gradient_of_a_row_that_is_not_finite_is_nan(bad, device):
    """A gradient scaler sees gradients only, also where neither normalisation nor the batch loss spreads the NaN."""
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M, normalize_embeddings=False, batch_weight=0.0)
    criterion.to(device)
    train(criterion, batches(3, device=device))
    x, labels = next(batches(1, device=device))
    x[2, 3] = bad
    x.requires_grad_()
    value = criterion(x, labels)
    value.backward()
    finite = torch.arange(B, device=device) != 2
    assert value.isnan() and x.grad[2].isnan().all() and x.grad[finite].isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_without_a_memory_loss_has_no_pairs(compiled):
    """What stats() says is of the last step."""
    torch._dynamo.reset()
    criterion = CrossBatchMemory(Contrastive(neg_margin=0.2), D, M)
    step = torch.compile(criterion, backend="aot_eager", fullgraph=True) if compiled else criterion
    seen = []
    for weight, (x, labels) in zip((1, 1, 0, 1), batches(4), strict=True):
        criterion.memory_weight = weight
        step(x, labels)
        seen.append(float(criterion.stats()["positives"]))
    assert seen[0] == 0 and seen[1] > 0 and np.isnan(seen[2]) and seen[3] > 0


@pytest.mark.parametrize("size", [1e-4, 1e30])
def test_embeddings_of_any_length(size, device):
    plain, other = (CrossBatchMemory(Contrastive(neg_margin=0.2), D, M).to(device) for _ in range(2))
    for x, labels in batches(3, device=device):
        a, b = x.clone().requires_grad_(), (size * x).requires_grad_()
        plain(a, labels).backward()
        other(b, labels).backward()
        torch.testing.assert_close(size * b.grad, a.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.bank, plain.bank, rtol=1e-4, atol=1e-5)


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


@only(compiled=True)  # the emulated ops have no fake kernels
@pytest.mark.parametrize("backend", ["inductor", pytest.param("aot_eager", marks=pytest.mark.long)])
@pytest.mark.parametrize("enqueue", ["after", pytest.param("before", marks=pytest.mark.long)])
def test_fullgraph_compile(enqueue, backend, device):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    loss, options = Contrastive(neg_margin=0.2), {"warmup_steps": 2, "enqueue": enqueue}
    plain, compiled = (CrossBatchMemory(loss, D, M, **options).to(device) for _ in range(2))
    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    for x, labels in batches(5, device=device):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        call = {"ids": torch.randint(-2, 30, (B,), device=device), "enqueue_mask": labels % 3 == 0}
        value, want = fast(a, labels, **call), plain(b, labels, **call)
        value.backward(), want.backward()
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(a.grad, b.grad)
    state.assert_same_state(memory_of(compiled), memory_of(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.stats(), plain.stats())
    assert all(number.isfinite() for number in plain.stats().values())


@pytest.mark.parametrize("way", ["one op", "a learned temperature"])
def test_a_centred_gradient_compiles(way):
    torch._dynamo.reset()
    plain, compiled = (CrossBatchMemory(OF_EACH_WAY[way](), D, M, center_gradient=True) for _ in range(2))
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x, labels in batches(3):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, want = fast(a, labels), plain(b, labels)
        value.backward(), want.backward()
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(a.grad, b.grad)


X, Y = torch.randn(B, D), torch.arange(B)
BAD_CALLS = [
    ((X[0], Y), {}, ValueError, "embeddings must be"),
    ((X[:, 1:], Y), {}, ValueError, "embeddings must be .*embedding_size=16"),
    ((X.long(), Y), {}, TypeError, "embeddings must be a floating-point tensor, got torch.int64"),
    (([[1.0]], Y), {}, TypeError, "embeddings must be .*list"),
    ((X, Y.float()), {}, TypeError, "labels must be an integer tensor"),
    ((X, Y > 3), {}, TypeError, "labels must be an integer tensor"),
    ((X, Y.to(torch.uint64)), {}, TypeError, "labels must be of a dtype that int64 holds, got torch.uint64"),
    ((X, Y[1:]), {}, ValueError, r"labels must be \[B=24\]"),
    ((X, Y[:, None]), {}, ValueError, "labels must be"),
    ((X, Y), {"ids": Y.float()}, TypeError, "ids must be an integer tensor"),
    ((X, Y), {"ids": Y[1:]}, ValueError, r"ids must be \[B=24\]"),
    ((X, Y), {"ids": Y.to("meta")}, ValueError, "ids is on meta"),
    ((X, Y), {"ids": Y.to(torch.uint64)}, TypeError, "ids must be of a dtype that int64 holds, got torch.uint64"),
    ((X, Y, (Y, Y, Y)), {}, ValueError, "indices_tuple must be None: .*mining="),
    ((X, Y, Y > 3), {}, ValueError, "indices_tuple must be None: .*enqueue_mask="),
    ((X.to_sparse(), Y), {}, TypeError, "embeddings must be a floating-point tensor, got torch.float32, torch.sparse"),
    ((torch.nested.nested_tensor(list(X)), Y), {}, TypeError, "embeddings must be .*, got torch.float32, nested"),
    ((X, Y.to_sparse()), {}, TypeError, "labels must be an integer tensor, got torch.int64, torch.sparse_coo"),
    ((X, Y), {"ids": Y.to_sparse()}, TypeError, "ids must be an integer tensor, got torch.int64, torch.sparse_coo"),
    ((X, torch.quantize_per_tensor(X[:, 0], 1, 0, torch.qint32)), {}, TypeError, "labels must be .* got torch.qint32"),
    ((X, Y), {"enqueue_mask": Y}, TypeError, "enqueue_mask must be a bool tensor"),
    ((X, Y), {"enqueue_mask": Y[1:] > 3}, ValueError, "enqueue_mask must be"),
    ((X.to("meta"), Y), {}, ValueError, "embeddings is on meta, the memory on cpu"),
    ((X, Y.to("meta")), {}, ValueError, "labels is on meta"),
]


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


@pytest.mark.parametrize("args, kwargs, error, message", BAD_CALLS, ids=[m for *_, m in BAD_CALLS])
def test_bad_calls_change_nothing(args, kwargs, error, message):
    criterion = CrossBatchMemory(Contrastive(), D, M)
    train(criterion, batches(3))
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    with pytest.raises(error, match=message):
        criterion(*args, **kwargs)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


@pytest.mark.parametrize(
    "options, error",
    [
        ({"loss": torch.nn.MSELoss()}, TypeError),
        ({"embedding_size": 0}, ValueError),
        ({"memory_size": 0}, ValueError),
        ({"memory_size": 2.5}, ValueError),
        ({"drift": "kalman"}, ValueError),
        ({"update": "lazy"}, ValueError),
        ({"enqueue": "never"}, ValueError),
        ({"process_noise": -1.0}, ValueError),
        ({"measurement_noise": 0.0}, ValueError),
        ({"ema_momentum": 0.0}, ValueError),
        ({"warmup_steps": -1}, ValueError),
        ({"memory_dtype": torch.int32}, ValueError),
        ({"update": "inplace", "memory_dtype": torch.float16}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"eps": float("inf")}, ValueError),
        ({"batch_weight": float("nan")}, ValueError),
        ({"batch_weight": None}, ValueError),
        ({"batch_weight": 10**400}, ValueError),
        ({"batch_weight": 1e39}, ValueError),
        ({"memory_weight": "1"}, ValueError),
        ({"process_noise": "a"}, ValueError),
        ({"process_noise": float("inf")}, ValueError),
        ({"measurement_noise": [1.0]}, ValueError),
        ({"ema_momentum": "0.1"}, ValueError),
        ({"eps": "a"}, ValueError),
        ({"eps": 1e300}, ValueError),
        ({"renormalize": "false"}, ValueError),
        ({"center_gradient": 1}, ValueError),
        ({"normalize_embeddings": 1}, ValueError),
        ({"warmup_steps": 10**30}, ValueError),
        ({"embedding_size": "16"}, ValueError),
        ({"warmup_steps": None}, ValueError),
        ({"loss": PairLoss()}, TypeError),
        ({"loss": Contrastive}, TypeError),
        ({"batch_weight": 0.0, "memory_weight": 0.0}, ValueError),
    ],
)
def test_bad_options_are_named(options, error):
    arguments = {"loss": Contrastive(), "embedding_size": D, "memory_size": M} | options
    with pytest.raises(error, match=next(iter(options))):
        CrossBatchMemory(**arguments)


@pytest.mark.parametrize(
    "option, value",
    [
        ("batch_weight", None),
        ("batch_weight", float("nan")),
        ("memory_weight", "1"),
        ("memory_weight", -1.1e15),
        ("memory_weight", torch.tensor(0.5)),
        ("warmup_steps", "2"),
        ("warmup_steps", 2**70),
        ("normalize_embeddings", "false"),
        ("renormalize", "false"),
        ("center_gradient", None),
        ("update", "lazy"),
        ("update", None),
        ("enqueue", "befor"),
        ("eps", 0.0),
        ("eps", 1e31),
        ("warmup_steps", True),
    ],
)
def test_an_option_that_is_set_is_checked_like_one_that_is_given(option, value):
    """A step raised half way, with the filter moved and the batch stored; or the memory took no more rows."""
    criterion = CrossBatchMemory(Contrastive(), D, M)
    before = getattr(criterion, option)
    with pytest.raises(ValueError, match=f"{option} must be "):
        setattr(criterion, option, value)
    assert getattr(criterion, option) == before
    setattr(criterion, option, before)


def test_a_16_bit_memory_is_not_set_to_be_rounded_at_every_step():
    criterion = CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16)
    for one in (criterion, copy.deepcopy(criterion)):
        with pytest.raises(ValueError, match=r"update='inplace' would round a memory of torch\.float16"):
            one.update = "inplace"
    CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16, drift="none").update = "inplace"


def test_the_positions_of_pytorch_metric_learning():
    x, labels = next(batches(1))
    mask = labels % 2 == 0
    calls = [((), {"enqueue_mask": mask}), ((None, mask), {}), ((None,), {"enqueue_mask": mask}),
             ((), {"indices_tuple": None, "enqueue_mask": mask})]  # fmt: skip
    values = [CrossBatchMemory(Contrastive(), D, M)(x, labels, *args, **named) for args, named in calls]
    assert all(torch.equal(value, values[0]) for value in values)
    plain = [CrossBatchMemory(Contrastive(), D, M)(x, labels, *args) for args in ((), (None,), (None, None))]
    assert all(torch.equal(value, plain[0]) for value in plain) and plain[0] != values[0]


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_of_the_memory_may_be_a_batch(normalize, device):
    """What is given is read before it is overwritten."""
    given, copied = (
        CrossBatchMemory(Contrastive(), D, M, normalize_embeddings=normalize, drift="xbn").to(device) for _ in range(2)
    )
    for criterion in (given, copied):
        train(criterion, batches(5, device=device), ids=torch.arange(B, device=device))
    assert given.head == 20
    rows = given.bank[18 : 18 + B], given.bank_labels[18 : 18 + B]
    ids = given.bank_ids[18 : 18 + B]
    expected = copied(*(t.clone() for t in rows), ids=ids.clone())
    assert torch.equal(given(*rows, ids=ids), expected)
    for name, tensor in copied.named_state():
        assert torch.equal(getattr(given, name), tensor), name


def test_numbers_of_any_kind():
    """Options are numbers of Python's once they are checked."""
    plain = CrossBatchMemory(Contrastive(), D, M, batch_weight=0.5, eps=0.25, process_noise=0.5)
    other = CrossBatchMemory(
        Contrastive(), D, M, batch_weight=Fraction(1, 2), eps=Fraction(1, 4), process_noise=Fraction(1, 2),
        measurement_noise=np.float32(1), ema_momentum=Fraction(1, 10),
    )  # fmt: skip
    for x, labels in batches(3):
        assert torch.equal(plain(x, labels), other(x, labels))


@pytest.mark.parametrize("name", ["loss", "embedding_size", "memory_size", "drift", "filter"])
def test_what_is_chosen_once_cannot_be_set(name):
    criterion = CrossBatchMemory(Contrastive(), D, M)
    for one in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        chosen = getattr(one, name)
        with pytest.raises(AttributeError, match=f"{name} is chosen once and cannot be set"):
            setattr(one, name, None)
        assert getattr(one, name) is chosen


@pytest.mark.parametrize("its_dtype", [torch.float64, torch.float16])
def test_a_temperature_of_another_dtype(its_dtype):
    """It divides embeddings of their own dtype, and gets its gradient in its own."""
    values, gradients = [], []
    for t in (torch.float32, its_dtype):
        temperature = torch.nn.Parameter(torch.tensor([0.25], dtype=t))
        criterion = CrossBatchMemory(SupCon(temperature), D, M)
        losses = [criterion(x, labels) for x, labels in batches(3)]
        losses[-1].backward()
        assert losses[-1].dtype == torch.float32 and temperature.grad.dtype == t
        values.append(losses[-1]), gradients.append(temperature.grad.float())
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize("bias", [None, -1.0, torch.nn.Parameter(torch.tensor(-1.0))], ids=["", "bias", "learned bias"])
def test_a_temperature_on_another_device_is_named(bias, learned):
    temperature = torch.tensor(0.1, device="meta")
    temperature = torch.nn.Parameter(temperature) if learned else temperature
    criterion = CrossBatchMemory(SupCon(temperature) if bias is None else SigLIP(temperature, bias), D, M)
    with pytest.raises(ValueError, match="temperature is on meta, the memory on cpu"):
        criterion(X, Y)
    assert criterion.variance.isinf() and criterion.count == 0


@pytest.mark.parametrize("size, fits", [((), True), ((1,), False)])
def test_a_fixed_temperature_stays_where_it_is(size, fits):
    """It is no part of the module. A scalar of the CPU divides what is on any device."""
    criterion = CrossBatchMemory(SupCon(torch.full(size, 0.1)), D, M).to("meta")
    if fits:
        assert criterion(X.to("meta"), Y.to("meta")).is_meta
    else:
        with pytest.raises(ValueError, match="temperature is on cpu, the memory on meta"):
            criterion(X.to("meta"), Y.to("meta"))


@pytest.mark.parametrize("set_it", [setattr, CrossBatchMemory.register_parameter], ids=["set", "register"])
@pytest.mark.parametrize(
    "loss, other, message",
    [
        (SupCon(torch.nn.Parameter(torch.tensor(0.3))), None, "temperature is learned and cannot become None"),
        (SupCon(0.3), torch.nn.Parameter(torch.tensor(0.1)), "temperature is not learned and cannot become a"),
        (Contrastive(), torch.nn.Parameter(torch.tensor(0.1)), "temperature is not learned and cannot"),
    ],
    ids=["learned", "fixed", "none"],
)
def test_whether_a_temperature_is_learned_is_chosen_once(loss, other, message, set_it):
    """Without its parameter the loss was at a temperature of 1; with one that it does not have, it had no loss."""
    criterion = CrossBatchMemory(loss, D, M)
    before = criterion.temperature
    with pytest.raises(AttributeError, match=message):
        set_it(criterion, "temperature", other)
    assert criterion.temperature is before
    set_it(criterion, "temperature", before)
    assert criterion.loss == loss


def test_a_temperature_of_another_shape_is_refused_before_anything_is_written():
    """As where a framework has cut the parameter to pieces."""
    criterion = CrossBatchMemory(SupCon(torch.nn.Parameter(torch.tensor(0.1))), D, M)
    train(criterion, batches(3))
    before = {name: tensor.clone() for name, tensor in criterion.named_state()}
    for shape in (0, 3):
        criterion.temperature = torch.nn.Parameter(torch.ones(shape))
        with pytest.raises(ValueError, match=rf"temperature must be a number or .*, got torch.float32 \[{shape}\]"):
            criterion(X, Y)
        assert all(torch.equal(tensor, before[name]) for name, tensor in criterion.named_state())


def test_repr():
    assert "drift='axbn'" in repr(CrossBatchMemory(Contrastive(), D, M))


def test_names_of_0_1_0_warn():
    with pytest.warns(DeprecationWarning, match="bank_dtype is called memory_dtype"):
        criterion = CrossBatchMemory(Contrastive(), D, M, bank_dtype=torch.float16)
    assert criterion.bank.dtype == torch.float16
    with pytest.warns(DeprecationWarning, match="xbn_ext.backend is called xbn_ext.loss_way"):
        assert xbn_ext.backend is xbn_ext.loss_way
    with pytest.raises(AttributeError, match="no attribute 'front'"):
        xbn_ext.front  # noqa: B018


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_is_filled_with_standardised_rows(memory_dtype, device):
    criterion = CrossBatchMemory(Contrastive(), D, M, memory_dtype=memory_dtype, normalize_embeddings=False).to(device)
    x = (1e5 + 100 * torch.randn(M, D)).to(device)
    criterion.fill_from([(x, torch.arange(M, device=device))])
    assert criterion.count == M
    off = (criterion.embedding_memory - x).abs().max() / 100
    assert off <= 4 * torch.finfo(memory_dtype).eps


@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_is_filled_whatever_the_first_batch(memory_dtype, device):
    """In the first batch a dimension hardly varies, as after a ReLU: other batches do not fit that spread."""
    criterion = CrossBatchMemory(Contrastive(), D, 3 * M, memory_dtype=memory_dtype).to(device)
    first, second = torch.nn.functional.normalize(torch.rand(2, M, D, device=device), dim=-1)
    first[:, 0] *= 1e-5
    labels = torch.arange(M, device=device)
    criterion.fill_from([(first, labels), (second, labels)])
    rows = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    assert criterion.count == 2 * M
    assert (criterion.embedding_memory - rows).abs().max() <= 2 * torch.finfo(memory_dtype).eps
    torch.testing.assert_close(criterion.sums, reference.sums_of(criterion.bank[: 2 * M]), rtol=1e-12, atol=1e-12)
    mean, std = reference.bank_moments(criterion.sums, criterion.count)
    assert mean.abs().max() < 0.01 and (std - 1).abs().max() < 0.01


@pytest.mark.singly
@pytest.mark.parametrize("drift", ["axbn", *(pytest.param(drift, marks=pytest.mark.long) for drift in ("xbn", "ema"))])
@pytest.mark.parametrize("memory_dtype", state.NARROW_DTYPES, ids=str)
def test_a_16_bit_memory_stores_a_dimension_that_lives_again(memory_dtype, drift, device):
    """As a unit of a ReLU that was 0 for long: the rows in which it is not are stored like the others."""
    criterion = CrossBatchMemory(Contrastive(), D, M, drift=drift, memory_dtype=memory_dtype).to(device)
    for t, (x, labels) in enumerate(batches(220, size=8, device=device)):
        x = x.abs()
        if 10 <= t < 200:
            x[:, 0] = 0
        criterion(x, labels)
        assert (criterion.age_memory == 1).sum() == len(x), t
    _, std = reference.bank_moments(criterion.sums, criterion.count)
    assert criterion.scale[0] * std[0] > 0.01


@pytest.mark.parametrize("batch_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_dtype", MEMORY_DTYPES, ids=str)
def test_a_memory_that_follows_no_drift_is_filled_with_the_rows(memory_dtype, batch_dtype, device):
    """As a step stores them; no map is left pending, no moments are a target."""
    filled, stepped = (
        CrossBatchMemory(Contrastive(), D, M, drift="none", memory_dtype=memory_dtype).to(device) for _ in range(2)
    )
    x, labels = next(batches(1, torch.float64, device=device))
    x[0] *= 1e300 if batch_dtype == torch.float64 else 1  # of finite length, in float64 only
    x = x.to(batch_dtype)
    filled.fill_from([(x, labels)])
    stepped(x, labels)
    assert filled.count == len(x)
    assert torch.equal(filled.bank, stepped.bank)
    for name in ("scale", "shift", "target_mean", "target_std", "variance"):
        assert torch.equal(getattr(filled, name), getattr(stepped, name)), name


def test_weights_that_become_zero_raise_before_anything_is_written(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    data = list(batches(2, device=device))
    criterion(*data[0])
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    criterion.batch_weight = criterion.memory_weight = 0.0
    for mode in (True, False):
        with pytest.raises(ValueError, match="batch_weight and memory_weight are both 0"):
            criterion.train(mode)(*data[1])
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


@pytest.mark.parametrize("weights", [{"batch_weight": 0.0}, {"memory_weight": 0.0}], ids=str)
def test_a_weight_of_zero_hides_a_nan(weights, device):
    """A loss that does not count is not computed, in the specification as in the module."""
    criterion = CrossBatchMemory(Contrastive(), D, M, **weights).to(device)
    memory = state.to(reference.Memory.empty(M, D), device)
    for t, (x, labels) in enumerate(batches(2, torch.float64, device=device)):
        x[0, 0] = torch.nan
        value = criterion(x, labels)
        torch.testing.assert_close(value, reference.step(memory, x, labels, Contrastive(), **weights), equal_nan=True)
        assert value.isnan() == (t > 0 or "memory_weight" in weights), "an empty memory has no pairs"


def test_a_nan_while_warming_up(device):
    """No pairs, so a loss of 0, and still no gradient for a scaler to take."""
    options = {"batch_weight": 0.0, "warmup_steps": 2}
    criterion = CrossBatchMemory(Contrastive(), D, M, **options).to(device)
    memory = state.to(reference.Memory.empty(M, D), device)
    for x, labels in batches(3, torch.float64, device=device):
        x[0, 0] = torch.nan
        ours, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
        value, true_value = (
            criterion(ours, labels),
            reference.step(memory, truth, labels, Contrastive(), **options),
        )
        value.backward(), true_value.backward()
        torch.testing.assert_close(value, true_value, equal_nan=True)
        torch.testing.assert_close(ours.grad, truth.grad, equal_nan=True)
        assert ours.grad[0].isnan().all() and ours.grad[1:].isfinite().all()


def test_a_batch_that_measures_nothing_gains_nothing(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    train(criterion, batches(3, device=device))
    assert criterion.stats()["gain"] > 0.5
    x, labels = next(batches(1, size=1, device=device))
    mean = criterion.target_mean.clone()
    criterion(x, labels)
    assert criterion.stats()["gain"] == 0 and torch.equal(criterion.target_mean, mean)


def test_a_checkpoint_is_not_rounded_in_silence():
    wide, narrow = (
        CrossBatchMemory(Contrastive(), D, M),
        CrossBatchMemory(Contrastive(), D, M, memory_dtype=torch.float16),
    )
    wide(torch.randn(B, D), torch.arange(B))
    with pytest.raises(RuntimeError, match=r"bank is torch\.float32 and would be rounded to torch\.float16; nothing"):
        narrow.load_state_dict(wide.state_dict())
    assert narrow.count == 0
    wide.load_state_dict(narrow.state_dict())
    assert wide.bank.dtype == torch.float32


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


@pytest.mark.parametrize("drift", ["none", "xbn", "axbn", "ema"])
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_stats(drift, update, device):
    loss = Contrastive(neg_margin=0.2)
    criterion = CrossBatchMemory(loss, D, M, drift=drift, update=update).to(device)
    stats = criterion.stats()
    assert stats.pop("fill") == 0 and all(number.isnan() for number in stats.values())
    for x, labels in batches(3, device=device):
        z = F.normalize(x, dim=1)
        rows, bank_labels = criterion.embedding_memory, criterion.label_memory
        criterion(x, labels)
        stats = criterion.stats()
        assert all(number.dim() == 0 and number.device == x.device for number in stats.values())
        if not len(rows):
            continue
        moved = rows
        if drift != "none":
            mean, std = criterion.target_moments
            moved = (rows - rows.mean(0)) / rows.std(0, correction=0) * std + mean
        else:
            assert stats["gain"].isnan()
        gaps = [
            ((r.mean(0) - z.mean(0)).square() + (r.std(0, False) - z.std(0, False)).square()).sum().sqrt()
            for r in (rows.double(), moved)
        ]
        torch.testing.assert_close(
            torch.stack(gaps).float(),
            torch.stack([stats["gap_before"], stats["gap_after"]]).float(),
            rtol=1e-3,
            atol=1e-5,
        )
        s, positive = z.double() @ F.normalize(moved.double(), dim=1).T, labels[:, None] == bank_labels
        torch.testing.assert_close(stats["positives"], (positive & (s < 1)).sum() / torch.tensor(float(B)).double())
        torch.testing.assert_close(stats["negatives"], (~positive & (s > 0.2)).sum() / torch.tensor(float(B)).double())
    gains = {"xbn": 1.0, "ema": 0.1, "axbn": 0.999}  # axbn: after a first step of 1, and one that says nothing yet
    if drift != "none":
        assert float(stats["gain"]) == pytest.approx(gains[drift])
    assert float(stats["fill"]) == pytest.approx(3 * B / M) and stats["age"] == 2
    criterion.eval()(x, labels)
    torch.testing.assert_close(criterion.stats(), stats, equal_nan=True)
    criterion.reset_queue()
    stats = criterion.stats()
    assert stats.pop("fill") == 0 and all(number.isnan() for number in stats.values())


def test_stats_are_not_of_the_default_dtype(device):
    criterion = CrossBatchMemory(Contrastive(), D, M).to(device)
    for x, labels in batches(2, device=device):
        criterion(x, labels)
    criterion.step += 100_000  # more than float16 holds
    expected = criterion.stats()
    torch.set_default_dtype(torch.float16)
    try:
        stats = criterion.stats()
    finally:
        torch.set_default_dtype(torch.float32)
    assert stats["age"] == expected["age"] == 100_001.5 and stats["fill"] == expected["fill"]
