"""The screen of `memory_loss` on a GPU, executed on the CPU: it keeps every pair that has a weight, and not many more;
and the loss behind it is right on both sides of the share of pairs from which on the sweep runs instead."""

import pytest
import state
import torch
from conftest import HAS_EMULATOR
from loss_cases import assert_right
from torch.nn.functional import normalize

from xbn_ext import Contrastive, ops, reference

if HAS_EMULATOR:
    import emulated

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="there is a real GPU, or no g++")
MARGIN = 0.5
BANK_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXTREMES = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 65519.0, 65520.0, 7e4, 1e-45, 1e-38, -1e-20, 6e-8, 6e-5]


@pytest.fixture(autouse=True)
def settings():
    with ops.over(emulated.ops):
        yield
    emulated.executor.set_seed(0)
    emulated.executor.set_multiprocessors(4)
    torch.ops.xbn_emu.set_loss_way("auto")


def random_rows(n, D):
    return normalize(torch.randn(n, D), dim=1)


def weighted(z, labels, bank, bank_labels, margin, *, count=None, scale=None, shift=None, anchors=None,
             renormalize=True, eps=1e-6):  # fmt: skip
    """`[B, M]` bool, by float64: the pairs that have a weight as negatives, or as positives may; NaN has one."""
    rows = bank.double() if scale is None else bank.double() * scale + shift
    s = reference.similarity(z.double(), rows, renormalize, eps)
    s[~z.isfinite().all(1)] = torch.nan
    active = ~(s <= margin) | (labels[:, None] == bank_labels)
    if count is not None:
        active &= torch.arange(len(bank)) < count
    return active if anchors is None else active & anchors[:, None]


def first_similarity(z, bank, renormalize):
    """Of the first pair, by float64."""
    return reference.similarity(z.double(), bank.double(), renormalize)[0, 0]


def missed_and_kept(*args, bounded=True, **options):
    """How many pairs with a weight the screen drops, how many without one it keeps."""
    mask, found = emulated.screen(*args, bounded=bounded, **options)
    active = weighted(*args, **options)
    stored = torch.arange(mask.shape[1]) < options.get("count", torch.tensor(mask.shape[1]))
    assert found == int((mask & stored).sum())
    return int((active & ~mask).sum()), int((mask & stored & ~active).sum())


def at_the_margin(B, M, D, off, margin=MARGIN):
    """Similarities as far from the margin as `off`, on both sides; z is one anchor in other guises."""
    z = random_rows(1, D).repeat(B, 1)
    bank = random_rows(M, D)
    bank = normalize(bank - bank @ z[0][:, None] * z[0], dim=1)
    at = margin + off * torch.randn(M, 1)
    return z, at * z[0] + (1 - at**2).clamp(min=0).sqrt() * bank


