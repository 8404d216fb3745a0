"""What a run is made of, as its settings say: the learning rate at each step, the criterion and the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import settings

from train import making, run
from train.config import METHODS, Config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = Config(steps=100, lr_warmup=10)
    rates = [making.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3
    assert making.learning_rate(Config(steps=1, lr_warmup=0), 0) == 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_in_the_criterion_alone(method: str) -> None:
    criterion = making.make_criterion(Config(method=method, memory_weight=0.7))
    assert criterion.drift == {"batch": "none", "xbm": "none", "oracle": "none"}.get(method, method)
    assert criterion.memory_weight == (0 if method == "batch" else 0.7)


def test_the_bytes_of_the_memory_are_those_of_its_rows() -> None:
    small, large = (Config(memory_size=size, embedding_dim=24) for size in (100, 1100))
    found = [sum(t.nbytes for t in making.make_criterion(config).state_dict().values()) for config in (small, large)]
    assert (
        found[1] - found[0]
        == making.memory_bytes(large) - making.memory_bytes(small)
        == making.memory_bytes(small) * 10
    )


def test_the_default_filter_follows_the_network_within_a_step() -> None:
    criterion = making.make_criterion(Config(memory_size=64, embedding_dim=8, batch_size=16))
    for _ in range(10):
        criterion(torch.randn(16, 8), torch.arange(16) // 2)
    assert float(criterion.stats()["gain"]) > 0.5, "of a jump more than half is made up for in one step"


def test_learning_rates() -> None:
    def rates(schedule: str, warmup: int = 4) -> list[float]:
        return [making.learning_rate(Config(schedule=schedule, steps=24, lr_warmup=warmup), step) for step in range(24)]

    assert all(rates(schedule)[:4] == [0.25, 0.5, 0.75, 1.0] for schedule in ("cosine", "step", "constant"))
    assert rates("constant")[4:] == [1.0] * 20
    assert rates("step")[4:] == [1.0] * 14 + [0.1] * 6
    assert "0.7 of the steps that are left" in Config.__dataclass_fields__["schedule"].metadata["help"]
    assert rates("cosine")[4] == 1 and rates("cosine")[14] == pytest.approx(0.5) and rates("cosine")[23] < 0.01
    assert rates("constant", warmup=0) == [1.0] * 24


def test_weight_decay_is_beside_adam_or_part_of_the_gradient(shapes: Path, tmp_path: Path, tiny: None) -> None:
    """Without a gradient AdamW only shrinks weights; Adam takes the decay for a gradient, of whatever size."""
    shrunk = {}
    for name in ("adamw", "adam"):
        config = settings(shapes, tmp_path, optimizer=name, weight_decay=0.5, lr=0.01)
        network = run.model.build(config)[0]
        optimizer = making.make_optimizer(config, network)
        before = network.head.weight.detach().clone()
        network.head.weight.grad = torch.zeros_like(before)
        optimizer.step()
        shrunk[name] = before - network.head.weight.detach()
    torch.testing.assert_close(shrunk["adamw"], 0.01 * 0.5 * before)
    torch.testing.assert_close(shrunk["adam"], 0.01 * before.sign(), rtol=1e-3, atol=1e-5)
