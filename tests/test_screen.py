"""The screen with products of bytes changes only the time: the loss has the same bits with it and without."""

import pytest
import torch
from torch.nn.functional import normalize

import xbn_ext
from xbn_ext import DCLW, Contrastive, Margin, MultiSimilarity, NTXent, Triplet, loss_way
from xbn_ext import ops as cpu_ops

MARGIN = 0.5
MEAN, AVERAGE = Contrastive(neg_margin=MARGIN), Contrastive(neg_margin=MARGIN, reduction="avg_nonzero")
HARDEST, SOFT = Triplet(margin=0.3), Triplet(margin=0.3, soft=True)
MINED, ALL = MultiSimilarity(beta=20.0, mining=0.1), Triplet(margin=0.1, mining="all")
EUCLIDEAN = Contrastive(distance="euclidean"), Triplet(distance="euclidean")  # a negative margin of 1: s of 0.5
SQUARED = Triplet(margin=0.2, mining="all", distance="squared_euclidean")
LOSSES = pytest.mark.parametrize(
    "loss",
    [MEAN, AVERAGE, HARDEST, SOFT, MINED, ALL, NTXent(0.1), DCLW(), Margin(0.1, 0.4), *EUCLIDEAN, SQUARED],
    ids=[
        *("mean", "avg_nonzero", "triplet", "triplet_soft", "mined", "triplet_all", "ntxent", "dclw", "margin"),
        *("mean_euclidean", "triplet_euclidean", "triplet_all_squared"),
    ],
)
# Every pair by a product; those alone that the screen finds, however many; the latter only while they are few.
WAYS = ("simt", "pairs", "auto")


@pytest.fixture(autouse=True, params=["avx512_vnni", "avx512", "avx_vnni", "avx2"])
def isa(request, monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", request.param)
    try:
        xbn_ext.build_info()
    except RuntimeError as lacking:
        pytest.skip(str(lacking))


def assert_same_bits(z, labels, bank, bank_labels, loss, **options):
    results = []
    for way in WAYS:
        leaf = z.clone().requires_grad_()
        with loss_way(way):
            value, pairs = cpu_ops.memory_loss_and_pairs(leaf, labels, bank, bank_labels, loss, **options)
        value.backward()
        results.append((value.detach(), pairs, leaf.grad))
    for exact, *screened in zip(*results, strict=True):
        for result in screened:
            assert torch.equal(exact.nan_to_num(nan=123), result.nan_to_num(nan=123))
    return results[0]


def random_rows(n, D, dtype=torch.float32):
    return normalize(torch.randn(n, D), dim=1).to(dtype)


def crowded_rows(n, D, share):
    """Of which `share` lie about a direction, the first axis."""
    rows = random_rows(n, D)
    rows[torch.rand(n) < share, 0] += 2
    return normalize(rows, dim=1)


@LOSSES
@pytest.mark.parametrize("classes", [3, 40, 5000])
@pytest.mark.parametrize(
    "B, M, D",
    [(1, 500, 64), (63, 1111, 72), (64, 3000, 512), (65, 2999, 129), (257, 5000, 200), (7, 700, 1024)],
)
def test_classes_few_and_many(B, M, D, classes, loss):
    bank = random_rows(M, D) + 0.3 * random_rows(1, D)  # similarities on both sides of the margin
    z = random_rows(B, D) + 0.5 * random_rows(1, D)
    labels, bank_labels = torch.randint(classes, (B,)), torch.randint(classes, (M,))
    assert_same_bits(z, labels, bank, bank_labels, loss)


@LOSSES
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 15, 95, 96, 97, 111])
def test_tails_of_a_memory(rows, loss):
    z, bank = crowded_rows(70, 64, 0.5), crowded_rows(200, 64, 0.5)
    labels, bank_labels = torch.randint(9, (70,)), torch.randint(9, (200,))
    assert_same_bits(z, labels, bank, bank_labels, loss, count=torch.tensor(rows))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_memories_of_any_density(share):
    z, bank = crowded_rows(130, 128, 1), crowded_rows(3000, 128, share)
    _, pairs, _ = assert_same_bits(z, torch.arange(130), bank, torch.arange(3000) + 130, MEAN)
    assert pairs[1] == pytest.approx(share * 3000, rel=0.5, abs=1)


def test_a_density_that_jumps():
    """The screen gives up in the dense part, and comes back."""
    z = crowded_rows(64, 128, 1)
    bank = torch.cat([crowded_rows(700, 128, share) for share in (0, 1, 0, 0.3, 0.02)])
    for loss in (AVERAGE, HARDEST):
        assert_same_bits(z, torch.arange(64), bank, torch.arange(len(bank)) + 64, loss)


