"""Losses of pytorch-metric-learning by a few anchors at a time: value and gradients are those of one call."""

import copy
import itertools
from pathlib import Path

import pytest
import state
import torch
import torch.nn.functional as F
from torch import nn

import xbn_ext
from xbn_ext import CrossBatchMemory, InChunks, SmoothAP, ops
from xbn_ext.losses import few_pairs

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

B, M, D = 11, 60, 8
NOT_WITH_REFERENCES = {  # they say so, or do not use them, or have no formula
    "FastAPLoss", "HistogramLoss", "InstanceLoss", "ManifoldLoss", "NPairsLoss", "P2SGradLoss", "PNPLoss",
    "RankedListLoss", "SmoothAPLoss", "BaseMetricLossFunction", "GenericPairLoss",
    # proxies and classifiers
    "ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss",
    "SoftTripleLoss", "SphereFaceLoss", "SubCenterArcFaceLoss",
}  # fmt: skip
CASES = {
    "angular": lambda: losses.AngularLoss(),
    "circle": lambda: losses.CircleLoss(),
    "contrastive": lambda: losses.ContrastiveLoss(),
    "contrastive, cosine": lambda: losses.ContrastiveLoss(0.8, 0.1, distance=distances.CosineSimilarity()),
    "contrastive, sum": lambda: losses.ContrastiveLoss(reducer=reducers.SumReducer()),
    "contrastive, mean": lambda: losses.ContrastiveLoss(reducer=reducers.MeanReducer()),
    "contrastive, threshold": lambda: losses.ContrastiveLoss(reducer=reducers.ThresholdReducer(low=0.1, high=1.2)),
    "contrastive, class weights": lambda: losses.ContrastiveLoss(
        reducer=reducers.ClassWeightedReducer(torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0]))
    ),
    "contrastive, dot product": lambda: losses.ContrastiveLoss(
        0.8, 0.1, distance=distances.DotProductSimilarity(normalize_embeddings=False)
    ),
    "generalized lifted structure": lambda: losses.GeneralizedLiftedStructureLoss(),
    "margin": lambda: losses.MarginLoss(nu=0.3, learn_beta=True),
    "margin, by class": lambda: losses.MarginLoss(nu=0.3, learn_beta=True, num_classes=5),
    "multi similarity": lambda: losses.MultiSimilarityLoss(),
    "nca": lambda: losses.NCALoss(),
    "nca, regularized": lambda: losses.NCALoss(embedding_regularizer=regularizers.LpRegularizer()),
    "ntxent": lambda: losses.NTXentLoss(),
    "snr contrastive": lambda: losses.SignalToNoiseRatioContrastiveLoss(),
    "supcon": lambda: losses.SupConLoss(),
    "triplet": lambda: losses.TripletMarginLoss(),
    "triplet, smooth": lambda: losses.TripletMarginLoss(smooth_loss=True, swap=False),
    "tuplet margin": lambda: losses.TupletMarginLoss(),
}
MINERS = {
    "no miner": lambda: None,
    "multi similarity miner": lambda: miners.MultiSimilarityMiner(),
    "batch hard miner": lambda: miners.BatchHardMiner(),
    "pair margin miner": lambda: miners.PairMarginMiner(0.6, 1.1),
    "triplet margin miner": lambda: miners.TripletMarginMiner(0.2),
}


def rows(n):
    return F.normalize(torch.randn(n, D, dtype=torch.float64)), torch.randint(5, (n,))


def compare(loss, value, z, expected, again):
    """Values, and gradients by the embeddings and by what the loss learns."""
    learned = list(loss.parameters())
    of_z, *own = torch.autograd.grad(value, [z, *learned])
    its, *theirs = torch.autograd.grad(expected, [again, *learned], retain_graph=True)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_z, its, rtol=1e-9, atol=1e-12)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


FEW = ("contrastive", "triplet", "margin", "nca", "multi similarity")  # with each miner; the others in `make test-all`


