"""The memory of --method oracle: what it is made of its images, before every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import settings
from torch import Tensor
from torch.nn import functional as F

import xbn_ext
from train import making, model, oracle, run
from train.config import Config, ConfigError
from train.model import Embedder, without_traces
from train.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BATCH, DIM = 4, 8


def network(frozen: bool = False) -> Embedder:
    how = "frozen" if frozen else "batch"
    config = Config(backbone="convnet", weights="none", image_size=32, embedding_dim=DIM, batchnorm=how)
    built = model.build(config)[0]
    return built.train()


def batch(step: int, rows: int = BATCH) -> Tensor:
    return torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))


def train(
    memory_size: int, steps: int, spoiled: tuple[int, int] | None = None, frozen: bool = False
) -> tuple[Any, ...]:
    """A network that changes in every step; ``spoiled`` is the step and the row of an embedding that is not finite."""
    trained, criterion = (
        network(frozen),
        xbn_ext.CrossBatchMemory(xbn_ext.Contrastive(), DIM, memory_size, drift="none"),
    )
    kept = oracle.Oracle(memory_size, CPU)
    for step in range(steps):
        embeddings = trained(batch(step)).detach()
        if spoiled is not None and step == spoiled[0]:
            embeddings[spoiled[1], 0] = torch.nan
        kept.before_step(trained, criterion, batch(step), embeddings)
        criterion(embeddings, torch.arange(BATCH) // 2)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
    return trained, criterion, kept


@pytest.mark.parametrize(("memory_size", "there"), [(12, [2, 3, 4]), (40, [0, 1, 2, 3, 4])])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_row_is_of_todays_network(memory_size: int, there: list[int], frozen: bool) -> None:
    trained, criterion, kept = train(memory_size, 5, frozen=frozen)
    assert sorted(criterion.age_memory.unique().tolist()) == [5 - step for step in reversed(there)]
    kept.before_step(trained, criterion, batch(5), trained(batch(5)).detach())
    slots = [step * BATCH % memory_size for step in there]
    by_slot = [step for _, step in sorted(zip(slots, there, strict=True))]
    with without_traces(trained):  # all in one: fewer than an oracle embeds at a time
        now = F.normalize(trained(torch.cat([batch(step) for step in by_slot])), dim=1)
    torch.testing.assert_close(criterion.embedding_memory, now)


def test_a_row_that_is_not_finite_now_stays_what_it_was() -> None:
    trained, criterion, kept = train(12, 3)
    before = criterion.embedding_memory
    with torch.no_grad():
        trained.head.weight.fill_(torch.nan)
    kept._refresh(trained, criterion)
    assert torch.equal(criterion.embedding_memory, before)


def test_a_row_that_is_not_stored_has_no_image() -> None:
    _, criterion, kept = train(12, 4, spoiled=(2, 1))
    assert int(criterion.head) == 3, "of sixteen rows one is left out, and the ring has twelve"
    left = torch.cat([batch(2)[[0, 2, 3]], batch(3), batch(1), batch(0)[3:]])
    order = [(8 + i) % 12 for i in range(7)] + [4, 5, 6, 7, 3]
    assert all(torch.equal(kept.images[slot], image) for slot, image in zip(order, left, strict=True))


def test_embedding_again_leaves_no_traces() -> None:
    trained, criterion, kept = train(12, 3)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    kept._refresh(trained, criterion)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_many_images_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(oracle, "CHUNK", 5)
    trained, criterion, kept = train(16, 4)
    trained.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    kept._refresh(trained, criterion)
    assert seen == [4, 4, 4, 4]


@pytest.mark.long
def test_a_memory_of_an_oracle_is_less_stale(shapes: Path, tmp_path: Path) -> None:
    of = {
        method: run.run(settings(shapes, tmp_path / method, method=method, lr=0.01, steps=24))["history"]["drift"]
        for method in ("xbm", "oracle")
    }
    old = {method: [point for point in found if point["age"] > 1] for method, found in of.items()}
    assert all(len(found) > 3 for found in old.values())
    mean = {method: sum(point["in_memory"] for point in found) / len(found) for method, found in old.items()}
    assert 0 < mean["oracle"] < 0.5 * mean["xbm"]


def test_its_images_count_as_memory_and_it_works_alone() -> None:
    config = Config(method="oracle", memory_size=100, image_size=32)
    assert making.memory_bytes(config) == making.memory_bytes(Config(memory_size=100, image_size=32)) + 100 * 3 * 32**2
    with pytest.raises(ConfigError, match=r"--memory-size 10000000000: .* the memory, with its images, takes"):
        run.require_memory(Config(method="oracle", memory_size=10**10), CPU)
    several = Ranks()
    several.size = 2
    with pytest.raises(ConfigError, match="--method oracle: works in one process, and there are 2"):
        run.require_parts(config, several)
