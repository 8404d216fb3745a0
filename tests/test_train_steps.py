"""What else a step may do: average the weights (`--ema`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from torch import Tensor

from train import checkpoint, export, loop, results, run
from train.config import Config
from train.trained import Trained

STEPS = 9


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for picture in ("curves", "neighbours"):
        monkeypatch.setattr(results.pictures, picture, lambda path, *_: path.write_bytes(b"."))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return miniatures.make_shapes(tmp_path_factory.mktemp("shapes"))


def settings(shapes: str, out: Path, **changes: Any) -> Config:
    small = {
        "data": shapes, "out": out, "backbone": "convnet", "image_size": 32, "embedding_dim": 8, "memory_size": 24,
        "batch_size": 8, "samples_per_class": 2, "steps": STEPS, "eval_every": 4, "lr_warmup": 2, "threads": 1,
    }  # fmt: skip
    return Config(**small | changes)


def trainer(config: Config) -> loop.Trainer:
    return loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))


def stored(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoint.pt")


def assert_goes_on(straight: Config, parts: Config, stop: int) -> None:
    """A run that is stopped and goes on ends with the same bits."""
    metrics = run.run(straight)
    with pytest.raises(loop.Interrupted):
        run.run(parts, asked_to_stop=miniatures.after(stop))
    assert stored(parts.folder)["step"] == stop
    torch.manual_seed(100)
    assert miniatures.same(run.run(parts)["history"], metrics["history"])
    assert miniatures.same(stored(straight.folder), stored(parts.folder))


# ---- averaged weights -----------------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_weights_after_each_step(shapes: str, tmp_path: Path) -> None:
    made = trainer(settings(shapes, tmp_path, ema=0.75))
    expected: dict[str, Tensor] = {}
    for step in range(4):
        made.train_step(*made.batches[step])
        now = {name: value.clone().double() for name, value in made.model.state_dict().items()}
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now} if expected else now
    found = made.network.state_dict()
    assert made.network is not made.model and found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():  # running statistics, too
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["head.weight"], made.model.head.weight)


def test_training_and_memory_do_not_know_of_it_and_what_is_tested_does(shapes: str, tmp_path: Path) -> None:
    plain = run.run(settings(shapes, tmp_path / "plain"))
    metrics = run.run(settings(shapes, tmp_path / "averaged", ema=0.9))
    ends = [stored(tmp_path / name) for name in ("plain", "averaged")]
    assert "average" not in ends[0] and ends[1]["average"]["updates"] == STEPS
    for name in ("model", "criterion", "optimizer", "drift"):
        assert miniatures.same(ends[0][name], ends[1][name]), name
    for name in ("loss", "drift", "memory"):
        assert miniatures.same(plain["history"][name], metrics["history"][name]), name
    assert not miniatures.same(plain["history"]["evaluation"], metrics["history"]["evaluation"])

    config = settings(shapes, tmp_path / "averaged", ema=0.9)
    again = trainer(config)
    again.model.load_state_dict(ends[1]["average"]["model"])
    again.average = None
    assert again.scores(again.test_embeddings()).items() <= metrics["history"]["evaluation"][-1].items()


def test_the_average_is_what_is_exported_and_embedded(shapes: str, tmp_path: Path) -> None:
    run.run(settings(shapes, tmp_path, ema=0.9))
    average = stored(tmp_path)["average"]["model"]
    trained = Trained(tmp_path)
    assert miniatures.same(dict(trained.network.state_dict()), dict(average))
    assert export.main([str(tmp_path)]) == 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.load(str(tmp_path / "network.pt2")).module()
    torch.testing.assert_close(program(images), trained(images))


def test_the_best_weights_are_averages(shapes: str, tmp_path: Path) -> None:
    changes = {"ema": 0.9, "validation_share": 0.5, "batch_size": 4}
    metrics = run.run(settings(shapes, tmp_path / "whole", **changes))
    step = metrics["validation"]["step"]
    if step < STEPS:
        with pytest.raises(loop.Interrupted):
            run.run(settings(shapes, tmp_path / "parts", **changes), asked_to_stop=miniatures.after(step))
    then = stored(tmp_path / ("parts" if step < STEPS else "whole"))
    best = checkpoint.load(tmp_path / "whole" / "best.pt", kinds=checkpoint.WEIGHTS)
    assert best["step"] == step and "average" not in best
    assert miniatures.same(dict(best["model"]), dict(then["average"]["model"]))
    assert miniatures.same(dict(Trained(tmp_path / "whole", "best").network.state_dict()), dict(best["model"]))


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("changes", [{}, {"precision": "float16", "validation_share": 0.5, "batch_size": 4}])
def test_a_run_with_averaged_weights_goes_on_exactly(
    stop: int, changes: dict[str, Any], shapes: str, tmp_path: Path
) -> None:
    straight = settings(shapes, tmp_path / "straight", ema=0.9, **changes)
    assert_goes_on(straight, settings(shapes, tmp_path / "parts", ema=0.9, resume=True, **changes), stop)
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text())["config"]["ema"] == 0.9
