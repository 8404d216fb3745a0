"""Many processes with one memory: what each of them computes is what one process does with the whole batch."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
from loss_cases import KIN, LOSSES
from own_losses import Exponents
from ranks import (
    D,
    Divided,
    M,
    alone_and_together,
    assert_close,
    assert_same_bits,
    assert_same_state,
    assert_same_step,
    divide,
    few,
    hosts_tell_each_other_nothing,
    same_steps,
)
from torch import nn

from xbn_ext import (
    DCLW,
    Contrastive,
    CrossBatchMemory,
    Margin,
    SelectPairs,
    SigLIP,
    SupCon,
    Triplet,
    shared_batch_loss,
    shared_step,
)
from xbn_ext.distributed import Batch

BATCHES = [
    {}, {"sizes": "uneven", "ids": True, "mask": True}, {"sizes": "one empty", "ids": True}, {"sizes": "all empty"},
    {"sizes": "uneven", "ids": True, "ids_on": 1},
]  # fmt: skip
KINDS = [loss for name, loss in LOSSES.items() if name not in KIN]
MODES = [
    {"drift": drift, "update": update, "enqueue": enqueue}
    for drift, update, enqueue in itertools.product(
        ("none", "xbn", "axbn", "ema"), ("inplace", "deferred"), ("after", "before")
    )
]


def every_loss_is_that_of_one_process(rank):
    for loss, batch in few([*LOSSES.values()], BATCHES):
        same_steps(loss, batch)
    same_steps(LOSSES["mined"], {"sizes": "uneven", "dtype": torch.float64})


def all_may_rank_all(rank):
    """Where that is faster; then loss and gradient have the bits of one process, too."""
    divide(memory=False, batch=False)
    W = dist.get_world_size()
    learned = SupCon(nn.Parameter(torch.tensor(0.2)))
    for loss, batch in few([*KINDS, learned], BATCHES[:3]):
        alone, together = alone_and_together(copy.deepcopy(loss))  # a gradient of its own
        for step in range(4):
            parts = Divided(step, **batch)
            (x, labels, options), (own, own_labels, own_options) = parts.whole(), parts.part()
            expected, value = alone(x, labels, **options), together(own, own_labels, **own_options)
            expected.backward(), value.backward()
            assert_same_bits(value, expected)
            assert_same_bits(own.grad, W * x.grad[parts.own])
            assert_same_state(alone, together, assert_same_bits)
            for name, parameter in alone.named_parameters(recurse=False):
                assert_same_bits(getattr(together, name).grad, parameter.grad)
    divide(memory=True, batch=True)


def the_memory_or_the_batch_alone_may_be_divided(rank):
    """All triplets of a memory always are ranked by all."""
    for memory in (True, False):
        divide(memory=memory, batch=not memory)
        for loss, batch in few(KINDS, BATCHES[:3]):
            same_steps(loss, batch, steps=3)
        same_steps(SupCon(nn.Parameter(torch.tensor(0.2))), {"sizes": "uneven", "ids": True, "mask": True})
        same_steps(SupCon(), {"sizes": "uneven"}, batch_weight=0.0, enqueue="before")
        same_steps(SupCon(), {"sizes": "uneven"}, memory_weight=0.0)
        a_gradient_is_centred_over_all_anchors()
    divide(memory=True, batch=True)


def a_gradient_is_centred_over_all_anchors():
    for batch in ({"sizes": "uneven", "mask": True}, {"sizes": "one empty", "ids": True}):
        for loss in (SupCon(), Contrastive(), Triplet()):
            same_steps(loss, batch, steps=3, center_gradient=True)
        # One step: gradients of a temperature add up to less than each of them.
        learned = SupCon(nn.Parameter(torch.tensor(0.2)))
        same_steps(learned, batch, steps=1, center_gradient=True, enqueue="before")
    spoiled = {"sizes": "uneven", "mask": True, "spoiled": True}
    same_steps(Contrastive(), spoiled, steps=3, center_gradient=True, batch_weight=0.0)
    learned = SupCon(nn.Parameter(torch.tensor(0.2)))
    same_steps(learned, spoiled, steps=2, batch_weight=0.0)


def every_way_to_keep_a_memory_is_that_of_one_process(rank):
    for (options,) in few(MODES):
        same_steps(SupCon(), {"sizes": "uneven", "ids": True}, **options)
    same_steps(SupCon(), {"sizes": "uneven"}, warmup_steps=2, batch_weight=0.5, memory_weight=0.3)
    same_steps(SupCon(), {"sizes": "uneven"}, normalize_embeddings=False, renormalize=False)
    same_steps(SupCon(), {"sizes": "uneven"}, enqueue="before")  # without ids
    same_steps(SupCon(), {"sizes": "uneven"}, no_class=2)
    a_gradient_is_centred_over_all_anchors()
    same_steps(Contrastive(), {"sizes": "one empty"}, memory_dtype=torch.float16)
    same_steps(Contrastive(), {"sizes": "over the memory"})
    same_steps(Contrastive(), {"ids": True, "mask": True}, size=ranks.SHARDS)


def a_learned_temperature_gets_the_whole_gradient(rank):
    same_steps(SupCon(nn.Parameter(torch.tensor(0.2))), {"sizes": "uneven"})
    same_steps(SupCon(torch.tensor(0.2)), {"sizes": "uneven"})
    pair = alone, together = alone_and_together(SupCon(nn.Parameter(torch.tensor(0.2))))
    assert_same_step(*pair, Divided(0))
    batch = Divided(1)
    (x, labels, _), (own, own_labels, _) = batch.whole(), batch.part()
    for criterion in pair:
        criterion.temperature.grad = None
    alone(x, labels).backward()
    with torch.set_grad_enabled(rank != 1):  # what the others get does not depend on it
        value = together(own, own_labels)
    if rank != 1:
        value.backward()
        assert_close(together.temperature.grad, alone.temperature.grad)
        assert_close(own.grad, dist.get_world_size() * x.grad[batch.own])


def a_learned_offset_gets_the_whole_gradient(rank):
    def own(value):
        return nn.Parameter(torch.tensor(value))

    same_steps(SigLIP(own(0.2), own(-2.0)), {"sizes": "uneven", "mask": True})
    same_steps(SigLIP(0.2, own(-2.0)), {"sizes": "one empty"})
    same_steps(Margin(0.3, own(0.4)), {"sizes": "uneven"}, drift="none")
    divide(memory=False, batch=False)
    same_steps(SigLIP(own(0.2), own(-2.0)), {"sizes": "uneven"})
    divide(memory=True, batch=True)


def a_loss_of_ones_own_is_that_of_one_process(rank):
    one, shared = ranks.alone(Exponents()), ranks.shared(Exponents())
    for step, sizes in enumerate(("even", "uneven", "one empty")):
        assert_same_step(one, shared, Divided(step, sizes, ids=True))
        assert_close(shared.loss.margins.grad, one.loss.margins.grad)
    one, shared = (
        make(SelectPairs(SupCon(nn.Parameter(torch.tensor(0.2))), near)) for make in (ranks.alone, ranks.shared)
    )
    for step, sizes in enumerate(("even", "uneven", "one empty")):
        assert_same_step(one, shared, Divided(step, sizes, ids=True))
        assert_close(shared.loss.temperature.grad, one.loss.temperature.grad)


def near(a, b):
    return (a - b).abs() < 2


def a_fixed_number_of_rows_is_as_good(rank):
    same_steps(SupCon(), {"ids": True}, batch_size=6)
    same_steps(SupCon(), {"ids": True, "mask": True}, batch_size=6)
    with hosts_tell_each_other_nothing():
        same_steps(SupCon(), {"ids": True, "mask": True}, batch_size=6)


def embeddings_of_16_bits_travel_as_they_are(rank):
    alone, together = alone_and_together(Contrastive())
    for step in range(2):
        batch = Divided(step, "uneven", torch.bfloat16)
        (x, labels, _), (own, own_labels, _) = batch.whole(), batch.part()
        alone(x, labels).backward()
        together(own, own_labels).backward()
        assert own.grad.dtype == torch.bfloat16
        torch.testing.assert_close(own.grad, dist.get_world_size() * x.grad[batch.own])
        assert_same_state(alone, together)


def rows_that_are_not_finite_stay_out_of_every_copy(rank):
    alone, together = alone_and_together(SupCon())
    for step in range(3):
        batch = Divided(step)
        if step == 1:
            batch.x[-1, 0] = torch.nan
        assert_same_step(alone, together, batch)
    assert together.count == min(M, 18 * dist.get_world_size() - 1)
    pair = alone_and_together(Contrastive(), normalize_embeddings=False, renormalize=False)
    batch = Divided(0, mask=True)
    batch.x[:, 0].abs_()
    batch.x[-1] = torch.tensor([-torch.inf, *[0] * (D - 1)])  # not normalised: all its products are -Inf, which costs 0
    batch.labels[-1], batch.options["enqueue_mask"][-1] = 5, True
    assert_same_step(*pair, batch)


def evaluation_reads_and_writes_nothing(rank):
    alone, together = alone_and_together(SupCon())
    assert_same_step(alone, together, Divided(0))
    alone.eval(), together.eval()
    assert_same_step(alone, together, Divided(1, "uneven"))
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert_close(together(*Divided(2).part()[:2]), alone(*Divided(2).whole()[:2]))
    assert alone.step == 1
    assert_same_state(alone, together)


CHECKS = [
    every_loss_is_that_of_one_process,
    every_way_to_keep_a_memory_is_that_of_one_process,
    a_learned_temperature_gets_the_whole_gradient,
    a_learned_offset_gets_the_whole_gradient,
    a_fixed_number_of_rows_is_as_good,
    embeddings_of_16_bits_travel_as_they_are,
    rows_that_are_not_finite_stay_out_of_every_copy,
    evaluation_reads_and_writes_nothing,
]
WITHOUT_SHARDS = [
    all_may_rank_all,
    the_memory_or_the_batch_alone_may_be_divided,
    a_loss_of_ones_own_is_that_of_one_process,
]


@ranks.on_grids([*ranks.REPLICATED, *ranks.SHARDED])
def test_ranks(W, S, tmp_path):
    ranks.launch(W, tmp_path / "store", *CHECKS, *([] if S > 1 else WITHOUT_SHARDS), shards=S)


@pytest.mark.parametrize("device, W, rows", [("cpu", 2, 1024), ("cpu", 8, 569), ("meta", 2, 2897), ("meta", 8, 1607)])
def test_from_how_many_rows_on_a_batch_is_divided(device, W, rows):
    """As the documentation has it. What is not a CPU counts as a GPU."""
    for N, divides in ((rows, True), (rows - 7, False)):
        batch = Batch(torch.empty(N, 512, device=device), torch.empty(N, device=device))
        assert shared_batch_loss.is_worth_it(SimpleNamespace(size=W), batch, SupCon()) == divides
        assert not shared_batch_loss.is_worth_it(SimpleNamespace(size=W), batch, DCLW())
    assert not shared_batch_loss.is_worth_it(SimpleNamespace(size=1), batch, SupCon())


@pytest.mark.parametrize(("W", "of_screened"), [(2, False), (8, False), (64, True)])
def test_more_ranks_on_a_gpu_for_losses_that_take_its_screen(W, of_screened):
    """Those of `takes_screen` in `csrc/cuda/loss/way.h`."""
    ranks = SimpleNamespace(size=W, shards=SimpleNamespace(size=1))
    bank = SimpleNamespace(device=torch.device("cuda"))
    squared = Contrastive(distance="squared_euclidean")
    for loss in (Contrastive(), Contrastive(reduction="avg_nonzero"), squared, Margin()):
        assert shared_step._divides_memory(ranks, None, bank, loss) == of_screened
    for loss in (Contrastive(distance="euclidean"), SupCon(), Triplet()):
        assert shared_step._divides_memory(ranks, None, bank, loss) == (W > 2)


def test_a_batch_size_is_of_a_group():
    with pytest.raises(ValueError, match="batch_size needs a process_group"):
        CrossBatchMemory(SupCon(), D, M, batch_size=6)
    with pytest.raises(AttributeError, match="batch_size is chosen once"):
        CrossBatchMemory(SupCon(), D, M).batch_size = 6
