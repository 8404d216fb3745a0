"""What many processes tell each other: how much, without a wait where that can be, and of what differs or fails."""

import os
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
from loss_cases import LOSSES
from processes import context
from ranks import (
    D,
    Divided,
    M,
    _rank,
    alone_and_together,
    assert_same_state,
    assert_same_step,
    few,
    hosts_tell_each_other_nothing,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import HOST, received
from benchmarks.ranks import collectives as number_of_collectives
from xbn_ext import DCLW, Contrastive, CrossBatchMemory, SupCon, collectives


def a_rank_receives_what_the_benchmark_says(rank):
    W, S = dist.get_world_size(), ranks.SHARDS
    gather, exchange = collectives.gather, collectives.exchange
    for loss, batch_size, told in (
        (SupCon(), None, True),
        (Contrastive(), None, True),
        (LOSSES["mined"], None, True),
        (SupCon(), 6, True),
        (SupCon(), 6, False),
        (DCLW(), None, True),
    ):
        together, received_bytes = ranks.shared(loss, batch_size=batch_size), []

        def counted_gather(t, size, name, its=received_bytes):
            its.append((size - 1) * t.nbytes)
            return gather(t, size, name)

        def counted_exchange(t, sent, received, name, its=received_bytes):
            own = received[rank % len(received)]
            its.append(t.nbytes // t.shape[0] * (sum(received) - own))
            return exchange(t, sent, received, name)

        collectives.gather, collectives.exchange = counted_gather, counted_exchange
        with nullcontext() if told else hosts_tell_each_other_nothing():
            together(*Divided(0).part()[:2]).backward()
        collectives.gather, collectives.exchange = gather, exchange
        of_hosts = 0 if told else (W - 1) * HOST
        divides = not loss.gives_in_common
        assert sum(received_bytes) == received(W, 6, D, shards=S, loss=loss, divides_batch=divides) - of_hosts
        assert len(received_bytes) == number_of_collectives(S, loss, divides_batch=divides) - (not told)


class WithoutWaiting(TorchDispatchMode):
    """Raises where a GPU's host would wait: for a value, or until numbers of its own, such as a list that is an index,
    have been copied."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "index.Tensor", "index_put", "nonzero", "lift_fresh", "equal.default")
        assert not any(name in str(op) for name in names), op
        return op(*args, **(kwargs or {}))


def with_a_batch_size_no_host_waits(rank):
    """On a GPU."""
    losses = [loss for loss in LOSSES.values() if loss.passes]
    for loss, update in few(losses, ("inplace", "deferred")):
        _, together = alone_and_together(loss, 6, update=update)
        for step in range(2):
            own, labels, options = Divided(step, ids=True, mask=True).part()
            with hosts_tell_each_other_nothing(), WithoutWaiting():
                together(own, labels, **options).backward()
                together.stats()


def the_hosts_agree_where_torch_makes_no_plain_tensors(rank):
    alone, together = alone_and_together(SupCon())
    x, labels, _ = Divided(0).part()
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func where it writes its memory"):
        torch.func.grad(lambda x: together(x, labels))(x.detach())
    its = "cannot be transformed by torch.func where it has a process_group"
    with torch.no_grad(), pytest.raises(RuntimeError, match=its):
        together.eval()
        torch.func.vmap(lambda x: together(x, labels))(x.detach()[None])
    together.train()
    with torch.device("meta"):
        together(x, labels)
    alone(*Divided(0).whole()[:2])
    assert_same_state(alone, together)


def what_differs_is_named_on_every_rank(rank):
    def raises(message, make):
        with pytest.raises(ValueError, match=message):
            make()

    last = rank == dist.get_world_size() - 1
    group = dist.group.WORLD
    raises(
        r"^memory_size must be the same on every rank, got 37 on rank \d and 38 on rank \d$",
        lambda: CrossBatchMemory(SupCon(), D, M + last, process_group=group),
    )
    raises("^loss must be", lambda: CrossBatchMemory(SupCon(0.1 + last), D, M, process_group=group))
    first = nn.Parameter(torch.tensor(0.1 + last))
    raises(
        r"^loss must be .*temperature=0\.1.* and .*temperature=1\.1",
        lambda: CrossBatchMemory(SupCon(first), D, M, process_group=group),
    )
    raises("^batch_size must be", lambda: CrossBatchMemory(SupCon(), D, M, process_group=group, batch_size=6 + last))
    for batch_size in (None, 6):
        alone, together = alone_and_together(SupCon(), batch_size)
        batch = Divided(0)
        x, labels, _ = batch.part()
        step = partial(together, x, labels)
        together.memory_weight = 1.0 + last
        raises(r"^memory_weight must be .* got 1\.0 on rank \d and 2\.0 on rank \d$", step)
        together.memory_weight = 1.0
        together.train(not last)  # as one does that has left out its last step
        raises("^training must be .* got True on rank .* and False on rank", step)
        together.train()
        raises("^embeddings' dtype must be", partial(together, x.double() if last else x, labels))
        raises("^enqueue_mask must be", partial(step, enqueue_mask=labels > 0 if last else None))
        if batch_size is not None:
            raises("^ids must be .* got None on .* and ids on", partial(step, ids=labels if last else None))
        assert_same_state(alone, together)
        assert_same_step(alone, together, batch)  # and nothing is left of it


def where_hosts_tell_nothing_what_differs_still_raises(rank):
    """As on a GPU, when the step runs there."""
    alone, together = alone_and_together(SupCon(), 6)
    x, labels, _ = Divided(0).part()
    odd = int(rank == 1)

    def raises(x=x, **options):
        with hosts_tell_each_other_nothing(), pytest.raises(RuntimeError, match=r"are at different calls: .* options"):
            together(x, labels, **options)

    together.memory_weight = 1.0 + odd
    raises()
    together.memory_weight = 1.0
    together.train(not odd)
    raises()
    together.train()
    raises(ids=labels if odd else None)
    raises(x.double() if odd else x)
    together.step += odd
    raises()
    together.step -= odd
    assert_same_state(alone, together)
    assert_same_step(alone, together, Divided(0))


def a_fault_of_one_rank_is_raised_on_all(rank):
    for batch_size in (None, 6):
        alone, together = alone_and_together(SupCon(), batch_size)
        x, labels, _ = Divided(0).part()
        faults = [
            (r"ValueError: embeddings must be \[B, embedding_size=8\], got \[6, 3\]", x[:, :3], labels),
            ("TypeError: embeddings must be", x.detach().long(), labels),
            ("ValueError: labels must be", x, labels[1:]),
        ]
        if batch_size is not None:
            faults.append(("ValueError: embeddings must have batch_size=6 rows .* got 5", x[1:], labels[1:]))
        for text, *bad in faults:
            kind, its = text.split(": ", 1)
            began = time.monotonic()
            if rank == 1:
                with pytest.raises((ValueError, TypeError), match=its) as raised:
                    together(*bad)
                assert type(raised.value).__name__ == kind
            else:
                with pytest.raises(RuntimeError, match=f"^rank 1 takes no step: {text}"):
                    together(x, labels)
            assert time.monotonic() - began < 30
            assert_same_state(alone, together)
        assert_same_step(alone, together, Divided(0))


def a_call_that_one_rank_leaves_out_is_an_error_on_the_others(rank):
    """When its group's timeout has passed, since it may be late. Nothing is written."""
    for (batch_size,) in few((None, 6)):
        group = dist.new_group(timeout=timedelta(seconds=5))
        _, together = alone_and_together(SupCon(), batch_size, process_group=group)
        x, labels, _ = Divided(0).part()
        together(x, labels)
        if rank != 1:
            its = f"^rank {rank} of .* has called a CrossBatchMemory after 1 steps, and another rank has not"
            with pytest.raises(RuntimeError, match=its):
                together(x, labels)
            assert together.step == 1


def ranks_at_different_steps_raise(rank):
    for batch_size in (None, 6):
        _, together = alone_and_together(SupCon(), batch_size)
        x, labels, _ = Divided(0).part()
        together(x, labels)
        together.step += int(rank == 0)
        its = "are at different calls: the memory of rank 0 has taken 2 steps, that of rank 1 1$"
        for call in (partial(together, x, labels), partial(together.fill_from, [(x.detach(), labels)])):
            with pytest.raises(RuntimeError, match=its):
                call()
        assert together.count == min(M, 6 * dist.get_world_size())


CHECKS = [
    a_rank_receives_what_the_benchmark_says,
    with_a_batch_size_no_host_waits,
    what_differs_is_named_on_every_rank,
    where_hosts_tell_nothing_what_differs_still_raises,
    a_fault_of_one_rank_is_raised_on_all,
    a_call_that_one_rank_leaves_out_is_an_error_on_the_others,
    ranks_at_different_steps_raise,
]
WITHOUT_SHARDS = [
    the_hosts_agree_where_torch_makes_no_plain_tensors,
]


@ranks.on_grids([*ranks.REPLICATED, *ranks.SHARDED])
def test_ranks(W, S, tmp_path):
    ranks.launch(W, tmp_path / "store", *CHECKS, *([] if S > 1 else WITHOUT_SHARDS), shards=S)


def _dies(rank):
    _, together = alone_and_together(SupCon())
    together(*Divided(0).part()[:2])
    if rank == 1:
        os._exit(9)  # as an error on its GPU would end it
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        together(*Divided(1).part()[:2])
    assert time.monotonic() - began < 30
    os._exit(0)  # what else a group does, it does with the dead one


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    both = [context().Process(target=_rank, args=(r, 2, tmp_path / "store", [_dies])) for r in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 9]
