"""`Shards`: the ranks that hold a memory between them, each a block of its ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shards:
    """S ranks, one after the other, that have all of a memory. Of W ranks there are W / S such lines, each with a copy.

    A rank's block is ceil(M / S) slots, the last one's what is left: as `torch.chunk` and a `DTensor` cut. Anchors of
    all S ranks meet each block; what a block has of an anchor goes to its *owner*, the rank whose row of the batch it
    is.

    Args:
        group: the S ranks; None: this one alone, which needs no exchange.
        replica: number of the line.
    """

    def __init__(self, group: ProcessGroup | None = None, replica: int = 0) -> None:
        self.size, self.place = (1, 0) if group is None else (group.size(), group.rank())
        self.members = slice(replica * self.size, (replica + 1) * self.size)
        self._group = group
        self._name = "" if group is None else group.group_name

    def __deepcopy__(self, memo: Any) -> Shards:
        return self  # a group belongs to the process

    def block(self, slots: int) -> tuple[int, int]:
        """The first slot of this rank's block of a ring, and the number of its slots.

        Raises ValueError if there are not enough slots for all.
        """
        most = -(-slots // self.size)
        if (self.size - 1) * most >= slots:
            raise ValueError(f"shards={self.size} would leave a rank without any of the {slots} slots of memory_size")
        first = self.place * most
        return first, min(most, slots - first)

    def to_owners(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        """`[S, b, …]` what each shard says of the own anchors, from `[A, …]` what this one says of those of all ranks
        of the line, which have `sizes`."""
        if self.size == 1:
            return t[None]
        received = collectives.exchange(t, sizes, [sizes[self.place]] * self.size, self._name)
        return received.view(self.size, sizes[self.place], *t.shape[1:])

    def to_shards(self, t: Tensor, sizes: Sequence[int]) -> Tensor:
        """`[A, …]` what their owners say of all anchors of the line to this shard, from `[S, b, …]` what is to be said
        to each shard of the own ones."""
        if self.size == 1:
            return t[0]
        return collectives.exchange(t.flatten(0, 1), [sizes[self.place]] * self.size, sizes, self._name)

    def gather(self, t: Tensor) -> Tensor:
        """`[S, …]` what each shard has."""
        return t[None] if self.size == 1 else collectives.gather(t, self.size, self._name)

    def total(self, t: Tensor) -> Tensor:
        """The sum over the shards, the same bits on each."""
        return self.gather(t).sum(0)

    def whole(self, block: Tensor, slots: int) -> Tensor:
        """The DTensor `[slots, …]` of which each shard has a block. Without a group, the block, which is all of it."""
        return block if self._group is None else collectives.distributed(block, slots, self._group)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's block of a tensor, also of one that is distributed, in this way or another: then all ranks that
        have a part of it must ask."""
        first, rows = self.block(len(whole))
        if not hasattr(whole, "full_tensor"):
            return whole[first : first + rows]
        local = None if self._group is None else collectives.local_part(whole, self._group)
        return whole.full_tensor()[first : first + rows] if local is None else local