@pytest.mark.parametrize("classes", [3, 5000])
@pytest.mark.parametrize(
    "B, M, D",
    [(1, 33, 4), (7, 500, 64), (64, 1000, 128), (65, 999, 132), (130, 500, 260), (70, 300, 512), (33, 200, 1000)],
)
@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
def test_no_pair_is_missed(B, M, D, classes, bank_dtype):
    D = -(-D * bank_dtype.itemsize // 16) * 16 // bank_dtype.itemsize  # rows of whole 16 bytes
    bank = (random_rows(M, D) + 0.3 * random_rows(1, D)).to(bank_dtype)
    z = normalize(random_rows(B, D) + 0.5 * random_rows(1, D), dim=1)
    labels, bank_labels = torch.randint(classes, (B,)), torch.randint(classes, (M,))
    for count in (M, M - 5, 1, 0):
        missed, kept = missed_and_kept(z, labels, bank, bank_labels, 0.2, count=torch.tensor(count))
        assert missed == 0
    missed, kept = missed_and_kept(z, labels, bank, bank_labels, 0.2)
    assert missed == 0 and kept <= 0.02 * B * M


@pytest.mark.parametrize("D", [64, 512, 1024])
@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
def test_similarities_at_the_margin(D, bank_dtype):
    labels, bank_labels = torch.zeros(64).long(), torch.ones(1000).long()
    without = 0
    for off in (0, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2):
        z, bank = at_the_margin(64, 1000, D, off)
        for renormalize in (True, False):
            args = (z, labels, bank.to(bank_dtype), bank_labels, MARGIN)
            missed, _ = missed_and_kept(*args, renormalize=renormalize)
            assert missed == 0
            without += missed_and_kept(*args, renormalize=renormalize, bounded=False)[0]
    assert without > 0, "as if fp16 were exact pairs should be missed: else this test could not see it"


@pytest.mark.parametrize("D", [64, 256, 1024])
@pytest.mark.parametrize("beyond", [0.999, 1.001])
def test_every_number_is_rounded_alike(D, beyond):
    """Half a step of fp16 up or down, all with one sign: what the bound gives the operands is reached, nearly."""
    z = torch.full((16, D), (1 + beyond * 2.0**-11) / D**0.5)
    bank = z[:1].repeat(33, 1)
    labels, bank_labels = torch.zeros(16).long(), torch.ones(33).long()
    for renormalize in (True, False):
        s = float(first_similarity(z, bank, renormalize))
        missed = [
            missed_and_kept(z, labels, bank, bank_labels, s - off, renormalize=renormalize, bounded=bounded)[0]
            for bounded in (True, False)
            for off in (1e-6, 1e-4, 8e-4)
        ]
        assert missed == [0, 0, 0, *([16 * 33] * 3 if beyond < 1 else [0] * 3)]


@pytest.mark.parametrize("margin", [-1, -0.1, 0, 1e-3, 0.05, 1, torch.inf, -torch.inf])
def test_margins(margin):
    z, bank = random_rows(70, 100), random_rows(500, 100)
    bank[:6] = 0
    for renormalize in (True, False):
        args = (z, torch.arange(70), bank, torch.arange(500) + 70, margin)
        assert missed_and_kept(*args, renormalize=renormalize)[0] == 0


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e-8, 1e-6, 1e-4, 1e2, 1e4, 1e5, 1e10, 1e19, 1e30, 3e37])
def test_rows_of_any_length(scale):
    z, bank = random_rows(64, 96), random_rows(600, 96)
    bank[::2] *= scale
    bank[1::2] += 0.4 * z[0]
    labels, bank_labels = torch.arange(64), torch.arange(600) + 64
    for eps in (1e-6, 1e-30):
        for renormalize in (True, False):
            options = {"eps": eps, "renormalize": renormalize}
            assert missed_and_kept(z, labels, bank, bank_labels, MARGIN, **options)[0] == 0
            assert missed_and_kept(z * scale, labels, bank.sign(), bank_labels, 0, **options)[0] == 0


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
def test_extreme_values(value, bank_dtype):
    z, bank = random_rows(70, 64), random_rows(300, 64).to(bank_dtype)
    z[3, 5], z[40] = value, value
    bank[7, 9], bank[100], bank[101, ::2] = value, value, -value
    bank[200:] = -bank[200:].abs()
    z[60:] = z[60:].abs()
    labels, bank_labels = torch.arange(70), torch.arange(300) + 70
    for margin in (0, MARGIN):
        mask, _ = emulated.screen(z, labels, bank, bank_labels, margin)
        finite = bank.isfinite().all(1)
        exact = weighted(z, labels, bank, bank_labels, margin)
        assert (mask | ~exact).all()
        assert mask[:, ~finite].all() and mask[~z.isfinite().all(1)].all()


def test_a_pending_map_with_cancellation():
    """A map of large parts that cancel: in float it is off by more than the row is long."""
    D = 256
    z, target = at_the_margin(64, 500, D, 1e-4)
    scale, shift = 1 + torch.rand(D, dtype=torch.float64), 300 * torch.randn(D, dtype=torch.float64)
    bank = ((target.double() - shift) / scale).float()
    labels, bank_labels = torch.zeros(64).long(), torch.ones(500).long()
    missed, _ = missed_and_kept(z, labels, bank, bank_labels, MARGIN, scale=scale, shift=shift)
    assert missed == 0
    missed, _ = missed_and_kept(z, labels, bank, bank_labels, MARGIN, scale=scale, shift=shift, bounded=False)
    assert missed > 0


