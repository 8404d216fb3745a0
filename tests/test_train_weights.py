"""The weights that a run begins with are in its checkpoints: it goes on without the file that they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from miniatures import settings

from train import checkpoint, convnet, loop, model, run
from train.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture(params=[{}, {"freeze": 0.5, "batchnorm": "frozen"}], ids=str)
def begun(request: pytest.FixtureRequest, shapes: Path, tmp_path: Path) -> tuple[Config, Config]:
    """A whole run and one that was stopped, both from a file that is gone."""
    changes: dict[str, Any] = request.param
    file = tmp_path / "weights.pt"
    torch.save(convnet.convnet().state_dict(), file)
    straight, parts = (
        settings(shapes, tmp_path / name, weights=str(file), **changes) for name in ("straight", "parts")
    )
    assert run.run(straight)["backbone"] == "convnet: weights of weights.pt"
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(6))
    file.unlink()
    return straight, parts


def test_it_goes_on_exactly(begun: tuple[Config, Config]) -> None:
    _, parts = begun
    assert run.run(replace(parts, resume=True))["backbone"] == "convnet: weights of weights.pt"
    assert miniatures.same(*(checkpoint.load(config.folder / "checkpoint.pt") for config in begun))


@pytest.mark.parametrize("of_an_earlier_version", [True, False])
def test_without_it_nothing_else_begins(begun: tuple[Config, Config], of_an_earlier_version: bool) -> None:
    """A checkpoint of an earlier version does not say what its weights decided."""
    _, parts = begun
    weights = {"model": checkpoint.load(parts.folder / "checkpoint.pt")["model"]}
    network, _ = model.build(parts, goes_on=True)
    go_on: Callable[[], object] = (
        (lambda: network.go_on(weights)) if of_an_earlier_version else lambda: model.build(parts)
    )
    with pytest.raises(ConfigError, match=r"--weights .*weights\.pt: cannot read"):
        go_on()
