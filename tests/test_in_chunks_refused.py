"""What `InChunks` does not take: an error names it, and no memory moves."""

import copy

import pytest
import torch
from chunk_cases import Around, D, Own
from torch import nn

import xbn_ext
from xbn_ext import CrossBatchMemory, InChunks

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses, miners, reducers, regularizers  # noqa: E402


class OfThree(reducers.MeanReducer):
    def triplet_reduction(self, losses, *_):
        return losses.topk(3).values.mean()


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
