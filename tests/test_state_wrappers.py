"""What wraps, averages or casts a model that owns its criterion leaves a memory that existed."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrize
from criteria import B, D, M, Net, assert_state, state_of, train
from processes import context, start
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbn_ext import Contrastive, CrossBatchMemory, SupCon


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _rank(rank, store, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    net = Net()
    train(nn.parallel.DistributedDataParallel(net), first_label=100 * rank)
    queue.put((rank, net.criterion.label_memory.tolist(), net.fc.weight.detach().tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_every_rank_of_distributed_data_parallel_keeps_its_memory(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    queue = context().SimpleQueue()
    start(2, _rank, str(tmp_path / "store"), queue)
    (_, labels, weight), (_, other_labels, other_weight) = sorted(queue.get() for _ in range(2))
    assert weight == other_weight
    assert labels == [0, 1, 2] * 6 and other_labels == [100, 101, 102] * 6


def test_distributed_data_parallel_has_nothing_to_broadcast(one_process):
    wrapped = nn.parallel.DistributedDataParallel(Net())
    assert not wrapped.modules_buffers
    train(wrapped)
    assert wrapped.module.criterion.count == 3 * B


def test_averaging_leaves_a_memory_that_existed():
    """The average has the memory of the model that it was made of, and copying it back leaves the model's own."""
    net = train(Net(), first_label=1000)
    at_first = state_of(net.criterion)
    averaged = AveragedModel(net, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        train(net, 1, first_label=1000)
        averaged.update_parameters(net)
    assert_state(averaged.module.criterion, at_first)
    now = state_of(net.criterion)
    with torch.no_grad():  # as Lightning's WeightAveraging does when training ends
        for ours, theirs in zip(net.parameters(), averaged.module.parameters(), strict=True):
            ours.copy_(theirs)
        for ours, theirs in zip(net.buffers(), averaged.module.buffers(), strict=True):
            ours.copy_(theirs)
    assert_state(net.criterion, now)


def test_fsdp1_casts_nothing(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    net = Net()
    dtypes = {name: tensor.dtype for name, tensor in net.criterion.state_dict().items()}
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), mixed_precision=precision)
    train(wrapped)
    assert {name: tensor.dtype for name, tensor in net.criterion.state_dict().items()} == dtypes
    assert net.criterion.count == 3 * B


def test_fsdp2_learns_a_temperature_of_one_element(one_process):
    from torch.distributed.fsdp import fully_shard

    net = Net(SupCon(nn.Parameter(torch.tensor([0.3]))))
    alone = copy.deepcopy(net)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(net, mesh=mesh)
    x, labels = torch.randn(B, D), torch.arange(B) % 3
    for module in (net, alone):
        module(x, labels).backward()
    torch.testing.assert_close(net.criterion.temperature.grad.full_tensor(), alone.criterion.temperature.grad)
    assert net.criterion.temperature.grad.full_tensor().abs() > 0


@pytest.mark.parametrize("name", ["embeddings", "labels", "enqueue_mask", "ids"])
def test_a_distributed_tensor_is_refused_before_anything_is_written(name, one_process):
    """One among others raised in the first op that takes it, which for labels comes after the memory has moved."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    criterion = train(CrossBatchMemory(Contrastive(), D, M))
    before, labels = state_of(criterion), torch.arange(B)
    call = {"embeddings": torch.randn(B, D), "labels": labels, "enqueue_mask": labels > 3, "ids": labels}
    call[name] = distribute_tensor(call[name], mesh, [Replicate()])
    with pytest.raises(TypeError, match=f"{name} must be .* in a DTensor, not its to_local"):
        criterion(**call)
    state = state_of(criterion) | {"sums": distribute_tensor(criterion.sums, mesh, [Replicate()])}
    with pytest.raises(RuntimeError, match=r"sums must be .* in a DTensor.*; nothing of the state was loaded"):
        criterion.load_state_dict(state)
    assert_state(criterion, before)


def test_checkpoints_of_torch_distributed(one_process):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net, other = train(Net()), Net()
    state = get_model_state_dict(net)
    assert "criterion.bank" in state
    set_model_state_dict(other, state)
    assert_state(other.criterion, state_of(net.criterion))


def test_a_wrapped_criterion_can_be_filled(one_process):
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(CrossBatchMemory(Contrastive(), D, M), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    half = nn.Module()
    half.forward = lambda t: t / 2
    parametrized = CrossBatchMemory(SupCon(nn.Parameter(torch.tensor(0.2))), D, M)
    nn.utils.parametrize.register_parametrization(parametrized, "temperature", half)
    for criterion in (sharded, parametrized):
        criterion.fill_from([(torch.randn(B, D), torch.arange(B))])
        assert criterion.count == B