@pytest.mark.parametrize(
    "case, miner",
    [
        pytest.param(case, miner, marks=[] if miner == "no miner" or case in FEW else pytest.mark.long)
        for case, miner in itertools.product(CASES, MINERS)
    ],
)
def test_against_references(case, miner):
    loss, miner = CASES[case]().double(), MINERS[miner]()
    if miner is not None and isinstance(loss, losses.NCALoss):
        with pytest.raises(ValueError, match="miner: NCALoss weighs an anchor by how often others are picked"):
            InChunks(loss, miner)
        return
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    picked = None if miner is None else miner(again.detach(), labels, bank, of_bank)
    expected = loss(again, labels, picked, bank, of_bank)
    for anchors in (1, 4, B):
        own = InChunks(loss, miner, anchors=anchors)
        value = ops.memory_loss(z, labels, bank, of_bank, own, renormalize=False)
        compare(loss, value, z, expected, again)


PAIR_LOSSES = [name for name, case in CASES.items() if few_pairs.decide(case())]
PICKY = {
    "no miner": lambda: None,
    "multi similarity miner": lambda: miners.MultiSimilarityMiner(0.1),
    "hard": lambda: miners.TripletMarginMiner(0.2, type_of_triplets="hard"),
    "semihard": lambda: miners.TripletMarginMiner(0.2, type_of_triplets="semihard"),
    "some of either": lambda: miners.PairMarginMiner(0.9, 0.9),
    "positives": lambda: miners.PairMarginMiner(0.1, 0.0),
    "negatives": lambda: miners.PairMarginMiner(9.0, 1.3),
}


@pytest.mark.singly
@pytest.mark.parametrize("miner", PICKY.values(), ids=PICKY)
@pytest.mark.parametrize("case", PAIR_LOSSES)
@pytest.mark.parametrize("reducer", [None, "MeanReducer", "SumReducer", "AvgNonZeroReducer"])
def test_a_call_with_few_pairs(miner, case, reducer):
    """By pytorch-metric-learning some have no loss. What a chunk pays must not depend on that."""
    loss, one_sided, miner = CASES[case]().double(), miner in (PICKY["positives"], PICKY["negatives"]), miner()
    if reducer is not None:
        own = {name: getattr(reducers, reducer)() for name in loss.sub_loss_names()}
        loss.reducer = reducers.MultipleReducers(own) if len(own) > 1 else next(iter(own.values()))
    centres = F.normalize(torch.randn(5, D, dtype=torch.float64))
    pays = False
    for n in (1, 2, 3, 7, 20, 60):
        labels, of_bank = torch.randint(5, (B,)), torch.randint(5, (n,))
        noise = 0.3 * torch.randn(B + n, D, dtype=torch.float64)
        z, bank = F.normalize(centres[torch.cat((labels, of_bank))] + noise).split((B, n))
        z, again = z.clone().requires_grad_(), z.clone().requires_grad_()
        picked = None if miner is None else miner(again.detach(), labels, bank, of_bank)
        expected = loss(again, labels, picked, bank, of_bank)
        pays |= bool(expected != 0)
        for anchors in (1, 3, B):
            value = ops.memory_loss(z, labels, bank, of_bank, InChunks(loss, miner, anchors=anchors), renormalize=False)
            compare(loss, value, z, expected, again)
    assert pays or one_sided


@pytest.mark.parametrize("anchors", [1, 2, 4])
def test_anchors_without_an_active_triplet_pay_for_their_boundary(anchors):
    """A MarginLoss divides that by the number of active pairs, which may be those of others alone."""
    loss = losses.MarginLoss(nu=0.3, learn_beta=True, num_classes=2).double()
    z = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0.9], [0, 1, 0]], dtype=torch.float64))
    bank = F.normalize(torch.tensor([[1.0, 0.05, 0], [-1, 0.1, 0], [-1, 1, 0]], dtype=torch.float64))
    labels, of_bank = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])
    z, again = z.clone().requires_grad_(), z.clone().requires_grad_()
    value = ops.memory_loss(z, labels, bank, of_bank, InChunks(loss, anchors=anchors), renormalize=False)
    compare(loss, value, z, loss(again, labels, None, bank, of_bank), again)
    far = -bank  # nothing is active, and nothing is divided by 0
    value = ops.memory_loss(z, labels, far, of_bank * 0 + 5, InChunks(loss, anchors=anchors), renormalize=False)
    assert value == 0


