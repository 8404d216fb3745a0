"""What this library asks of `torch.distributed`; no other file names its functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_of(process_group: Any) -> ProcessGroup:
    """The group that a user has given, or that of a mesh.

    Raises TypeError, or ValueError if the mesh has several dimensions or this process is not in the group.
    """
    group = process_group
    if hasattr(process_group, "get_group"):  # of a DeviceMesh
        if process_group.ndim != 1:
            raise ValueError(f"process_group must be a mesh of one dimension, got one of {process_group.ndim}")
        group = process_group.get_group()
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is in")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        wanted = "a ProcessGroup or a DeviceMesh of torch.distributed"
        raise TypeError(f"process_group must be {wanted}, got {type(process_group).__name__}")
    return group


def host_group(group: ProcessGroup) -> ProcessGroup:
    """A group of the same processes for tensors on the host: itself, if it can, else another one."""
    if "cpu:" in dist.get_backend_config(group):  # such as "cpu:gloo,cuda:nccl"
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)  # type: ignore[no-any-return]


def gather(t: Tensor, size: int, group_name: str) -> Tensor:
    """`[W, …]` the tensors of all W ranks of a group, in their order; they are of one shape and dtype. It has no
    derivative: that would be another collective."""
    collective = torch.ops._c10d_functional  # what a compiler can trace
    gathered = collective.all_gather_into_tensor(t.detach().contiguous()[None], size, group_name)
    return collective.wait_tensor(gathered)  # type: ignore[no-any-return]


def exchange(t: Tensor, sent: Sequence[int], received: Sequence[int], group_name: str) -> Tensor:
    """Of t so many rows are for each rank, in their order; returns those of all ranks for this one, in their order.
    Without a derivative, as `gather`."""
    collective = torch.ops._c10d_functional
    rows = collective.all_to_all_single(t.detach().contiguous(), list(received), list(sent), group_name)
    return collective.wait_tensor(rows)  # type: ignore[no-any-return]


def gather_numbers(numbers: Sequence[int], group: ProcessGroup) -> list[list[int]]:
    """Those of all ranks, in their order; each has as many. Of hosts, whatever the default device is."""
    with torch._C._DisableFuncTorch():  # under torch.func, too, a rank can tell the others that it must not be there
        t = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        return gather(t, group.size(), group.group_name).tolist()


def gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    """The values of all ranks, in their order."""
    values = [None] * dist.get_world_size(group)
    with torch._C._DisableFuncTorch():
        dist.all_gather_object(values, value, group=group)
    return values