@pytest.mark.parametrize("B, M, D", [(1, 33, 4), (64, 500, 128), (65, 999, 132), (200, 300, 512), (70, 200, 1000)])
def test_rows_are_moved_as_they_are_screened(B, M, D):
    """By the bits of `transform_`, and screened as they would be with the map; others are left alone."""
    m = state.filled(M, D, M, pending=True)
    z, labels = random_rows(B, D), torch.arange(B)
    truth = state.clone(m)
    given = truth.scale.clone(), truth.shift.clone()
    for moved, ranked in ((M, M), (M - 5, M - 5), (M - 5, 0), (1, 1), (0, 0)):
        truth.bank[:], truth.count[...] = m.bank, moved
        truth.scale[:], truth.shift[:] = given
        ops.transform_(truth.bank, truth.sums, truth.scale, truth.shift, truth.count)
        ours, count = m.bank.clone(), torch.tensor(ranked)
        options = {"scale": m.scale, "shift": m.shift, "count": count}
        expected, found = emulated.screen(z, labels, ours, m.bank_labels, 0.1, **options)
        assert torch.equal(ours, m.bank)
        bits, counted = emulated.screen(z, labels, ours, m.bank_labels, 0.1, moved=truth.count, **options)
        assert torch.equal(ours, truth.bank) and torch.equal(ours[moved:], m.bank[moved:])
        assert torch.equal(bits[:64, :ranked], expected[:64, :ranked])  # the other anchors read what has been moved
        active = weighted(z, labels, truth.bank, m.bank_labels, 0.1, count=count)
        assert not (active & ~bits).any()
        assert counted == int(bits[:, :ranked].sum()) and abs(counted - found) <= 0.02 * B * M


@pytest.mark.parametrize("B", [9, 70])
@pytest.mark.parametrize("way, follows", [("screen", True), ("pairs", True), ("tensor", False)])
def test_in_a_step_the_sums_follow_the_screen(way, follows, B):
    """They are mapped as the rows are, and counted in every 1,024th step; with other ways in each."""
    torch.ops.xbn_emu.set_loss_way(way)
    for step in (1023, 1024, 1025):
        m = state.filled(200, 16, 190, pending=True)
        m.step.fill_(step)
        m.sums += 0.1  # which counting mends
        ops.step_(m, random_rows(B, 16), torch.arange(B), Contrastive(neg_margin=0.9))
        off = (m.sums - reference.sums_of(m.bank[: int(m.count)])).abs().max()
        assert (off > 1e-3) == (follows and step != 1024)


def test_only_anchors_that_rank_have_bits():
    z, bank = random_rows(70, 64), random_rows(300, 64)
    z[3] = torch.nan
    anchors = torch.rand(70) < 0.5
    anchors[3] = False
    mask, found = emulated.screen(z, torch.zeros(70).long(), bank, torch.zeros(300).long(), MARGIN, anchors=anchors)
    assert not mask[~anchors].any() and mask[anchors].all() and found == 300 * int(anchors.sum())


def test_labels_that_differ_in_the_upper_half():
    """By a hash of 32 bits: positives keep their pairs, and hardly any negative does for its label alone."""
    z, bank = random_rows(64, 64), -random_rows(500, 64)
    labels = torch.cat([torch.arange(32), torch.arange(-32, 0)]) * 2**32 + 7
    bank_labels = labels.repeat(8)[:500]
    missed, kept = missed_and_kept(z, labels, bank, bank_labels, 0.9)
    assert missed == kept == 0


def test_the_grid_changes_no_bit():
    z, bank = random_rows(130, 64), random_rows(700, 64)
    args = (z, torch.zeros(130).long(), bank, torch.ones(700).long(), 0.1)
    expected, _ = emulated.screen(*args)
    for multiprocessors, seed in ((1, 0), (3, 1), (132, 2)):
        emulated.executor.set_multiprocessors(multiprocessors)
        emulated.executor.set_seed(seed)
        assert torch.equal(emulated.screen(*args)[0], expected)


