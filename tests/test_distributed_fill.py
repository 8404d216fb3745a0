"""Many processes that fill one memory: with the batches of all, or none of them does."""

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Divided, alone_and_together, assert_same_state, assert_same_step

from xbn_ext import SupCon


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


CHECKS = [
    a_filled_memory_has_the_batches_of_all,
    a_fault_while_filling_leaves_every_copy_as_it_was,
]
WITHOUT_SHARDS = [
    whatever_a_source_of_batches_raises_is_raised_on_all,
    a_source_that_would_begin_again_is_read_once,
    a_fill_on_one_rank_and_a_step_on_another_raise,
]


@ranks.on_grids([*ranks.REPLICATED, *ranks.SHARDED])
def test_ranks(W, S, tmp_path):
    ranks.launch(W, tmp_path / "store", *CHECKS, *([] if S > 1 else WITHOUT_SHARDS), shards=S)
