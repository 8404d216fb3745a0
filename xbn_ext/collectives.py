"""What this library asks of `torch.distributed`; no other file names its functions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def shards_of(process_group: Any, shards: int) -> int:
    """How many shards a memory has: if a mesh of two dimensions says so, too, it must be the same number, or 1."""
    if not hasattr(process_group, "get_group") or process_group.ndim == 1:  # else a DeviceMesh, or of the wrong kind
        return shards
    of_mesh: int = process_group.size(1)
    if shards not in (1, of_mesh):
        raise ValueError(f"shards must be the second dimension of the mesh, {of_mesh}, got {shards}")
    return of_mesh


def group_of(process_group: Any) -> ProcessGroup:
    """The group that a user has given, or that of all ranks of a mesh.

    Raises TypeError, or ValueError if the mesh has more than two dimensions or an order of its own, or this process is
    not in the group.
    """
    group = process_group
    if hasattr(process_group, "get_group"):  # of a DeviceMesh
        if process_group.ndim > 2:
            raise ValueError(f"process_group must be a mesh of one or two dimensions, got one of {process_group.ndim}")
        group = dist.GroupMember.NON_GROUP_MEMBER
        if process_group.get_coordinate() is not None:
            group = process_group.get_group() if process_group.ndim == 1 else _group_of_all(process_group)
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process is in")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        wanted = "a ProcessGroup or a DeviceMesh of torch.distributed"
        raise TypeError(f"process_group must be {wanted}, got {type(process_group).__name__}")
    return group


def _group_of_all(mesh: DeviceMesh) -> ProcessGroup:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(f"process_group must be a mesh whose ranks ascend, got {mesh.mesh.tolist()}")
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD  # type: ignore[return-value]
    return _group(ranks, mesh.get_group(0))


def line_of(group: ProcessGroup, shards: int) -> tuple[ProcessGroup, int]:
    """The `shards` ranks of a group that this process is one of, the first ones, the next ones or later ones, and
    their number among these lines."""
    replica = group.rank() // shards
    if shards == group.size():
        return group, replica
    ranks = dist.get_process_group_ranks(group)[replica * shards : (replica + 1) * shards]
    return _group(ranks, group), replica


def _group(ranks: list[int], like: ProcessGroup, backend: str | None = None) -> ProcessGroup:
    """One of some processes, which these make together. It waits for them as long as the other does, and has the
    other's backend where none is given."""
    _be_in_as_many(ranks)
    return dist.new_group(  # type: ignore[no-any-return]
        ranks, _timeout(like), backend or dist.get_backend_config(like), use_local_synchronization=True
    )


def _timeout(group: ProcessGroup) -> timedelta | None:
    """None, which is torch's own, of a backend that does not say."""
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        return None


def _be_in_as_many(ranks: list[int]) -> None:
    """torch names a group that only its members make by their ranks and the number of groups that this process is in.
    With one more, such as a group of rank 0 alone, it would wait for the others under another name: first, those that
    are in fewer make some of their own."""
    from torch.distributed import distributed_c10d

    groups, rank = distributed_c10d._world.pg_names, dist.get_rank()
    of_all = distributed_c10d._get_default_store()
    store = distributed_c10d.PrefixStore(f"xbn_ext/{'_'.join(map(str, ranks))}", of_all)
    time = store.add(f"times/{rank}", 1)
    store.set(f"{time}/{rank}", str(len(groups)))
    most = max(int(store.get(f"{time}/{other}")) for other in ranks)
    while len(groups) < most:
        dist.new_group([rank], backend="gloo", use_local_synchronization=True)


def host_group(group: ProcessGroup) -> ProcessGroup:
    """A group of the same processes for tensors on the host: itself, if it can, else another one."""
    if "cpu:" in dist.get_backend_config(group):  # such as "cpu:gloo,cuda:nccl"
        return group
    return _group(dist.get_process_group_ranks(group), group, "gloo")


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


def distributed(part: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """A DTensor `[size, …]` that is cut into the parts which the ranks of a group have."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, part.device.type)
    shape = torch.Size([size, *part.shape[1:]])
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=part.stride())


def local_part(t: Any, group: ProcessGroup) -> Tensor | None:
    """Of a DTensor, if it is cut as by `distributed`."""
    from torch.distributed.tensor import Shard

    same = t.placements == (Shard(0),) and t.device_mesh.mesh.tolist() == dist.get_process_group_ranks(group)
    return t.to_local() if same else None


def is_own(t: Any) -> bool:
    """Whether the part of a DTensor that this process has is its own: not one that another has written to a file, nor
    one of processes that are no longer there."""
    mesh = t.device_mesh
    if not dist.is_initialized():
        return False
    here = (mesh.mesh == dist.get_rank()).nonzero().tolist()
    try:
        sizes = tuple(mesh.get_group(dimension).size() for dimension in range(mesh.ndim))
    except (LookupError, RuntimeError, ValueError):  # no such group
        return False
    return sizes == tuple(mesh.shape) and here == [list(mesh.get_coordinate() or ())]


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