def test_one_pair_of_each_kind_costs_nothing():
    """As in one call, by losses over pairs."""
    z, bank = torch.eye(1, 4), F.normalize(torch.ones(2, 4) + torch.eye(2, 4).flip(0))
    labels, of_bank = torch.tensor([0]), torch.tensor([0, 1])
    for case, pays in (("contrastive", False), ("supcon", False), ("triplet", True), ("angular", True)):
        loss = CASES[case]()
        value = ops.memory_loss(z, labels, bank, of_bank, InChunks(loss))
        torch.testing.assert_close(value, torch.as_tensor(loss(z, labels, None, bank, of_bank)))
        assert bool(value > 0) == pays


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_of_a_batch_against_itself(case):
    loss = case().double()
    z, labels = rows(B)
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    compare(loss, ops.batch_loss(z, labels, InChunks(loss)), z, loss(again, labels), again)


@pytest.mark.parametrize("case", ["contrastive", "nca", "triplet", "supcon"])
def test_pairs_that_are_none(case):
    """Each anchor against what it may be ranked against, by calls of the loss alone."""
    loss, summed = CASES[case](), CASES[case]()
    z, labels = rows(B)
    m = state.filled(M, D, 50, torch.float64, pending=True)
    m.bank_labels.random_(5), m.bank_ids.copy_(torch.randint(0, 99, (M,)))
    exclude, anchors = m.bank_ids[:B].clone(), torch.rand(B) < 0.8
    exclude[::3] = -1
    options = {"count": m.count, "scale": m.scale, "shift": m.shift, "anchors": anchors}
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    value = ops.memory_loss(
        z, labels, m.bank, m.bank_labels, InChunks(loss, anchors=3), bank_ids=m.bank_ids, exclude=exclude, **options
    )
    moved = F.normalize(m.bank * m.scale + m.shift)[: int(m.count)]

    def one_by_one(seen, of_rows, may):
        """Loss by a reducer that divides by what it has counted."""
        counted = {}
        for i in range(B):
            if anchors[i] and may[i].any():
                two = again[[i, i]]  # an NCALoss asks for two
                inner = copy.deepcopy(summed)
                inner.reducer = reducers.DoNothingReducer()
                for name, info in inner(two, labels[[i, i]], None, seen[may[i]], of_rows[may[i]]).items():
                    if isinstance(info["losses"], torch.Tensor):
                        counted.setdefault(name, []).append(info["losses"])
        total = 0.0
        for parts in counted.values():
            costs = torch.cat(parts)
            of_nonzero = case != "nca"
            total = total + costs.sum() / ((costs > 0).sum() if of_nonzero else len(costs))
        return total

    may = exclude[:, None] != m.bank_ids[: int(m.count)]
    compare(loss, value, z, one_by_one(moved, m.bank_labels[: int(m.count)], may), again)

    ids = torch.randint(-1, 6, (B,))
    value = ops.batch_loss(z, labels, InChunks(loss), ids=ids, anchors=anchors)
    may = ~torch.eye(B, dtype=torch.bool) & ((ids[:, None] < 0) | (ids[:, None] != ids))
    compare(loss, value, z, one_by_one(again, labels, may), again)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_round_counts(default):
    """Lightning sets it to 16 bits for a whole step; in float16 more than 65,504 triplets would count as infinite."""

    def step():
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()
        criterion = CrossBatchMemory(InChunks(losses.TripletMarginLoss(margin=1)), 8, 192, drift="none")
        for _ in range(2):
            value = criterion(x, torch.arange(96) % 4)
        value.backward()
        return value.detach(), x.grad

    expected = step()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = step()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert expected[0] > 0


