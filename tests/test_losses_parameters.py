"""The parameters of a loss: which numbers and tensors they may be, and that an op finds the loss by them."""

import pytest
import torch
from loss_cases import problem

from xbn_ext import (
    DCLW,
    Circle,
    Contrastive,
    CrossBatchMemory,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    SigLIP,
    SupCon,
    Triplet,
    reference,
)
from xbn_ext import ops as cpu_ops
from xbn_ext.losses import KINDS


def test_what_a_memory_begins_with_is_in_its_range():
    own = torch.nn.Parameter
    for loss, why in [
        (lambda: SupCon(own(torch.tensor(0.0))), "temperature must be positive"),
        (lambda: NTXent(torch.tensor(-0.1)), "temperature must be positive"),
        (lambda: SigLIP(bias=own(torch.tensor(torch.nan))), "bias must be a finite number"),
        (lambda: Margin(beta=torch.tensor(torch.inf)), "beta must be a finite number"),
        (lambda: SigLIP(bias=own(torch.tensor(-1e30))), "bias must be within"),
    ]:
        with pytest.raises(ValueError, match=why):
            CrossBatchMemory(loss(), 8, 16)
    CrossBatchMemory(SupCon(own(torch.empty((), device="meta"))), 8, 16)


@pytest.mark.parametrize(
    "loss, name",
    [
        (Contrastive, "pos_margin"),
        (Contrastive, "neg_margin"),
        (Margin, "margin"),
        (Margin, "beta"),
        (SigLIP, "bias"),
        (MultiSimilarity, "base"),
        (MultiSimilarity, "mining"),
        (LiftedStructure, "pos_margin"),
        (Triplet, "margin"),
    ],
)
def test_a_number_beyond_those_of_similarities_is_refused(loss, name):
    """The loss was 0, infinite or NaN, and not the same with the kernels and without."""
    loss(**{name: 1e15})
    with pytest.raises(ValueError, match=rf"{name} must be within \[-1e15, 1e15\], got 1e\+38"):
        loss(**{name: 1e38})


@pytest.mark.parametrize(
    "loss, name, bounds, beyond",
    [
        (DCLW, "sigma", r"\[0.0001, 1e30\]", [0.99e-4, 1e-9]),
        (Circle, "m", r"\[-10, 10\]", [-10.1, 10.1, 1e15]),
    ],
)
def test_a_number_beside_which_float32_would_lose_similarities_is_refused(loss, name, bounds, beyond):
    """Weights were e^60, gradients NaN."""
    for value in beyond:
        with pytest.raises(ValueError, match=f"{name} must be within {bounds}, got"):
            loss(**{name: value})


@pytest.mark.parametrize(
    "loss",
    [
        *(MultiSimilarity(base=base, mining=mining) for base in (1e6, -1e6) for mining in (None, 0.1)),
        *(LiftedStructure(by, neg) for by, neg in ((1e6, 0.5), (1.0, -1e6), (1e6, 1e6))),
    ],
    ids=lambda loss: f"{loss.name}-{loss.parameters}",
)
def test_what_all_exponents_share_rounds_no_similarity(loss, ops, device):
    z, labels, bank, bank_labels = problem(9, 150, 16, torch.float32, device, classes=5)
    z.requires_grad_()
    ops.memory_loss(z, labels, bank, bank_labels, loss).backward()
    wide = z.detach().double().requires_grad_()
    reference.memory_loss(wide, labels, bank.double(), bank_labels, loss).backward()
    torch.testing.assert_close(z.grad, wide.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)
def test_a_loss_is_found_by_its_parameters(loss):
    """As an op is told of it, which looks at them itself."""
    again = loss.with_parameters(loss.parameters)
    assert type(again) is type(loss) and again.kind == loss.kind
    assert again.parameters == pytest.approx(loss.parameters, rel=1e-15)
    loss.with_parameters([1e300 for _ in loss.parameters])


@pytest.mark.parametrize("temperature", [torch.ones(2), torch.tensor(1), torch.ones(1, 1), torch.ones(0)], ids=str)
def test_a_temperature_of_several_elements_or_dimensions(temperature):
    with pytest.raises(ValueError, match=r"temperature must be a number or a floating-point tensor \[\] or \[1\]"):
        SupCon(temperature)


@pytest.mark.parametrize("loss", [SupCon, NTXent])
def test_a_temperature_of_one_element_is_a_number(loss):
    """FSDP2 shards no scalars."""
    z, labels, bank, bank_labels = problem(9, 40, 5, torch.float64)
    values, gradients = [], []
    for shape in ((), (1,)):
        temperature = torch.nn.Parameter(torch.full(shape, 0.3, dtype=torch.float64))
        value = cpu_ops.memory_loss(z, labels, bank, bank_labels, loss(temperature))
        value = value + cpu_ops.batch_loss(z, labels, loss(temperature))
        assert value.dim() == 0
        value.backward()
        values.append(value), gradients.append(temperature.grad.reshape(()))
    assert torch.equal(*values) and torch.equal(*gradients) and gradients[0] != 0
