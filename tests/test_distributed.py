"""Many processes with one memory: what each of them computes is what one process does with the whole batch."""

import copy
import itertools
import os
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from loss_cases import KIN, LOSSES
from processes import context
from ranks import (
    D,
    Divided,
    M,
    _rank,
    alone_and_together,
    assert_close,
    assert_same_bits,
    assert_same_state,
    assert_same_step,
    divide,
    launch,
)
from test_custom import Exponents
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ranks import HOST, received
from benchmarks.ranks import collectives as number_of_collectives
from xbn_ext import (
    Contrastive,
    CrossBatchMemory,
    Margin,
    SigLIP,
    SupCon,
    Triplet,
    collectives,
    distributed,
    shared_batch_loss,
    shared_step,
)
from xbn_ext.distributed import Batch

STEPS = 4
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


def same_steps(loss, batch, steps=STEPS, batch_size=None, size=M, **options):
    pair = alone_and_together(loss, batch_size, size, **options)
    for step in range(steps):
        assert_same_step(*pair, Divided(step, **batch))


# What a process group of any size is tested on, one function after the other; each is a rank's.


REPLICATED, SHARDED = [(2, 1), (3, 1), (4, 1)], [(2, 2), (3, 3), (4, 2), (4, 4)]


def few(*lists):
    """A part of what has one of each list: each grid of ranks without shards has another part, and so has each with."""
    grid = dist.get_world_size(), ranks.SHARDS
    grids = REPLICATED if grid in REPLICATED else SHARDED
    for places in itertools.product(*(range(len(some)) for some in lists)):
        if sum(places) % len(grids) == grids.index(grid):
            yield tuple(some[i] for some, i in zip(lists, places, strict=True))


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
        for step in range(STEPS):
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
    divide(memory=True, batch=True)


def every_way_to_keep_a_memory_is_that_of_one_process(rank):
    for (options,) in few(MODES):
        same_steps(SupCon(), {"sizes": "uneven", "ids": True}, **options)
    same_steps(SupCon(), {"sizes": "uneven"}, warmup_steps=2, batch_weight=0.5, memory_weight=0.3)
    same_steps(SupCon(), {"sizes": "uneven"}, normalize_embeddings=False, renormalize=False)
    same_steps(SupCon(), {"sizes": "uneven"}, enqueue="before")  # without ids
    same_steps(SupCon(), {"sizes": "uneven"}, no_class=2)
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


def a_filled_memory_has_the_batches_of_all(rank):
    for options in ({}, {"memory_dtype": torch.float16}):
        alone, together = alone_and_together(SupCon(), **options)
        W = dist.get_world_size()
        batches = {
            (r, k): Divided(10 * r + k).whole()[:2] for r in range(W) for k in range(1 + r)
        }  # of rank r one more
        in_turn = [[batches[r, k] for r in range(W) if (r, k) in batches] for k in range(W)]
        alone.fill_from(tuple(torch.cat(of) for of in zip(*round_, strict=True)) for round_ in in_turn)
        together.fill_from(batches[rank, k] for k in range(1 + rank))
        assert_same_state(alone, together)


def a_fault_while_filling_leaves_every_copy_as_it_was(rank):
    alone, together = alone_and_together(SupCon())
    assert_same_step(alone, together, Divided(0))

    def batches():
        yield Divided(1).whole()[:2]
        if rank == 0:
            raise OSError("no such image")
        yield Divided(2).whole()[:2]

    with pytest.raises(OSError if rank == 0 else RuntimeError, match="no such image"):
        together.fill_from(batches())
    assert_same_state(alone, together)
    assert_same_step(alone, together, Divided(1))


class Silent(Exception):
    """Of no length, so false, and without a text."""

    def __len__(self):
        return 0

    def __str__(self):
        raise NotImplementedError


