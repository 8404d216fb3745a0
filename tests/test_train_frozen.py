"""Frozen features: they are those of the network, and only the head learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from train import checkpoint, features, loop, model
from train.augment import evaluation_view
from train.config import Config
from train.data import Dataset
from train.model import Embedder

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen(out: Path) -> Config:
    return Config(
        features="frozen", backbone="convnet", weights="none", image_size=32, hidden=16, embedding_dim=8, steps=6,
        batch_size=8, samples_per_class=2, memory_size=16, out=out, threads=1, eval_every=3,
    )  # fmt: skip


def test_frozen_features_are_those_of_the_network(few_emoji: Dataset, tmp_path: Path) -> None:
    config = frozen(tmp_path)
    network, _ = model.build(config)
    found = features.of(few_emoji, network, evaluation_view(32), torch.device("cpu"))
    network.eval()
    images = torch.from_numpy(np.asarray(few_emoji.test.images)[:5]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.features(torch.stack([evaluation_view(32)(image) for image in images]))
    assert torch.allclose(torch.from_numpy(np.asarray(found.test.images)[:5]), expected, atol=1e-6)
    assert found.train.classes == few_emoji.train.classes


def test_only_the_head_learns_from_frozen_features(
    few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = frozen(tmp_path)
    network, _ = model.build(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = loop.Trainer(config, network, few_emoji, torch.device("cpu"))
    monkeypatch.setattr(network.backbone, "forward", lambda *_: pytest.fail("an image went through the backbone again"))
    embeddings = trainer.run(quiet=True)
    assert embeddings.shape == (len(few_emoji.test.labels), 8)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}
    assert isinstance(network, Embedder) and len(list(network.head.parameters())) == 4
    assert len(trainer.history["evaluation"]) == 1 and not (tmp_path / checkpoint.EVENTS).exists(), "quiet"