def test_every_loss_is_in_the_list():
    named = {name for name in dir(losses) if isinstance(getattr(losses, name), type)}
    of_one = {name for name in named if issubclass(getattr(losses, name), losses.BaseMetricLossFunction)}
    tried = {type(case()).__name__ for case in CASES.values()}
    assert of_one - NOT_WITH_REFERENCES - set(xbn_ext.losses.in_chunks.BY_BATCH) == tried
    page = (Path(__file__).parents[1] / "docs/losses.md").read_text()
    bases = {"BaseMetricLossFunction", "GenericPairLoss"}
    assert [name for name in sorted(of_one - bases) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("options", [{}, {"update": "deferred", "enqueue": "before", "warmup_steps": 1}], ids=str)
def test_a_memory_trains_as_with_the_native_loss(options):
    theirs = losses.ContrastiveLoss(0.9, 0.1, distance=distances.CosineSimilarity())
    native = xbn_ext.Contrastive(0.9, 0.1, reduction="avg_nonzero")
    memories = [CrossBatchMemory(loss, D, 50, **options) for loss in (InChunks(theirs), native)]
    for step in range(5):
        x, labels = torch.randn(20, D), torch.randint(5, (20,))
        ids, mask = torch.randint(0, 30, (20,)), torch.rand(20) < 0.3
        if step == 2:
            x[0, 0], mask[0] = torch.nan, False
        leaves = [x.clone().requires_grad_() for _ in memories]
        for m in memories:
            m.train(step != 3)
        values = [m(leaf, labels, ids=ids, enqueue_mask=mask) for m, leaf in zip(memories, leaves, strict=True)]
        for value in values:
            value.backward()
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6, equal_nan=True)
        if step != 2:
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
        for (name, t), expected in zip(
            memories[0].named_state(), dict(memories[1].named_state()).values(), strict=True
        ):
            if name == "pairs":
                assert t.isnan().all()
            else:
                torch.testing.assert_close(t, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_an_anchor_that_is_not_finite_has_no_gradient_and_the_others_theirs():
    loss = InChunks(losses.SupConLoss())
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    z[3, 1] = torch.inf
    z.requires_grad_()
    value = ops.memory_loss(z, labels, bank, of_bank, loss)
    value.backward()
    assert value.isnan() and z.grad[3].isnan().all()
    others = torch.arange(B) != 3
    clean = z.detach()[others].requires_grad_()
    ops.memory_loss(clean, labels[others], bank, of_bank, loss).backward()
    torch.testing.assert_close(z.grad[others], clean.grad)
    assert ops.memory_loss(z.detach(), labels, bank, of_bank, loss, anchors=others).isfinite()
    assert ops.batch_loss(z, labels, loss).isnan()


class Own(nn.Module):
    """No loss of pytorch-metric-learning, but called like one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        if ref_emb is None:
            ref_emb = embeddings
        return F.softplus(self.scale * embeddings @ ref_emb.T).mean()


def test_a_loss_without_a_reducer_is_a_mean_over_anchors():
    loss = Own().double()
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    value = ops.memory_loss(z, labels, bank, of_bank, InChunks(loss, anchors=4), renormalize=False)
    compare(loss, value, z, loss(again, labels, None, bank, of_bank), again)
    memory = CrossBatchMemory(InChunks(loss), D, 50)
    assert [name for name, _ in memory.named_parameters()] == ["loss.loss.scale"]
    memory(z.detach().float(), labels).backward()
    assert loss.scale.grad != 0
    inner = losses.MultiSimilarityLoss()  # a mean over anchors, too
    reducer = inner.reducer
    value = ops.memory_loss(z, labels, bank, of_bank, InChunks(Around(inner), anchors=4), renormalize=False)
    compare(inner, value, z, inner(again, labels, None, bank, of_bank), again)
    assert inner.reducer is reducer


class MeanProduct(xbn_ext.CustomLoss):
    reduction = "mean"

    def positive(self, s):
        return s.square()

    negative = positive

    def anchor(self, positives, negatives):
        return positives


def mean_product(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
    s = embeddings @ (embeddings if ref_emb is None else ref_emb).T
    others = torch.ones_like(s) if ref_emb is not None else 1 - torch.eye(len(s), dtype=s.dtype)
    return ((s.square() * others).sum(1) / others.sum(1)).mean()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize_embeddings", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("ids", [None, torch.arange(9) // 2], ids=["no ids", "ids"])
def test_what_has_unit_length_is_as_with_other_losses(ids, normalize_embeddings, renormalize, kind):
    options = {"normalize_embeddings": normalize_embeddings, "renormalize": renormalize, "memory_dtype": kind}
    memories = [CrossBatchMemory(loss, D, 50, **options) for loss in (InChunks(mean_product), MeanProduct())]
    for scale in (1, 5, 0.1, 1e-8):
        x, labels = scale * torch.randn(9, D, dtype=kind), torch.zeros(9, dtype=torch.int64)
        x[0] = 0
        leaves = [x.clone().requires_grad_() for _ in memories]
        values = [memory(leaf, labels, ids=ids) for memory, leaf in zip(memories, leaves, strict=True)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 / scale)


def test_an_anchor_that_may_meet_no_row_pays_nothing_and_counts():
    """All rows have its id. No reducer of pytorch-metric-learning counts it."""
    (z, _), (bank, _) = rows(4), rows(5)
    z, labels, of_bank = z.requires_grad_(), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    exclude, others = torch.tensor([-1, 0, -1, -1]), [0, 2, 3]

    def both(loss):
        ranked = {"bank_ids": torch.zeros_like(of_bank), "exclude": exclude}
        whole = ops.memory_loss(z, labels, bank, of_bank, loss, **ranked)
        return whole, ops.memory_loss(z[others], labels[others], bank, of_bank, loss)

    of_custom, _ = both(MeanProduct())
    whole, some = both(InChunks(mean_product))
    torch.testing.assert_close((whole, whole), (of_custom, some * 3 / 4))
    torch.testing.assert_close(*(torch.autograd.grad(value, z)[0] for value in (whole, of_custom)))
    torch.testing.assert_close(*both(InChunks(losses.MultiSimilarityLoss(reducer=reducers.MeanReducer()))))
    assert ops.batch_loss(z, labels, InChunks(mean_product), ids=torch.zeros_like(labels)) == 0


def test_a_batch_of_unit_rows_is_one_call():
    calls = []

    def loss(embeddings, labels, indices_tuple=None, *references):
        calls.append((len(embeddings), len(references)))
        return mean_product(embeddings, labels, indices_tuple, *references)

    for kind in (torch.float32, torch.float64):
        x, labels = torch.rand(B, 500, dtype=kind), torch.arange(B)
        x[3] = 0
        for z in (xbn_ext.ops.normalize(x), F.normalize(x)):
            calls.clear()
            one = ops.batch_loss(z, labels, InChunks(loss))
            assert calls == [(B, 0)] and one == ops.batch_loss(z, labels, InChunks(loss), renormalize=False)
        calls.clear()
        ops.batch_loss(x, labels, InChunks(loss))
        assert calls == [(2, 2)] * B, "each against the others, twice, since an NCALoss asks for two"


def test_a_sum_and_a_number_of_one_element_each_are_scalars():
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    loss = InChunks(lambda e, *_: (e.sum()[None], torch.ones(1)), anchors=4)
    assert ops.memory_loss(z, labels, bank, of_bank, loss).shape == ()


def smooth_ap(s, positive, temperature):
    """Of similarities [B, n], pair by pair."""
    costs = []
    for i in range(len(s)):
        ratios = []
        for p in positive[i].nonzero()[:, 0].tolist():
            ranks = [1.0, 1.0]
            for j in range(s.shape[1]):
                if j != p and s[i, j].isfinite():
                    ahead = torch.sigmoid((s[i, j] - s[i, p]) / temperature)
                    ranks = [ranks[0] + ahead * positive[i, j], ranks[1] + ahead]
            ratios.append(ranks[0] / ranks[1])
        if ratios:
            costs.append(1 - torch.stack(ratios).mean())
    return torch.stack(costs).mean()


def test_smooth_average_precision():
    loss = SmoothAP(temperature=0.3)
    (z, labels), (bank, of_bank) = rows(B), rows(M)
    labels[0] = 7  # no other row is of this class
    z, again = z.requires_grad_(), z.detach().clone().requires_grad_()
    value = ops.memory_loss(z, labels, bank, of_bank, loss)
    unit = F.normalize(again)
    compare(loss, value, z, smooth_ap(unit @ bank.T, labels[:, None] == of_bank, 0.3), again)
    s = (unit @ unit.T).masked_fill(torch.eye(B, dtype=torch.bool), torch.inf)
    same = (labels[:, None] == labels) & ~torch.eye(B, dtype=torch.bool)
    compare(loss, ops.batch_loss(z, labels, loss), z, smooth_ap(s, same, 0.3), again)
    memory = CrossBatchMemory(SmoothAP(), D, 50)
    for _ in range(2):
        x, labels = torch.randn(20, D, requires_grad=True), torch.randint(5, (20,))
        with torch.device("meta"):  # another default device
            value = memory(x, labels)
        value.backward()
    with pytest.raises(ValueError, match="temperature must be"):
        SmoothAP(0)


class Counting(Own):
    """Keeps how many anchors it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, embeddings, *args):
        self.seen += len(embeddings)
        return super().forward(embeddings, *args)


