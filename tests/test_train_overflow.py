"""Numbers that get too large: gradients are scaled down or skipped; what is not finite has no scores and ends a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import settings

from train import loop, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_large_gradient_is_scaled_down(precision: str, shapes: Path, tmp_path: Path, tiny: None) -> None:
    """All of it by one factor, after 16 bits have been scaled back."""
    found = []
    for clip in (0.0, 1e-3, 1e6):
        config = settings(shapes, tmp_path, clip_grad=clip, precision=precision)
        trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=precision == "float16")
        images, labels = next(trainer._batches())
        trainer.train_step([(images, labels)])
        gradient = [p.grad for group in trainer.optimizer.param_groups for p in group["params"]]
        found.append(torch.cat([g.flatten() for g in gradient if g is not None]))
    whole, clipped, left = found
    assert whole.norm() > 1e-3
    torch.testing.assert_close(clipped, 1e-3 * whole / whole.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(left, whole)


def test_gradients_that_overflow_are_skipped_and_scaled_less(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path, precision="float16")
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    images, labels = trainer.batches[0]
    before = trainer.model.head.weight.detach().clone()
    assert math.isfinite(trainer.train_step([(images, labels)]))
    assert torch.equal(before, trainer.model.head.weight) and trainer.scaler.get_scale() == 2.0**99
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train_step([(images, labels)])
    assert not torch.equal(before, trainer.model.head.weight)


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_after_a_while(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = run.model.build(settings(shapes, tmp_path))
    trainer = loop.Trainer(
        settings(shapes, tmp_path), network, run._load(settings(shapes, tmp_path)), torch.device("cpu")
    )
    images, labels = trainer.batches[0]
    with torch.no_grad():
        trainer.model.head.bias[0] = math.nan
    before = {name: value.clone() for name, value in trainer.model.state_dict().items() if "running" not in name}
    for _ in range(loop.MAX_BAD_STEPS - 1):
        assert not math.isfinite(trainer.train_step([(images, labels)]))
    assert all(np.array_equal(value, trainer.model.state_dict()[name], equal_nan=True) for name, value in before.items()
               if "num_batches" not in name)  # fmt: skip
    assert int(trainer.criterion.count) == 0 and not trainer.drift.probes
    with pytest.raises(loop.TrainingError, match=r"the loss was nan in each of the 10 steps up to step 9: lower --lr"):
        trainer.train_step([(images, labels)])


def test_embeddings_that_are_not_finite_have_no_scores(shapes: Path, tmp_path: Path, tiny: None) -> None:
    config = settings(shapes, tmp_path)
    trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    with pytest.raises(loop.TrainingError, match=r"after 0 steps: embeddings must be finite.*--lr"):
        trainer.scores(trainer.test_embeddings())
