"""Criteria for tests of the state: a model that owns one, a few steps of training, and what the state is then."""

import torch
from torch import nn

from xbn_ext import Contrastive, CrossBatchMemory

D, M, B = 8, 32, 6


class Net(nn.Module):
    """A model that owns its criterion, as a LightningModule does."""

    def __init__(self, loss=None):
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.criterion = CrossBatchMemory(loss or Contrastive(neg_margin=0.2), D, M)

    def forward(self, x, labels):
        return self.criterion(self.fc(x), labels)


class Subclass(CrossBatchMemory):
    """With tensors of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("weights", torch.ones(3))
        self.head_of_class = nn.Linear(2, 2)


def train(module, steps=3, first_label=0):
    for _ in range(steps):
        x = torch.randn(B, D, requires_grad=True)
        module(x, torch.arange(B) % 3 + first_label).backward()
    return module


def state_of(criterion):
    return {name: tensor.clone() for name, tensor in criterion.state_dict().items()}


def assert_state(criterion, expected):
    found = criterion.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