def test_the_first_of_equal_extremes():
    """Copies of a row: the gradient is that of the first, whatever the split it is in."""
    z, bank = random_rows(64, 128), random_rows(500, 128).repeat(8, 1)
    labels, bank_labels = torch.randint(50, (64,)), torch.randint(50, (500,)).repeat(8)
    assert_same_bits(z, labels, bank, bank_labels, HARDEST)


def test_a_class_of_its_own():
    """Some anchors have no positive, or no negative, in most of the memory or in all of it."""
    z, bank = random_rows(64, 64), random_rows(3000, 64)
    labels = torch.arange(64) // 16
    bank_labels = torch.where(torch.arange(3000) < 2500, 0, 1)
    bank_labels[2600] = 2
    assert_same_bits(z, labels, bank, bank_labels, HARDEST)
    assert_same_bits(z, torch.zeros(64).long(), bank, torch.zeros(3000).long(), HARDEST)


@pytest.mark.singly
@LOSSES
def test_threads(loss):
    z, bank = crowded_rows(130, 128, 0.5), crowded_rows(9000, 128, 0.05)
    labels, bank_labels = torch.randint(50, (130,)), torch.randint(50, (9000,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(assert_same_bits(z, labels, bank, bank_labels, loss))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("loss", [MEAN, EUCLIDEAN[0]], ids=["mean", "mean_euclidean"])
@pytest.mark.parametrize("off", [0, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1])
def test_similarities_at_the_margin(off, loss):
    """One in every thirty rows is there; the others are far below."""
    D, rows, step = 128, 6 * 1000, 30
    z = random_rows(1, D).repeat(64, 1)
    bank = random_rows(rows, D)
    bank = normalize(bank - bank @ z[0][:, None] * z[0], dim=1)
    at = MARGIN + off * torch.randn(rows // step, 1)
    bank[::step] = at * z[0] + (1 - at**2).clamp(min=0).sqrt() * bank[::step]
    _, pairs, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(rows).long(), loss)
    assert pairs[1] > rows / step / 4  # half of these count, or so


def test_margins_that_are_similarities():
    """And the numbers next to them: of pairs whose codes are far off, since one coordinate is large."""
    z, bank = random_rows(64, 256), random_rows(600, 256)
    z[:, 7] += 3
    bank[:, 9] += 2
    z, bank = normalize(z, dim=1), normalize(bank, dim=1)
    similarities = (z @ bank.T).flatten().sort().values
    for k in (0, -1, -2, -5, -50):
        at = similarities[k]
        for margin in (at, at.nextafter(torch.tensor(2.0)), at.nextafter(torch.tensor(-2.0))):
            loss = Contrastive(neg_margin=float(margin))
            assert_same_bits(z, torch.arange(64), bank, torch.arange(600) + 64, loss)


@pytest.mark.parametrize("D", [64, 127, 128, 512])
def test_largest_codes(D):
    """All coordinates of a row are as large as any, of the anchors' sign or the other: no sum of products saturates."""
    signs = torch.randn(1, D).sign()
    z = torch.cat([signs, -signs, torch.randn(62, D).sign()]) / D**0.5
    bank = torch.cat([signs, -signs]).repeat(100, 1) * torch.rand(200, 1)
    for margin in (-1, 0, 0.5, 0.999):
        _, pairs, _ = assert_same_bits(
            z, torch.zeros(64).long(), bank, torch.ones(200).long(), Contrastive(neg_margin=margin)
        )
        assert pairs[1] > 0


def test_rows_of_one_coordinate():
    """Their codes are exact; of dense rows next to them, with one coordinate a hundred times the others, most are 0."""
    z = torch.eye(128)[torch.randint(128, (64,))]
    bank = torch.eye(128)[torch.randint(128, (900,))]
    bank[::2] = 0.01 * torch.randn(450, 128)
    bank[::2, 5] = 1
    for loss in (AVERAGE, Contrastive(neg_margin=0)):
        assert_same_bits(z, torch.arange(64), bank, torch.arange(900) + 64, loss)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e-12, 1e-8, 1e-6, 1e10, 1e18, 1e19, 1e30, 3e37])
