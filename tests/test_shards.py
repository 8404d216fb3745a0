"""Many processes that hold a memory between them: what they compute is what one process does that has all of it."""

import io
import itertools
import warnings
from functools import partial

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from loss_cases import LOSSES
from own_losses import Exponents
from ranks import D, Divided, M, alone_and_together, assert_close, assert_same_bits, assert_same_state, assert_same_step
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from xbn_ext import CrossBatchMemory, SupCon
from xbn_ext.plain import triplets


def each_has_a_block_of_the_memory(rank):
    S, W = ranks.SHARDS, dist.get_world_size()
    alone, together = alone_and_together(SupCon())
    rows = -(-M // S)
    first = rank % S * rows
    assert together.bank.shape == (min(rows, M - first), D)
    assert together.shards == S and f"rank {rank} of {W}, shards={S}" in repr(together)
    for step in range(3):
        assert_same_step(alone, together, Divided(step, "uneven"))
        last = min(int(alone.count), first + rows)
        assert_close(together.embedding_memory, alone.embedding_memory[first:last])
        assert_same_bits(together.label_memory, alone.label_memory[first:last])
        assert_same_bits(together.id_memory, alone.id_memory[first:last])
        assert_same_bits(together.age_memory, alone.age_memory[first:last])


def statistics_are_of_the_whole_memory(rank):
    """With a gain well below 1: else the gap after the move is a difference of almost equal numbers."""
    alone, together = alone_and_together(SupCon(), process_noise=1.0)
    assert together.stats()["age"].isnan() and together.stats()["fill"] == 0
    for step in range(4):
        assert_same_step(alone, together, Divided(step))
        for name, expected in alone.stats().items():
            assert_close(together.stats()[name], expected)
    together.reset_queue()
    assert together.stats()["age"].isnan()
    assert_same_state(CrossBatchMemory(SupCon(), D, M), together)


def every_order_of_the_ring_is_that_of_one_process(rank):
    """Rows that cross from one block into the next, or fill more than a block at once."""
    for size, sizes in itertools.product((ranks.SHARDS, 7, 13, 100), ("even", "uneven")):
        if (ranks.SHARDS - 1) * -(-size // ranks.SHARDS) < size:
            ranks.same_steps(SupCon(), {"sizes": sizes, "ids": True, "mask": True}, steps=6, size=size)


def all_blocks_are_rewritten_in_the_same_step(rank):
    """Where the rows have left the coordinates in which they are stored: whatever a block has of its own."""
    options = {"update": "deferred", "process_noise": 0.01, "normalize_embeddings": False}
    loss = LOSSES["contrastive"]  # exponents of embeddings that grow would magnify rounding
    alone, together = alone_and_together(loss, memory_dtype=torch.float64, **options)
    rewritten = 0
    for step in range(9):
        batch = Divided(step, dtype=torch.float64)
        batch.x *= 2**step
        stays, before = (int(alone.head) + 6 * dist.get_world_size()) % M, alone.bank.clone()
        assert_same_step(alone, together, batch)
        rewritten += step > 0 and not torch.equal(alone.bank[stays], before[stays])
    assert 0 < rewritten < 8


def all_triplets_may_take_several_rounds(rank):
    least, held = triplets.LEAST_HELD, triplets.HELD
    torch.set_warn_always(True)
    for triplets.LEAST_HELD, triplets.HELD in ((1, 1), (3, 1)):
        for sizes in ("uneven", "all empty"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ranks.same_steps(LOSSES["triplet_all"], {"sizes": sizes, "ids": True, "mask": True})
    torch.set_warn_always(False)
    triplets.LEAST_HELD, triplets.HELD = least, held


def a_mesh_of_two_dimensions_is_the_grid(rank):
    W, S = dist.get_world_size(), ranks.SHARDS
    grid = init_device_mesh("cpu", (W // S, S), mesh_dim_names=("replicate", "shard"))
    for given in ({}, {"shards": S}):
        alone = CrossBatchMemory(SupCon(), D, M)
        together = ranks.shared(SupCon(), process_group=grid, **{"shards": 1} | given)
        assert together.shards == S
        for step in range(3):
            assert_same_step(alone, together, Divided(step, "one empty"))
    with pytest.raises(ValueError, match=f"shards must be the second dimension of the mesh, {S}, got {S + 1}"):
        ranks.shared(SupCon(), process_group=grid, shards=S + 1)
    backwards = torch.distributed.device_mesh.DeviceMesh("cpu", torch.arange(W).flip(0).view(W // S, S))
    with pytest.raises(ValueError, match="process_group must be a mesh whose ranks ascend, got"):
        ranks.shared(SupCon(), process_group=backwards)
    of_last = torch.distributed.device_mesh.DeviceMesh("cpu", [[W - 1]])
    if rank < W - 1:
        with pytest.raises(ValueError, match="process_group must be one that this process is in"):
            ranks.shared(SupCon(), process_group=of_last, shards=1)


def what_cannot_be_cut_is_refused(rank):
    S, W = ranks.SHARDS, dist.get_world_size()
    for shards, size, loss, message in (
        (W + 1, M, SupCon(), f"^shards must divide the {W} ranks of the process_group, got {W + 1}$"),
        (S, S - 1, SupCon(), f"^shards={S} would leave a rank without any of the {S - 1} slots of memory_size$"),
        (1 if rank == 0 else S, M, SupCon(), rf"^shards must be the same on every rank, got 1 on rank 0 and {S}"),
        (0, M, SupCon(), "^shards must be"),
        (S, M, Exponents(), "^loss: Exponents needs shards=1"),
    ):
        with pytest.raises(ValueError, match=message):
            ranks.shared(loss, size, shards=shards)
    together = ranks.shared(SupCon())
    with pytest.raises(AttributeError, match="shards is chosen once"):
        together.shards = 1


def who_needs_no_gradient_computes_that_of_the_others(rank):
    alone, together = alone_and_together(SupCon())
    assert_same_step(alone, together, Divided(0))
    (x, labels, _), (own, own_labels, _) = Divided(1).whole(), Divided(1).part()
    alone(x, labels).backward()
    with torch.set_grad_enabled(rank != 1):
        value = together(own, own_labels)
    if rank != 1:
        value.backward()
        assert_close(own.grad, dist.get_world_size() * x.grad[Divided(1).own])
    assert_same_state(alone, together)


def with_a_batch_size_all_need_a_gradient_or_none(rank):
    alone, together = alone_and_together(SupCon(), 6)
    assert_same_step(alone, together, Divided(0))
    x, labels, _ = Divided(1).part()
    with torch.set_grad_enabled(rank != 1):
        with pytest.raises(ValueError, match=r"^whether a gradient is needed must be .* True on rank 0 and False on"):
            together(x, labels)
        others = pytest.raises(RuntimeError, match="of shards, need a gradient, and others not")
        with ranks.hosts_tell_each_other_nothing(), others:
            together(x, labels)
    assert_same_state(alone, together)


def a_whole_state_can_be_gathered_and_dealt_out(rank):
    alone, together = alone_and_together(SupCon())
    for step in range(2):
        assert_same_step(alone, together, Divided(step))
    whole = get_model_state_dict(together, options=StateDictOptions(full_state_dict=True))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(whole[name], expected, rtol=1e-6, atol=1e-6)
    again, together_again = alone_and_together(SupCon())
    again.load_state_dict(whole)
    set_model_state_dict(together_again, whole, options=StateDictOptions(full_state_dict=True))
    for step in range(2, 4):
        assert_same_step(again, together_again, Divided(step))


def a_state_of_another_size_is_refused(rank):
    _, together = alone_and_together(SupCon())
    other = CrossBatchMemory(SupCon(), D, len(together.bank))  # as large as a block
    with pytest.raises(RuntimeError, match=rf"bank must be \[{M}, {D}\] .*got \[{len(together.bank)}, {D}\]; nothing"):
        together.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="sums must be finite; nothing of the state was loaded"):
        bad = {"sums": torch.full((2, D), torch.nan)}
        together.load_state_dict(CrossBatchMemory(SupCon(), D, M).state_dict() | bad)
    assert together.count == 0


def a_checkpoint_may_be_written_while_training_goes_on(folder, rank):
    _, together = alone_and_together(SupCon())
    together(*Divided(0).part()[:2])
    was = {name: t.clone() for name, t in together.named_state()}
    of_its_own = dist.new_group()  # else its messages would mix with those of a step
    state = {"criterion": together.state_dict()}
    written = checkpoint.async_save(state, checkpoint_id=folder / "async", process_group=of_its_own)
    together(*Divided(1).part()[:2])
    written.result()
    state = {"criterion": together.state_dict()}
    checkpoint.load(state, checkpoint_id=folder / "async")
    together.load_state_dict(state["criterion"])
    for name, t in together.named_state(persistent=True):
        assert_same_bits(t, was[name])


def the_rows_of_another_rank_are_refused(rank):
    """As in a file of rank 0's `state_dict()`, which is enough where each rank has all."""
    _, together = alone_and_together(SupCon(), size=64)  # in blocks of one size
    together(*Divided(0).part()[:2])
    file = io.BytesIO()
    torch.save(together.state_dict(), file)
    files = [file.getvalue()]
    dist.broadcast_object_list(files, 0)
    for shards in {ranks.SHARDS, dist.get_world_size(), 1}:
        again = ranks.shared(SupCon(), 64, shards=shards)
        if rank > 0:
            with pytest.raises(RuntimeError, match=r"bank_steps: the part that another process has.*nothing of the"):
                again.load_state_dict(torch.load(io.BytesIO(files[0])))
            assert again.count == 0
        elif shards == ranks.SHARDS:
            again.load_state_dict(torch.load(io.BytesIO(files[0])))
            assert_same_bits(again.bank, together.bank)
    alone = CrossBatchMemory(SupCon(), D, 64)
    state = torch.load(io.BytesIO(files[0]))
    state["bank"].device_mesh._dim_group_names[0] = "of a run that has ended"
    with pytest.raises(RuntimeError, match=r"another process has, or had; save it by torch\.distributed\.checkpoint"):
        alone.load_state_dict(state)


def a_checkpoint_is_resumed_on_any_grid(folder, rank):
    alone, together = alone_and_together(SupCon())
    for step in range(2):
        assert_same_step(alone, together, Divided(step, ids=True))
    checkpoint.save({"criterion": together.state_dict()}, checkpoint_id=folder)
    with_copies = ranks.shared(SupCon(), shards=1)
    on_same, in_one = ranks.shared(SupCon()), ranks.alone(SupCon())
    for criterion in (on_same, with_copies, in_one):
        state = {"criterion": criterion.state_dict()}
        checkpoint.load(state, checkpoint_id=folder, no_dist=criterion is in_one)
        criterion.load_state_dict(state["criterion"])
    for step in range(2, 4):
        batch = Divided(step, ids=True)
        value = together(*batch.part()[:2], **batch.part()[2])
        assert_same_bits(on_same(*batch.part()[:2], **batch.part()[2]), value)
        assert_close(with_copies(*batch.part()[:2], **batch.part()[2]), value)
        assert_close(in_one(*batch.whole()[:2], **batch.whole()[2]), value)
    for name, expected in together.named_state():
        assert_same_bits(getattr(on_same, name), expected)
    if rank == 0:
        checkpoint.save({"criterion": in_one.state_dict()}, checkpoint_id=folder.parent / "one", no_dist=True)
    dist.barrier()
    state = {"criterion": on_same.state_dict()}
    checkpoint.load(state, checkpoint_id=folder.parent / "one")
    on_same.load_state_dict(state["criterion"])
    assert_same_step(in_one, on_same, Divided(4))


def a_checkpoint_is_written(folder, rank):
    alone, together = alone_and_together(SupCon())
    for step in range(2):
        assert_same_step(alone, together, Divided(step))
    checkpoint.save({"criterion": together.state_dict()}, checkpoint_id=folder / "together")
    if rank == 0:
        torch.save(alone.state_dict(), folder / "alone")


def a_checkpoint_of_other_ranks_is_resumed(folder, rank):
    alone, together = alone_and_together(SupCon())
    alone.load_state_dict(torch.load(folder / "alone"))
    state = {"criterion": together.state_dict()}
    checkpoint.load(state, checkpoint_id=folder / "together")
    together.load_state_dict(state["criterion"])
    for step in range(2, 4):
        assert_same_step(alone, together, Divided(step))


CHECKS = [
    each_has_a_block_of_the_memory,
    statistics_are_of_the_whole_memory,
    every_order_of_the_ring_is_that_of_one_process,
    all_blocks_are_rewritten_in_the_same_step,
    all_triplets_may_take_several_rounds,
    a_mesh_of_two_dimensions_is_the_grid,
    what_cannot_be_cut_is_refused,
    who_needs_no_gradient_computes_that_of_the_others,
    with_a_batch_size_all_need_a_gradient_or_none,
    a_whole_state_can_be_gathered_and_dealt_out,
    a_state_of_another_size_is_refused,
    the_rows_of_another_rank_are_refused,
]


@ranks.on_grids(ranks.SHARDED)
def test_shards(W, S, tmp_path):
    on_disk = [
        partial(a_checkpoint_is_resumed_on_any_grid, tmp_path / "checkpoint"),
        partial(a_checkpoint_may_be_written_while_training_goes_on, tmp_path),
    ]
    ranks.launch(W, tmp_path / "store", *CHECKS, *on_disk, shards=S)


@pytest.mark.long
def test_a_checkpoint_goes_on_in_another_number_of_ranks(tmp_path):
    for W, check in ((2, a_checkpoint_is_written), (3, a_checkpoint_of_other_ranks_is_resumed)):
        ranks.launch(W, tmp_path / f"store {W}", partial(check, tmp_path), shards=W)


def test_one_process_has_all_of_its_memory():
    with pytest.raises(ValueError, match="shards needs a process_group: one process has all of its memory"):
        CrossBatchMemory(SupCon(), D, M, shards=2)
    assert CrossBatchMemory(SupCon(), D, M, shards=1).shards == 1
