"""The screen in eight bits changes only the time: the loss has the same bits with it and without."""

import pytest
import torch
from torch.nn.functional import normalize

import xbn_ext
from xbn_ext import Contrastive
from xbn_ext import ops as cpu_ops
from xbn_ext.dtypes import MEMORY_DTYPES

MARGIN = 0.5
MEAN, AVERAGE = Contrastive(neg_margin=MARGIN), Contrastive(neg_margin=MARGIN, reduction="avg_nonzero")


@pytest.fixture(autouse=True)
def screened(monkeypatch):
    monkeypatch.setenv("XBN_CPU_ISA", "avx512_vnni")
    try:
        xbn_ext.build_info()
    except RuntimeError as lacking:
        pytest.skip(str(lacking))


def assert_same_bits(z, labels, bank, bank_labels, loss, monkeypatch, **options):
    results = []
    for isa in ("avx512", "avx512_vnni"):
        monkeypatch.setenv("XBN_CPU_ISA", isa)
        leaf = z.clone().requires_grad_()
        value, pairs = cpu_ops.memory_loss_and_pairs(leaf, labels, bank, bank_labels, loss, **options)
        value.backward()
        results.append((value.detach(), pairs, leaf.grad))
    for exact, with_screen in zip(*results, strict=True):
        assert torch.equal(exact.nan_to_num(nan=123), with_screen.nan_to_num(nan=123))
    return results[0]


def random_rows(n, D, dtype=torch.float32):
    return normalize(torch.randn(n, D), dim=1).to(dtype)


@pytest.mark.parametrize("loss", [MEAN, AVERAGE], ids=["mean", "avg_nonzero"])
@pytest.mark.parametrize("classes", [3, 40, 5000])
@pytest.mark.parametrize("B, M, D", [(1, 500, 64), (64, 3000, 512), (65, 2999, 129), (300, 5000, 200), (7, 700, 1024)])
def test_classes_few_and_many(B, M, D, classes, loss, monkeypatch):
    bank = random_rows(M, D) + 0.3 * random_rows(1, D)  # similarities on both sides of the margin
    z = random_rows(B, D) + 0.5 * random_rows(1, D)
    labels, bank_labels = torch.randint(classes, (B,)), torch.randint(classes, (M,))
    assert_same_bits(z, labels, bank, bank_labels, loss, monkeypatch)


@pytest.mark.parametrize("off", [0, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1])
def test_similarities_at_the_margin(off, monkeypatch):
    """One in every fifth unit of six rows is there; the others are far below."""
    D, rows, step = 128, 6 * 1000, 30
    z = random_rows(1, D).repeat(64, 1)
    bank = random_rows(rows, D)
    bank = normalize(bank - bank @ z[0][:, None] * z[0], dim=1)
    at = MARGIN + off * torch.randn(rows // step, 1)
    bank[::step] = at * z[0] + (1 - at**2).clamp(min=0).sqrt() * bank[::step]
    _, pairs, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(rows).long(), MEAN, monkeypatch)
    assert pairs[1] > rows / step / 4  # half of these count, or so


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-8, 1e-6, 1e10, 1e19, 1e30, 3e37])
def test_rows_of_any_length(scale, monkeypatch):
    z, bank = random_rows(64, 96), random_rows(1200, 96)
    bank[::2] *= scale
    bank[1::2] += 0.4 * z[0]
    labels = torch.arange(64), torch.arange(1200) + 64
    assert_same_bits(z, labels[0], bank, labels[1], MEAN, monkeypatch)
    assert_same_bits(z * scale, labels[0], bank.sign(), labels[1], Contrastive(neg_margin=0), monkeypatch)
    assert_same_bits(z, labels[0], bank, labels[1], MEAN, monkeypatch, eps=1e-30)


def test_a_row_whose_products_overflow(monkeypatch):
    z = normalize(torch.ones(64, 64), dim=1)
    bank = -random_rows(600, 64).abs()
    bank[:6] = 127 * 2.0**120  # eight bits hold them exactly
    loss, _, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(600).long(), MEAN, monkeypatch)
    assert loss.isnan()
    assert_same_bits(10 * z, torch.zeros(64).long(), bank / 8, torch.ones(600).long(), MEAN, monkeypatch)


def test_numbers_that_are_flushed_to_zero(monkeypatch):
    z, bank = torch.full((64, 128), 1e-19), torch.full((600, 128), 127.0)
    z[:, 0], bank[:, 0] = 1e-15, -1
    torch.set_flush_denormal(True)
    try:
        loss = Contrastive(neg_margin=0)
        _, pairs, _ = assert_same_bits(z, torch.zeros(64).long(), bank, torch.ones(600).long(), loss, monkeypatch)
    finally:
        torch.set_flush_denormal(False)
    assert pairs[1] == 600


@pytest.mark.parametrize("margin", [-1, -0.1, 0, 1e-3, 0.05, 1])
def test_margins(margin, monkeypatch):
    z, bank = random_rows(70, 100), random_rows(2000, 100)
    bank[:6] = 0
    loss = Contrastive(neg_margin=margin)
    assert_same_bits(z, torch.arange(70), bank, torch.arange(2000), loss, monkeypatch)


def test_anchors_that_are_not_finite(monkeypatch):
    z, bank = random_rows(130, 64), random_rows(900, 64)
    z[70, 3] = torch.nan
    z[129, 3] = torch.inf
    _, _, grad = assert_same_bits(z, torch.arange(130), bank, torch.arange(900), MEAN, monkeypatch)
    assert grad[70].isnan().all() and grad[:64].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 16, 127])
def test_a_bank_row_that_is_not_finite(value, column, monkeypatch):
    z, bank = random_rows(64, 128), random_rows(900, 128)
    bank[505, column] = value
    loss, _, _ = assert_same_bits(z, torch.arange(64), bank, torch.arange(900) + 64, MEAN, monkeypatch)
    assert loss.isnan()


@pytest.mark.parametrize("stored", [dtype for dtype in MEMORY_DTYPES if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
def test_options(stored, renormalize, monkeypatch):
    z, bank = random_rows(64, 160), random_rows(2000, 160, stored)
    options = {
        "anchors": torch.rand(64) < 0.8,
        "exclude": torch.randint(50, (64,)),
        "bank_ids": torch.randint(50, (2000,)),
        "scale": torch.rand(160).double() + 0.5,
        "shift": 0.05 * torch.randn(160).double(),
    }
    labels = torch.randint(300, (64,)), torch.randint(300, (2000,))
    assert_same_bits(z, labels[0], bank, labels[1], MEAN, monkeypatch, renormalize=renormalize, **options)


def test_in_place(monkeypatch):
    results = []
    for isa in ("avx512", "avx512_vnni"):
        monkeypatch.setenv("XBN_CPU_ISA", isa)
        torch.manual_seed(0)
        criterion = xbn_ext.CrossBatchMemory(MEAN, 128, 4096, drift="axbn")
        for _ in range(80):
            embeddings = random_rows(64, 128).requires_grad_()
            loss = criterion(embeddings, torch.randint(1000, (64,)))
            loss.backward()
        results.append((loss.detach(), embeddings.grad, criterion.bank))
    for exact, with_screen in zip(*results, strict=True):
        assert torch.equal(exact, with_screen)