def test_rows_of_any_length(scale):
    z, bank = random_rows(64, 96), random_rows(1200, 96)
    bank[::2] *= scale
    bank[1::2] += 0.4 * z[0]
    labels = torch.arange(64), torch.arange(1200) + 64
    assert_same_bits(z, labels[0], bank, labels[1], MEAN)
    assert_same_bits(z * scale, labels[0], bank.sign(), labels[1], Contrastive(neg_margin=0))
    assert_same_bits(z, labels[0], bank, labels[1], MEAN, eps=1e-30)
    assert_same_bits(z, labels[0] % 7, bank, labels[1] % 7, HARDEST)


def test_a_row_whose_products_overflow():
    z = normalize(torch.ones(64, 64), dim=1)
    bank = -random_rows(600, 64).abs()
    bank[:6] = 127 * 2.0**120  # eight bits hold them exactly
    loss, _, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(600).long(), MEAN)
    assert loss.isnan()
    assert_same_bits(10 * z, torch.zeros(64).long(), bank / 8, torch.ones(600).long(), MEAN)


def test_numbers_that_are_flushed_to_zero():
    z, bank = torch.full((64, 128), 1e-19), torch.full((600, 128), 127.0)
    z[:, 0], bank[:, 0] = 1e-15, -1
    torch.set_flush_denormal(True)
    try:
        loss = Contrastive(neg_margin=0)
        _, pairs, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(600).long(), loss)
    finally:
        torch.set_flush_denormal(False)
    assert pairs[1] == 600


@pytest.mark.parametrize("margin", [-1, -0.1, 0, 1e-3, 0.05, 1])
def test_margins(margin):
    z, bank = random_rows(70, 100), random_rows(2000, 100)
    bank[:6] = 0
    loss = Contrastive(neg_margin=margin)
    assert_same_bits(z, torch.arange(70), bank, torch.arange(2000), loss)


def test_anchors_that_are_not_finite():
    z, bank = random_rows(130, 64), random_rows(900, 64)
    z[70, 3] = torch.nan
    z[129, 3] = torch.inf
    _, _, grad = assert_same_bits(z, torch.arange(130), bank, torch.arange(900), MEAN)
    assert grad[70].isnan().all() and grad[:64].isfinite().all()
    assert_same_bits(z, torch.arange(130) % 7, bank, torch.arange(900) % 7, HARDEST)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 16, 127])
def test_a_bank_row_that_is_not_finite(value, column):
    z, bank = random_rows(64, 128), random_rows(900, 128)
    bank[505, column] = value
    labels = torch.arange(64), torch.arange(900) + 64
    loss, _, _ = assert_same_bits(z, labels[0], bank, labels[1], MEAN)
    assert loss.isnan()
    # For the anchors that are no pair with it, too.
    exclude, ids = torch.arange(64) % 2, torch.ones(900).long()
    assert_same_bits(z, labels[0], bank, labels[1], AVERAGE, exclude=exclude, bank_ids=ids)
    assert_same_bits(z, labels[0] % 7, bank, labels[1] % 7, HARDEST)
    for loss in (MINED, ALL, NTXent(0.1), DCLW()):  # a positive of some of a whole block
        assert_same_bits(z, 0 * labels[0], bank, 0 * labels[1], loss, exclude=exclude, bank_ids=ids)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [True, False])
@LOSSES
def test_options(stored, renormalize, loss):
    z, bank = random_rows(64, 160), random_rows(2000, 160, stored)
    options = {
        "anchors": torch.rand(64) < 0.8,
        "exclude": torch.randint(50, (64,)),
        "bank_ids": torch.randint(50, (2000,)),
        "scale": torch.rand(160).double() + 0.5,
        "shift": 0.05 * torch.randn(160).double(),
    }
    labels = torch.randint(300, (64,)), torch.randint(300, (2000,))
    options["renormalize"] = renormalize or loss in (*EUCLIDEAN, SQUARED)
    assert_same_bits(z, labels[0], bank, labels[1], loss, **options)


@pytest.mark.singly
@LOSSES
@pytest.mark.parametrize("update", ["inplace", "deferred"])
def test_steps(update, loss):
    results = []
    for way in WAYS:
        torch.manual_seed(0)
        criterion = xbn_ext.CrossBatchMemory(loss, 128, 2048, drift="axbn", update=update)
        with loss_way(way):
            for _ in range(50):
                embeddings = random_rows(64, 128).requires_grad_()
                value = criterion(embeddings, torch.randint(1000, (64,)))
                value.backward()
        results.append((value.detach(), embeddings.grad, criterion.bank))
    for exact, *screened in zip(*results, strict=True):
        assert all(torch.equal(exact, result) for result in screened)
