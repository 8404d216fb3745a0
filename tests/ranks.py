"""Checks that run in several processes, and the batches that these divide between them."""

import copy
import itertools
import os
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import start

from xbn_ext import DCL, CrossBatchMemory, LiftedStructure, collectives, distributed, shared_batch_loss, shared_step
from xbn_ext.state import IN_BLOCKS

D, M = 8, 37
SECONDS = 180  # after which a rank no longer waits for another
SHARDS = 1  # of the memories that they share
DEVICE = torch.device("cpu")  # of all of them; gloo takes tensors of a GPU that several processes use

# Processes, and shards of their memory.
REPLICATED, SHARDED = [(2, 1), (3, 1), (4, 1)], [(2, 2), (3, 3), (4, 2), (4, 4)]


def on_grids(grids):
    """A test for each, in `make test` of two processes alone."""
    return pytest.mark.parametrize(
        "W, S", [pytest.param(*grid, marks=[pytest.mark.long] * (grid[0] > 2)) for grid in grids]
    )


def few(*lists):
    """A part of what has one of each list: each grid of ranks without shards has another part, and so has each with."""
    grid = dist.get_world_size(), SHARDS
    grids = REPLICATED if grid in REPLICATED else SHARDED
    for places in itertools.product(*(range(len(some)) for some in lists)):
        if sum(places) % len(grids) == grids.index(grid):
            yield tuple(some[i] for some, i in zip(lists, places, strict=True))


def launch(W, store, *checks, shards=1, device="cpu"):
    """Runs functions of a rank in W processes, one after the other. Raises what the first to fail has raised."""
    start(W, _rank, W, store, checks, shards, device)


def _rank(rank, W, store, checks, shards=1, device="cpu"):
    global SHARDS, DEVICE
    SHARDS, DEVICE = shards, torch.device(device)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    files = dist.FileStore(str(store), W)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=W, timeout=timedelta(seconds=SECONDS))
    divide(memory=True, batch=True)
    for check in checks:
        check(rank)
        dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # where threads of torch's groups are still there, an interpreter that ends can abort


def divide(*, memory, batch):
    """Whether each rank ranks only its own rows against the memory, and against the batch: also where it is slower."""
    shared_step.LEAST_SAVED = 0 if memory else 1 << 62
    shared_step.RANKS_ON_A_GPU = shared_step.RANKS_ON_A_GPU_WITH_SCREEN = 0 if memory else 1 << 62
    shared_batch_loss.LEAST_SAVED = shared_batch_loss.LEAST_SAVED_ON_A_GPU = 0 if batch else 1 << 62


@contextmanager
def hosts_tell_each_other_nothing():
    """With a `batch_size`, as where tensors are on a GPU."""
    reads_at_once = distributed.reads_at_once
    distributed.reads_at_once = lambda t: False
    try:
        yield
    finally:
        distributed.reads_at_once = reads_at_once


