"""Losses of pytorch-metric-learning by a few anchors at a time: value and gradients are those of one call."""

import copy
import itertools
from pathlib import Path

import pytest
import state
import torch
import torch.nn.functional as F
from chunk_cases import Around, B, D, M, Own, compare, rows

import xbn_ext
from xbn_ext import CrossBatchMemory, InChunks, ops
from xbn_ext.losses import few_pairs

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402

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
