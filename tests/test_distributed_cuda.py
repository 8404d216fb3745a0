"""Processes with one memory on a GPU that they share, by gloo: NCCL takes no two ranks on one."""

from functools import partial

import pytest
import ranks
import test_distributed
import test_distributed_fill
import test_distributed_state
import test_shards
import torch

CHECKS = [
    test_distributed.every_loss_is_that_of_one_process,
    test_distributed.every_way_to_keep_a_memory_is_that_of_one_process,
    test_distributed.a_learned_temperature_gets_the_whole_gradient,
    test_distributed.a_fixed_number_of_rows_is_as_good,
    test_distributed.rows_that_are_not_finite_stay_out_of_every_copy,
    test_distributed.evaluation_reads_and_writes_nothing,
    test_distributed_fill.a_filled_memory_has_the_batches_of_all,
    test_distributed_state.a_state_goes_from_many_processes_to_one_and_back,
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shards", [1, 2])
def test_ranks_on_a_gpu(shards, tmp_path):
    on_disk = partial(test_shards.a_checkpoint_is_resumed_on_any_grid, tmp_path / "checkpoint")
    ranks.launch(2, tmp_path / "store", *CHECKS, *([on_disk] if shards > 1 else []), shards=shards, device="cuda")
