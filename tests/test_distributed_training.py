"""Many processes that train one network with one memory: wrapped, sharded, scaled, compiled."""

import copy
import itertools
import os

import pytest
import ranks
import torch
import torch.distributed as dist
from loss_cases import LOSSES
from ranks import D, Divided, alone_and_together, assert_same_state, few, launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from xbn_ext import SupCon


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


def copies_share_the_group(rank):
    _, together = alone_and_together(SupCon())
    assert copy.deepcopy(together).process_group is together.process_group is dist.group.WORLD
    averaged = AveragedModel(Network(together))
    assert averaged.module.criterion.process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="cannot be pickled: save its state_dict"):
        torch.save(together, os.devnull)
    assert f"rank {rank} of {dist.get_world_size()}" in repr(together)


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


CHECKS = [
    averaged_gradients_are_those_of_one_process,
    the_criterion_may_be_inside_of_what_is_wrapped,
    sharded_parameters_get_the_same_gradients,
    a_gradient_scaler_decides_alike_on_every_rank,
    copies_share_the_group,
]


@ranks.on_grids([*ranks.REPLICATED, *ranks.SHARDED])
def test_ranks(W, S, tmp_path):
    ranks.launch(W, tmp_path / "store", *CHECKS, shards=S)


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_ranks_that_compile(shards, tmp_path):
    launch(2, tmp_path / "store", a_compiled_step_is_the_step, shards=shards)