def test_what_a_loss_keeps_is_of_the_batch():
    loss = Counting()
    memory = CrossBatchMemory(InChunks(loss), D, 50, batch_weight=0)
    for _ in range(3):
        memory(torch.randn(B, D), torch.arange(B))
    assert loss.seen == 2 * B, "the first time there were no rows"


def test_trying_a_loss_out_draws_no_random_number():
    def drawn(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None):
        return (embeddings * torch.rand(())).sum(), len(embeddings)

    before = torch.get_rng_state()
    CrossBatchMemory(InChunks(drawn), D, M, memory_weight=0.0, batch_weight=1.0)(torch.randn(0, D), torch.arange(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_rows_no_pairs():
    loss, (z, labels) = InChunks(losses.ContrastiveLoss()), rows(B)
    z.requires_grad_()
    value = ops.memory_loss(z, labels, z.detach()[:0], labels[:0], loss)
    value.backward()
    assert value == 0 and not z.grad.any()
    assert CrossBatchMemory(loss, D, 50)(z[:0].float(), labels[:0]) == 0
    assert CrossBatchMemory(loss, D, 50)(z[:1].float(), labels[:1]) == 0


class OfThree(reducers.MeanReducer):
    def triplet_reduction(self, losses, *_):
        return losses.topk(3).values.mean()


class Around(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.inner = loss

    def forward(self, *args):
        return self.inner(*args)


class Doubled(losses.SupConLoss):
    def forward(self, *args):
        return 2 * super().forward(*args)


class OverItsWeight(Own):
    def forward(self, embeddings, *args):
        return super().forward(embeddings, *args) * self.scale, self.scale


class Writing(Own):
    """Its references: the memory's rows, and its labels."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, embeddings, labels, indices_tuple=None, *references):
        value = super().forward(embeddings, labels, indices_tuple, *references)
        for t in references[self.which : self.which + 1]:
            t.mul_(2)
        return value


class OfAnother(Own):
    def forward(self, *args):
        return super().forward(*args) * SCALES.sum()


SCALES = nn.Parameter(torch.ones(3))


class Twice(losses.SupConLoss):
    def forward(self, *args):
        super().forward(*args)
        return super().forward(*args)


def test_what_is_wrong_is_named():
    for loss in [kind() for name in xbn_ext.losses.in_chunks.BY_BATCH if (kind := getattr(losses, name, None))]:
        with pytest.raises(ValueError, match=f"by {type(loss).__name__} what an anchor pays depends on the others"):
            InChunks(loss)
    for loss in (xbn_ext.Contrastive(), losses.ContrastiveLoss, InChunks(Own()), None):
        with pytest.raises(TypeError, match="loss must be a loss of pytorch-metric-learning"):
            InChunks(loss)
    with pytest.raises(TypeError, match=r"one of MeanReducer, .*, got PerAnchorReducer"):
        InChunks(losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer()))
    with pytest.raises(TypeError, match="ContrastiveLoss in it has a reducer of its own, MultipleReducers"):
        InChunks(losses.MultipleLosses([losses.ContrastiveLoss()]))
    for inner in (reducers.SumReducer(), reducers.AvgNonZeroReducer()):
        regularizer = regularizers.LpRegularizer(reducer=inner)
        with pytest.raises(TypeError, match=f"LpRegularizer in it has a reducer of its own, {type(inner).__name__}"):
            InChunks(losses.ContrastiveLoss(embedding_regularizer=regularizer))
    with pytest.raises(TypeError, match=r"its reducer must be one of MeanReducer, .*, got OfThree"):
        InChunks(losses.TripletMarginLoss(reducer=OfThree()))
    for miner in (miners.HDCMiner(), miners.UniformHistogramMiner()):
        with pytest.raises(ValueError, match=f"what {type(miner).__name__} picks for an anchor depends on the others"):
            InChunks(losses.ContrastiveLoss(), miner)
    for regularizer in (regularizers.CenterInvariantRegularizer(), regularizers.RegularFaceRegularizer()):
        for loss in (losses.NCALoss, losses.MarginLoss):
            with pytest.raises(ValueError, match=f"by {type(regularizer).__name__} what an anchor pays depends on the"):
                InChunks(loss(embedding_regularizer=regularizer))
    for loss in (losses.TripletMarginLoss(swap=True), Around(losses.TripletMarginLoss(swap=True))):
        with pytest.raises(ValueError, match="TripletMarginLoss with swap takes no references"):
            InChunks(loss)
    for loss in (losses.IntraPairVarianceLoss(), losses.VICRegLoss()):
        with pytest.raises(ValueError, match=f"by {type(loss).__name__} what an anchor pays depends on the others"):
            InChunks(Around(loss))
    with pytest.raises(ValueError, match="miner: NCALoss weighs an anchor by how often"):
        InChunks(Around(losses.NCALoss()), miners.PairMarginMiner())
    with pytest.raises(TypeError, match="miner must be None or a miner"):
        InChunks(losses.ContrastiveLoss(), miners.BatchHardMiner)
    with pytest.raises(ValueError, match="anchors must be an integer >= 1, got 0"):
        InChunks(losses.ContrastiveLoss(), anchors=0)
    with pytest.raises(TypeError, match="got ContrastiveLoss, which InChunks takes"):
        CrossBatchMemory(losses.ContrastiveLoss(), D)
    with pytest.raises(TypeError, match="InChunks is not called itself"):
        InChunks(losses.ContrastiveLoss())(torch.zeros(2, D), torch.arange(2))


@pytest.mark.parametrize(
    "loss, error",
    [
        (losses.FastAPLoss(), "ref_emb is not supported"),
        (lambda *args: torch.zeros(3), "without a reducer it must return a scalar, or a sum and a number, got"),
        (Around(losses.NTXentLoss()), "NTXentLoss in it averages over pairs or triplets"),
        (lambda e, *_: (e.sum(1), 1), r"a scalar, or a sum and a number, got \[4\] and int"),
        (lambda e, *_: (float(e.sum()), 1), "a scalar, or a sum and a number, got float and int"),
        (lambda e, *_: (e.sum(), e.sum(1)), r"a scalar, or a sum and a number, got \[\] and \[4\]"),
        (lambda e, *_: (e.sum(), "4"), r"a scalar, or a sum and a number, got \[\] and str"),
        (lambda e, *_: (e.sum(), -4), "the number that its sum is divided by must not be negative, got -4"),
        (lambda e, *_: (e.sum(), torch.tensor([-0.5])), "divided by must not be negative, got -0.5"),
        (OverItsWeight(), "the number that its sum is divided by must not require a gradient"),
        (
            losses.MultiSimilarityLoss(reducer=reducers.ClassWeightedReducer(torch.rand(5))),
            r"weights of all: .* \[4, 1\]",
        ),
        (losses.CircleLoss(reducer=reducers.ClassWeightedReducer(torch.rand(5))), r"weights of all: .* \[4, 1\]"),
        (Writing(0), "it, or its miner, writes ref_emb or ref_labels in place"),
        (Writing(1), "it, or its miner, writes ref_emb or ref_labels in place"),
        (Doubled(), "it must call its reducer once, and return what that returns"),
        (Twice(), "it must call its reducer once, and return what that returns"),
        (OfAnother(), r"it depends on a tensor \[3\] that requires a gradient and would get none"),
    ],
)
def test_a_loss_that_raises_leaves_the_memory_as_it_was(loss, error):
    memory = CrossBatchMemory(InChunks(loss), D, 50)
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises((ValueError, TypeError), match=error):
        memory(torch.randn(6, D), torch.arange(6) % 2)
    assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("anchors", 0, "anchors must be an integer >= 1, got 0"),
        ("loss", losses.VICRegLoss(), "by VICRegLoss what an anchor pays depends on the others"),
        ("miner", miners.HDCMiner(), "what HDCMiner picks for an anchor depends on the others"),
    ],
)
def test_what_is_set_later_raises_before_the_memory_moves(name, value, error):
    loss = InChunks(losses.ContrastiveLoss(), miners.PairMarginMiner())
    memory, batch = CrossBatchMemory(loss, D, 50), (torch.randn(6, D), torch.arange(6) % 2)
    memory(*batch)
    before = copy.deepcopy(dict(memory.named_state()))
    setattr(loss, name, value)
    with pytest.raises(ValueError, match=error):
        memory(*batch)
    torch.testing.assert_close(dict(memory.named_state()), before, rtol=0, atol=0, equal_nan=True)


def test_it_says_what_it_is():
    assert "anchors=8" in repr(SmoothAP(0.05)) and "temperature=0.05" in repr(SmoothAP(0.05))
