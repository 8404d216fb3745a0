"""A temperature that is a tensor: its dtype, device and shape, and that whether it is learned is chosen once."""

import pytest
import torch
from memory_cases import D, M, X, Y, batches, train

from xbn_ext import Contrastive, CrossBatchMemory, SigLIP, SupCon


@pytest.mark.parametrize("its_dtype", [torch.float64, torch.float16])
def test_a_temperature_of_another_dtype(its_dtype):
    """It divides embeddings of their own dtype, and gets its gradient in its own."""
    values, gradients = [], []
    for t in (torch.float32, its_dtype):
        temperature = torch.nn.Parameter(torch.tensor([0.25], dtype=t))
        criterion = CrossBatchMemory(SupCon(temperature), D, M)
        losses = [criterion(x, labels) for x, labels in batches(3)]
        losses[-1].backward()
        assert losses[-1].dtype == torch.float32 and temperature.grad.dtype == t
        values.append(losses[-1]), gradients.append(temperature.grad.float())
    assert torch.equal(*values)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize("bias", [None, -1.0, torch.nn.Parameter(torch.tensor(-1.0))], ids=["", "bias", "learned bias"])
def test_a_temperature_on_another_device_is_named(bias, learned):
    temperature = torch.tensor(0.1, device="meta")
    temperature = torch.nn.Parameter(temperature) if learned else temperature
    criterion = CrossBatchMemory(SupCon(temperature) if bias is None else SigLIP(temperature, bias), D, M)
    with pytest.raises(ValueError, match="temperature is on meta, the memory on cpu"):
        criterion(X, Y)
    assert criterion.variance.isinf() and criterion.count == 0


@pytest.mark.parametrize("size, fits", [((), True), ((1,), False)])
def test_a_fixed_temperature_stays_where_it_is(size, fits):
    """It is no part of the module. A scalar of the CPU divides what is on any device."""
    criterion = CrossBatchMemory(SupCon(torch.full(size, 0.1)), D, M).to("meta")
    if fits:
        assert criterion(X.to("meta"), Y.to("meta")).is_meta
    else:
        with pytest.raises(ValueError, match="temperature is on cpu, the memory on meta"):
            criterion(X.to("meta"), Y.to("meta"))


@pytest.mark.parametrize("set_it", [setattr, CrossBatchMemory.register_parameter], ids=["set", "register"])
@pytest.mark.parametrize(
    "loss, other, message",
    [
        (SupCon(torch.nn.Parameter(torch.tensor(0.3))), None, "temperature is learned and cannot become None"),
        (SupCon(0.3), torch.nn.Parameter(torch.tensor(0.1)), "temperature is not learned and cannot become a"),
        (Contrastive(), torch.nn.Parameter(torch.tensor(0.1)), "temperature is not learned and cannot"),
    ],
    ids=["learned", "fixed", "none"],
)
def test_whether_a_temperature_is_learned_is_chosen_once(loss, other, message, set_it):
    """Without its parameter the loss was at a temperature of 1; with one that it does not have, it had no loss."""
    criterion = CrossBatchMemory(loss, D, M)
    before = criterion.temperature
    with pytest.raises(AttributeError, match=message):
        set_it(criterion, "temperature", other)
    assert criterion.temperature is before
    set_it(criterion, "temperature", before)
    assert criterion.loss == loss


def test_a_temperature_of_another_shape_is_refused_before_anything_is_written():
    """As where a framework has cut the parameter to pieces."""
    criterion = CrossBatchMemory(SupCon(torch.nn.Parameter(torch.tensor(0.1))), D, M)
    train(criterion, batches(3))
    before = {name: tensor.clone() for name, tensor in criterion.named_state()}
    for shape in (0, 3):
        criterion.temperature = torch.nn.Parameter(torch.ones(shape))
        with pytest.raises(ValueError, match=rf"temperature must be a number or .*, got torch.float32 \[{shape}\]"):
            criterion(X, Y)
        assert all(torch.equal(tensor, before[name]) for name, tensor in criterion.named_state())
