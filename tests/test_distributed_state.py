"""The state of a memory of many processes, and their groups."""

from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from ranks import D, Divided, M, alone_and_together, assert_same_bits, assert_same_step
from torch.distributed.device_mesh import init_device_mesh

from xbn_ext import CrossBatchMemory, SupCon, collectives


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
    for wrong in ("nccl", 0, torch.tensor(2), np.float64(0.5)):
        with pytest.raises(TypeError, match="process_group must be a ProcessGroup or a DeviceMesh of torch"):
            CrossBatchMemory(SupCon(), D, M, process_group=wrong)


CHECKS = [
    a_rank_may_be_in_more_groups_than_the_others,
]
WITHOUT_SHARDS = [
    a_state_goes_from_many_processes_to_one_and_back,
    a_group_may_be_a_mesh_or_a_part_of_the_processes,
]


@ranks.on_grids([*ranks.REPLICATED, *ranks.SHARDED])
def test_ranks(W, S, tmp_path):
    on_disk = partial(a_checkpoint_of_all_is_that_of_one, tmp_path / "checkpoint")
    more = [] if S > 1 else [*WITHOUT_SHARDS, on_disk]
    ranks.launch(W, tmp_path / "store", *CHECKS, *more, shards=S)