def with_candidates(share, B=64, M=4000, D=64):
    """A problem with so many pairs above the margin."""
    z, bank = random_rows(1, D).repeat(B, 1), random_rows(M, D)
    bank = normalize(bank - bank @ z[0][:, None] * z[0], dim=1)
    bank[torch.randperm(M)[: int(share * M)]] += z[0]
    return z, torch.zeros(B).long(), bank, torch.ones(M).long()


@pytest.mark.singly
@pytest.mark.parametrize("reduction", ["mean", "avg_nonzero"])
@pytest.mark.parametrize("way", ["screen", "pairs"])
@pytest.mark.parametrize("bank_dtype", BANK_DTYPES, ids=str)
def test_both_sides_of_the_limit(way, reduction, bank_dtype):
    """From more than 5 % on the sweep takes over, into the same sums."""
    loss = Contrastive(neg_margin=MARGIN, reduction=reduction)
    for share in (0, 0.002, 0.049, 0.051, 0.3):
        z, labels, bank, bank_labels = with_candidates(share)
        args = z, labels, bank.to(bank_dtype), bank_labels
        torch.ops.xbn_emu.set_loss_way(way)
        before = emulated.executor.launches()
        assert_right(ops, *args, loss)
        assert emulated.executor.launches() == before + 5  # screen, pairs, sweep, settle, gradient


def result(args, loss):
    z = args[0].clone().requires_grad_()
    value, pairs = ops.memory_loss_and_pairs(z, *args[1:], loss)
    return [value.detach(), *torch.autograd.grad(value, z), pairs]


def test_which_side_of_the_limit_is_taken():
    """The bits of the sweep above it, and below it those of the pairs, which add up in another order."""
    loss, differ = Contrastive(neg_margin=MARGIN), {}
    for share in (0.049, 0.051):
        args = with_candidates(share)
        args[2].mul_(1 + 0.1 * torch.rand(len(args[2]), 1))
        bits = {}
        for way in ("screen", "pairs", "tensor"):
            torch.ops.xbn_emu.set_loss_way(way)
            bits[way] = result(args, loss)
        same = {way: all(map(torch.equal, bits["screen"], bits[way])) for way in ("pairs", "tensor")}
        differ[share] = same
        torch.testing.assert_close(bits["screen"], bits["tensor"], rtol=1e-5, atol=1e-6)
    assert differ == {0.049: {"pairs": True, "tensor": False}, 0.051: {"pairs": False, "tensor": True}}


@pytest.mark.parametrize("reduction", ["mean", "avg_nonzero"])
def test_the_order_of_threads_and_blocks_changes_no_bit(reduction):
    loss = Contrastive(neg_margin=MARGIN, reduction=reduction)
    args = with_candidates(0.03)
    torch.ops.xbn_emu.set_loss_way("screen")
    expected = result(args, loss)
    for seed in (0, 1, 2):
        emulated.executor.set_seed(seed)
        assert all(map(torch.equal, result(args, loss), expected))


@pytest.mark.parametrize("way", ["screen", "pairs"])
def test_anchors_that_are_not_finite(way):
    z, labels, bank, bank_labels = with_candidates(0.01, B=100)
    z[70, 3], z[99, 3] = torch.nan, torch.inf
    torch.ops.xbn_emu.set_loss_way(way)
    value, grad, _ = result((z, labels, bank, bank_labels), Contrastive(neg_margin=MARGIN))
    assert value.isnan() and grad[[70, 99]].isnan().all() and grad[:64].isfinite().all()


def test_other_losses_are_refused():
    from xbn_ext import SupCon

    torch.ops.xbn_emu.set_loss_way("screen")
    for loss in (SupCon(), Contrastive(distance="euclidean")):
        with pytest.raises(
            RuntimeError, match="way 'screen' has contrastive and margin losses only, of cosine or squared"
        ):
            ops.memory_loss(*with_candidates(0), loss)