SIZES = {  # of the parts of a batch, at a step
    "even": lambda W, step: [6] * W,
    "uneven": lambda W, step: [5 + (3 * rank + step) % 4 for rank in range(W)],
    "one empty": lambda W, step: [0 if rank == step % W else 7 for rank in range(W)],
    "all empty": lambda W, step: [0 if step == 2 else 6] * W,
    "over the memory": lambda W, step: [M // W + 5] * W,
}


class Divided:
    """A batch and the parts of it that the ranks have, as arguments of a `CrossBatchMemory`."""

    def __init__(self, step, sizes="even", dtype=torch.float32, ids=False, mask=False, ids_on=None, spoiled=False):
        W, rank = dist.get_world_size(), dist.get_rank()
        rows = SIZES[sizes](W, step)
        B = sum(rows)
        draw = torch.Generator().manual_seed(1000 + step)
        labels = torch.randint(5, (B,), generator=draw)
        centres = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
        x = (centres[labels] + torch.randn(B, D, generator=draw)) * (1 + 0.05 * step) + 0.1 * step
        self.own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        self.x = x.to(DEVICE, dtype)
        self.labels = labels.to(DEVICE)
        self.options, self.own_options = {}, {}
        if mask:
            self._add("enqueue_mask", torch.rand(B, generator=draw) < 0.4)
        if spoiled:  # a row of each rank that only is stored
            self.x[self.options["enqueue_mask"].nonzero()[::3], 1] = torch.nan
        if ids:
            given = torch.randint(-1, 12, (B,), generator=draw)
            if ids_on is None:
                self._add("ids", given)
            else:
                of_rank = torch.arange(W).repeat_interleave(torch.tensor(rows))
                self.options["ids"] = torch.where(of_rank == ids_on, given, -1).to(DEVICE)
                self.own_options = {"ids": given[self.own].to(DEVICE)} if rank == ids_on else {}

    def _add(self, name, of_rows):
        of_rows = of_rows.to(DEVICE)
        self.options[name], self.own_options[name] = of_rows, of_rows[self.own]

    def whole(self):
        """What one process is called with: its embeddings, a leaf; the rest; options."""
        return self.x.clone().requires_grad_(), self.labels, self.options

    def part(self):
        """What this rank is called with."""
        return self.x[self.own].clone().requires_grad_(), self.labels[self.own], self.own_options


def alone_and_together(loss, batch_size=None, size=M, **options):
    """The memory of one process, and one that all ranks share; each learns a temperature of its own."""
    return alone(copy.deepcopy(loss), size, **options), shared(loss, size, batch_size=batch_size, **options)


def alone(loss, size=M, **options):
    """A memory of one process."""
    return CrossBatchMemory(loss, D, size, **options).to(DEVICE)


def shared(loss, size=M, **options):
    """A memory that all ranks share."""
    of_all = {"process_group": dist.group.WORLD, "shards": SHARDS}
    return CrossBatchMemory(loss, D, size, **of_all | options).to(DEVICE)


def same_steps(loss, batch, steps=4, batch_size=None, size=M, **options):
    """A rank's check of some steps of a memory."""
    pair = alone_and_together(loss, batch_size, size, **options)
    for step in range(steps):
        assert_same_step(*pair, Divided(step, **batch))


def assert_same_step(alone, together, batch):
    """A step of both has the same loss, gradient and state; all ranks have the same loss, to the bit."""
    x, labels, options = batch.whole()
    own, own_labels, own_options = batch.part()
    expected, value = alone(x, labels, **options), together(own, own_labels, **own_options)
    expected.backward(), value.backward()
    of_ranks = collectives.gather(value, dist.get_world_size(), dist.group.WORLD.group_name)
    assert_same_bits(of_ranks, value.detach().expand_as(of_ranks))
    cancels = isinstance(alone.loss, DCL | LiftedStructure)  # what an anchor pays is a difference of larger numbers
    assert_close(value, expected, least=1.0 if cancels else 0.0)
    assert_close(own.grad, dist.get_world_size() * x.grad[batch.own])
    for name, learned in alone.named_parameters(recurse=False):
        assert_close(getattr(together, name).grad, learned.grad)
    assert_same_state(alone, together)


def assert_close(found, expected, least=0.0):
    """Equal up to the rounding of sums, which are added rank by rank; and that of what is stored, where the sums of
    stored rows are, too. On a GPU also of products, which parts of a memory have by another kernel than the whole."""
    units = 1000 if DEVICE.type == "cuda" else 8 if SHARDS == 1 else 64
    eps = units * torch.finfo(expected.dtype).eps
    largest = max(expected.detach().nan_to_num().abs().max().item() if expected.numel() else 0.0, least)
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps * largest, equal_nan=True)


def assert_same_state(alone, together, assert_same=None):
    """What is measured is of the anchors' sums; all else is the same to the bit, of a memory in blocks what counts, and
    on a GPU, where one process counts the sums of its rows less often."""
    block = slice(together._first, together._first + len(together.bank))
    for name, expected in alone.named_state():
        found = getattr(together, name)
        rounds = together.shards > 1 or DEVICE.type == "cuda"
        of_sums = name == "pairs" or (rounds and found.is_floating_point())
        expected = expected[block] if name in IN_BLOCKS else expected
        if name == "pairs":  # of SigLIP sums of float32 weights
            found, expected = found.float(), expected.float()
        (assert_same or (assert_close if of_sums else assert_same_bits))(found, expected)


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