class Raises:
    """A source of batches, such as a DataLoader whose workers cannot start."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        raise self.error


def whatever_a_source_of_batches_raises_is_raised_on_all(rank):
    _, together = alone_and_together(SupCon())
    batch = Divided(0).whole()[:2]
    for error, text in ((OSError("too many files"), "OSError: too many files"), (Silent(), "Silent")):
        with pytest.raises(type(error) if rank == 1 else RuntimeError) as raised:
            together.fill_from(Raises(error) if rank == 1 else [batch])
        assert raised.value is error if rank == 1 else str(raised.value) == f"rank 1 takes no step: {text}"
    assert together.count == 0


def a_source_that_would_begin_again_is_read_once(rank):
    class Batches:  # as some loaders are, which begin their next epoch after a StopIteration
        left = 1 + rank

        def __iter__(self):
            return self

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                self.left = 1 + rank
                raise StopIteration
            return Divided(0).whole()[:2]

    _, together = alone_and_together(SupCon(), size=1000)
    together.fill_from(Batches())
    W = dist.get_world_size()
    assert together.count == 6 * W * W * (W + 1) // 2


def a_fill_on_one_rank_and_a_step_on_another_raise(rank):
    alone, together = alone_and_together(SupCon())
    assert_same_step(alone, together, Divided(0))
    x, labels, _ = Divided(1).part()
    for filler in range(2):
        for batches in ([], [(x.detach(), labels)]):
            with pytest.raises(ValueError, match=r"^call must be .*'(fill_from' .* 'forward'|forward' .* 'fill_from')"):
                together.fill_from(batches) if rank == filler else together(x, labels)
    assert_same_state(alone, together)


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


class Network(nn.Module):
    """Without a criterion or, as in a LightningModule, with one."""

    def __init__(self, criterion=None):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()
        self.criterion = criterion

    def forward(self, x, labels=None):
        z = self.layers(x)
        return z if self.criterion is None else self.criterion(z, labels)


def averaged_gradients_are_those_of_one_process(rank):
    for sizes, loss in few(("one empty", "uneven", "even"), (LOSSES["contrastive"], SupCon())):
        alone, together = alone_and_together(loss)
        networks = [Network(), DistributedDataParallel(Network())]
        _assert_same_training(networks, lambda n, x, y, c: c(n(x), y), (alone, together), sizes)


def the_criterion_may_be_inside_of_what_is_wrapped(rank):
    networks = [Network(c) for c in alone_and_together(SupCon())]
    networks[1] = DistributedDataParallel(networks[1])
    _assert_same_training(networks, lambda n, x, y, c: n(x, y), (None, None), "uneven")


def sharded_parameters_get_the_same_gradients(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    networks = [Network(), fully_shard(Network(), mesh=mesh)]
    _assert_same_training(networks, lambda n, x, y, c: c(n(x), y), alone_and_together(SupCon()), "uneven")
    networks = [Network(c) for c in alone_and_together(SupCon(nn.Parameter(torch.tensor([0.2], dtype=torch.float64))))]
    fully_shard(networks[1], mesh=mesh)
    _assert_same_training(networks, lambda n, x, y, c: n(x, y), (None, None), "uneven")


def _assert_same_training(networks, loss_of, criteria, sizes):
    for step in range(3):
        batch = Divided(step, sizes, torch.float64)
        for network, criterion, (x, labels, _) in zip(networks, criteria, (batch.whole(), batch.part()), strict=True):
            loss_of(network, x.detach(), labels, criterion).backward()
        for own, expected in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
            gradient = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-10, atol=1e-12)
        for parameter in itertools.chain(*(network.parameters() for network in networks)):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None


def a_gradient_scaler_decides_alike_on_every_rank(rank):
    _, together = alone_and_together(SupCon())
    parameter = nn.Parameter(torch.eye(D))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        batch = Divided(step)
        if step == 0:
            batch.x[0] = torch.inf  # a row of rank 0
        x, labels, _ = batch.part()
        loss = together(x.detach() @ parameter, labels)
        scaler.scale(loss).backward()
        dist.all_reduce(parameter.grad)
        scaler.step(torch.optim.SGD([parameter], 0.1))
        scaler.update()
        parameter.grad = None
    assert scaler.get_scale() == 2.0


def a_compiled_step_is_the_step(rank):
    learned = nn.Parameter(torch.tensor(0.2))
    for temperature, options in ((0.1, {}), (0.1, {"update": "deferred"}), (learned, {})):
        alone, together = alone_and_together(SupCon(temperature), 6, **options)
        torch.compiler.reset()
        compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
        for step in range(3):
            batch = Divided(step)
            (x, labels, _), (own, own_labels, _) = batch.whole(), batch.part()
            expected, value = alone(x, labels), compiled(own, own_labels)
            expected.backward(), value.backward()
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(own.grad, dist.get_world_size() * x.grad[batch.own])
            for name, parameter in alone.named_parameters(recurse=False):
                torch.testing.assert_close(getattr(together, name).grad, parameter.grad)
        assert_same_state(alone, together, torch.testing.assert_close)
    together.memory_weight = 2.0 if rank == 1 else 1.0
    with pytest.raises(RuntimeError, match=r"are at different calls: .* options differ"):
        compiled(own, own_labels)
    alone.memory_weight = together.memory_weight = 2.0  # by now a variable of a graph
    torch.testing.assert_close(compiled(own, own_labels), alone(x, labels))
    _, together = alone_and_together(SupCon())
    with pytest.raises(Exception, match="batch_size must be given to compile"):
        torch.compile(together, fullgraph=True, backend="aot_eager")(*Divided(0).part()[:2])


def a_rank_receives_what_the_benchmark_says(rank):
    W, S = dist.get_world_size(), ranks.SHARDS
    gather, exchange = collectives.gather, collectives.exchange
    for loss, batch_size, told in (
        (SupCon(), None, True),
        (Contrastive(), None, True),
        (LOSSES["mined"], None, True),
        (SupCon(), 6, True),
        (SupCon(), 6, False),
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
        assert sum(received_bytes) == received(W, 6, D, shards=S, loss=loss, divides_batch=True) - of_hosts
        assert len(received_bytes) == number_of_collectives(S, loss, divides_batch=True) - (not told)


def copies_share_the_group(rank):
    _, together = alone_and_together(SupCon())
    assert copy.deepcopy(together).process_group is together.process_group is dist.group.WORLD
    averaged = AveragedModel(Network(together))
    assert averaged.module.criterion.process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="cannot be pickled: save its state_dict"):
        torch.save(together, os.devnull)
    assert f"rank {rank} of {dist.get_world_size()}" in repr(together)


def a_state_goes_from_many_processes_to_one_and_back(rank):
    alone, together = alone_and_together(SupCon())
    for step in range(2):
        assert_same_step(alone, together, Divided(step))
    again, together_again = alone_and_together(SupCon())
    again.load_state_dict(together.state_dict())
    together_again.load_state_dict(alone.state_dict())
    for step in range(2, 4):
        assert_same_step(again, together, Divided(step))
        assert_same_step(alone, together_again, Divided(step))


def a_checkpoint_of_all_is_that_of_one(folder, rank):
    alone, together = alone_and_together(SupCon())
    for step in range(2):
        assert_same_step(alone, together, Divided(step))
    checkpoint.save({"criterion": together.state_dict()}, checkpoint_id=folder)
    again, together_again = alone_and_together(SupCon())
    for criterion, alone_on_disk in ((again, True), (together_again, False)):
        state = {"criterion": criterion.state_dict()}
        checkpoint.load(state, checkpoint_id=folder, no_dist=alone_on_disk)
        criterion.load_state_dict(state["criterion"])
    for step in range(2, 4):
        assert_same_step(alone, together_again, Divided(step))
    assert_same_step(again, together, Divided(2))


def a_rank_may_be_in_more_groups_than_the_others(rank):
    dist.new_group([0])
    alone, together = alone_and_together(SupCon())
    assert_same_step(alone, together, Divided(0))
    W, backend_of = dist.get_world_size(), dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:nccl"  # which takes no tensors of the host
    of_hosts = collectives.host_group(dist.group.WORLD)
    dist.get_backend_config = backend_of
    assert collectives.gather_numbers([rank], of_hosts) == [[r] for r in range(W)]
    for group in (of_hosts, together._shards._group or of_hosts):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=ranks.SECONDS)


@contextmanager
def hosts_tell_each_other_nothing():
    """With a `batch_size`, as where tensors are on a GPU."""
    reads_at_once = distributed.reads_at_once
    distributed.reads_at_once = lambda t: False
    try:
        yield
    finally:
        distributed.reads_at_once = reads_at_once


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


def a_group_may_be_a_mesh_or_a_part_of_the_processes(rank):
    W = dist.get_world_size()
    mesh = init_device_mesh("cpu", (W,))
    assert CrossBatchMemory(SupCon(), D, M, process_group=mesh).process_group is mesh.get_group()
    groups = [dist.new_group([r]) for r in range(W)]
    alone, own = CrossBatchMemory(SupCon(), D, M), CrossBatchMemory(SupCon(), D, M, process_group=groups[rank])
    x, labels, _ = Divided(0).part()
    assert_same_bits(own(x, labels), alone(x, labels))
    with pytest.raises(ValueError, match="process_group must be one that this process is in"):
        CrossBatchMemory(SupCon(), D, M, process_group=groups[(rank + 1) % W])
    with pytest.raises(ValueError, match="process_group must be a mesh of one or two dimensions, got one of 3"):
        CrossBatchMemory(SupCon(), D, M, process_group=init_device_mesh("cpu", (W, 1, 1)))
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or a DeviceMesh of torch"):
        CrossBatchMemory(SupCon(), D, M, process_group="nccl")


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
    every_loss_is_that_of_one_process,
    all_may_rank_all,
    the_memory_or_the_batch_alone_may_be_divided,
    every_way_to_keep_a_memory_is_that_of_one_process,
    a_learned_temperature_gets_the_whole_gradient,
    a_learned_offset_gets_the_whole_gradient,
    a_fixed_number_of_rows_is_as_good,
    a_loss_of_ones_own_is_that_of_one_process,
    embeddings_of_16_bits_travel_as_they_are,
    rows_that_are_not_finite_stay_out_of_every_copy,
    evaluation_reads_and_writes_nothing,
    a_filled_memory_has_the_batches_of_all,
    a_fault_while_filling_leaves_every_copy_as_it_was,
    whatever_a_source_of_batches_raises_is_raised_on_all,
    a_source_that_would_begin_again_is_read_once,
    a_fill_on_one_rank_and_a_step_on_another_raise,
    the_hosts_agree_where_torch_makes_no_plain_tensors,
    averaged_gradients_are_those_of_one_process,
    the_criterion_may_be_inside_of_what_is_wrapped,
    sharded_parameters_get_the_same_gradients,
    a_gradient_scaler_decides_alike_on_every_rank,
    a_rank_receives_what_the_benchmark_says,
    copies_share_the_group,
    a_state_goes_from_many_processes_to_one_and_back,
    a_rank_may_be_in_more_groups_than_the_others,
    with_a_batch_size_no_host_waits,
    a_group_may_be_a_mesh_or_a_part_of_the_processes,
    what_differs_is_named_on_every_rank,
    where_hosts_tell_nothing_what_differs_still_raises,
    a_fault_of_one_rank_is_raised_on_all,
    a_call_that_one_rank_leaves_out_is_an_error_on_the_others,
    ranks_at_different_steps_raise,
]


@pytest.mark.parametrize("W", [pytest.param(W, marks=[pytest.mark.long] * (W > 2)) for W, _ in REPLICATED])
def test_ranks(W, tmp_path):
    on_disk = partial(a_checkpoint_of_all_is_that_of_one, tmp_path / "checkpoint")
    launch(W, tmp_path / "store", *CHECKS, on_disk)


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_ranks_that_compile(shards, tmp_path):
    launch(2, tmp_path / "store", a_compiled_step_is_the_step, shards=shards)


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


@pytest.mark.parametrize("device, W, rows", [("cpu", 2, 1024), ("cpu", 8, 569), ("meta", 2, 2897), ("meta", 8, 1607)])
def test_from_how_many_rows_on_a_batch_is_divided(device, W, rows):
    """As the documentation has it. What is not a CPU counts as a GPU."""
    for N, divides in ((rows, True), (rows - 7, False)):
        batch = Batch(torch.empty(N, 512, device=device), torch.empty(N, device=device))
        assert shared_batch_loss.is_worth_it(SimpleNamespace(size=W), batch) == divides
    assert not shared_batch_loss.is_worth_it(SimpleNamespace(size=1), batch)


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
