"""What else a step may do: average weights (`--ema`), take several batches (`--accumulate`), run compiled."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from torch import Tensor

from train import checkpoint, export, journal, loop, making, run
from train.config import Config, ConfigError
from train.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

STEPS = 9


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"steps": STEPS, "eval_every": 4} | changes)


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


def test_the_average_is_that_of_the_weights_after_each_step(shapes: Path, tmp_path: Path) -> None:
    made = trainer(settings(shapes, tmp_path, ema=0.75))
    expected: dict[str, Tensor] = {}
    for step in range(4):
        made.train_step([made.batches[step]])
        now = {name: value.clone().double() for name, value in made.model.state_dict().items()}
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now} if expected else now
    found = made.network.state_dict()
    assert made.network is not made.model and found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():  # running statistics, too
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["head.weight"], made.model.head.weight)


def test_training_and_memory_do_not_know_of_it_and_what_is_tested_does(shapes: Path, tmp_path: Path) -> None:
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


def test_the_average_is_what_is_exported_and_embedded(shapes: Path, tmp_path: Path) -> None:
    run.run(settings(shapes, tmp_path, ema=0.9))
    average = stored(tmp_path)["average"]["model"]
    trained = Trained(tmp_path)
    assert miniatures.same(dict(trained.network.state_dict()), dict(average))
    assert export.main([str(tmp_path)]) == 0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.load(str(tmp_path / "network.pt2")).module()
    torch.testing.assert_close(program(images), trained(images))


def test_the_best_weights_are_averages(shapes: Path, tmp_path: Path) -> None:
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


@pytest.mark.singly
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("changes", [{}, {"precision": "float16", "validation_share": 0.5, "batch_size": 4}])
def test_a_run_with_averaged_weights_goes_on_exactly(
    stop: int, changes: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    straight = settings(shapes, tmp_path / "straight", ema=0.9, **changes)
    assert_goes_on(straight, settings(shapes, tmp_path / "parts", ema=0.9, resume=True, **changes), stop)
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text())["config"]["ema"] == 0.9


# ---- several batches a step -----------------------------------------------------------------------------------------


def test_the_optimizer_takes_the_mean_of_gradients_of_batches_that_are_stored_one_after_the_other(
    shapes: Path, tmp_path: Path
) -> None:
    config = settings(shapes, tmp_path, accumulate=3, weight_decay=0.0)
    made, by_hand = trainer(config), trainer(config)
    batches = [made.batches[i] for i in range(3)]
    value = made.train_step(batches)
    by_hand.model.train()
    losses = [by_hand.criterion(by_hand.model(images), labels) for images, labels in batches]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert value == pytest.approx(mean.item(), rel=1e-6)
    for (name, found), expected in zip(made.model.named_parameters(), by_hand.model.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)
    torch.testing.assert_close(made.criterion.embedding_memory, by_hand.criterion.embedding_memory)
    assert int(made.criterion.count) == 24 and made.step == 1


def test_a_step_is_one_of_the_optimizer(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings, its history and its learning rates know nothing of how many batches it takes."""
    read: list[int] = []
    original = loop.TrainingBatches.__getitem__

    def noted(batches: loop.TrainingBatches, number: int) -> Any:
        read.append(number)
        return original(batches, number)

    monkeypatch.setattr(loop.TrainingBatches, "__getitem__", noted)
    monkeypatch.setattr(journal, "MEAN_LOSS_OVER", 1)
    metrics = run.run(settings(shapes, tmp_path, accumulate=2, warmup_steps=3, memory_size=64))
    assert read == list(range(2 * STEPS))
    history, end = metrics["history"], stored(tmp_path)
    assert [point["step"] for point in history["loss"]] == list(range(1, STEPS + 1))
    assert [point["step"] for point in history["evaluation"]] == [4, 8, 9]
    assert end["step"] == STEPS and {int(s["step"]) for s in end["optimizer"]["state"].values()} == {STEPS}
    criterion = making.make_criterion(settings(shapes, tmp_path, accumulate=2, warmup_steps=3))
    assert criterion.warmup_steps == 6, "batches"


@pytest.mark.parametrize(("accumulate", "memory"), [(2, 24), (3, 24), (4, 16), (2, 80)])
def test_staleness_is_of_rows_that_are_still_there(accumulate: int, memory: int, shapes: Path, tmp_path: Path) -> None:
    """Without correction they are the rows as stored, whatever has been stored after them."""
    changes = {"method": "xbm", "accumulate": accumulate, "memory_size": memory, "lr": 0.01}
    history = run.run(settings(shapes, tmp_path, **changes))["history"]["drift"]
    assert history and any(point["uncorrected"] > 1e-3 for point in history)
    for point in history:
        assert point["in_memory"] == pytest.approx(point["uncorrected"], abs=1e-6)
        assert ((point["age"] - 1) * accumulate + 1) * 8 <= memory, "in steps"
    assert {point["age"] for point in history} >= ({1, 2, 3, 4, 5} if memory == 80 else {1})


def test_one_batch_without_a_finite_loss_spoils_its_step_alone(shapes: Path, tmp_path: Path) -> None:
    made = trainer(settings(shapes, tmp_path, accumulate=2, ema=0.5))
    images, labels = made.batches[0]
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    original = made.criterion.forward
    losses = iter([1.0, math.nan, 1.0, 1.0])
    made.criterion.forward = lambda *given: original(*given) * next(losses)  # type: ignore[method-assign]
    assert not math.isfinite(made.train_step([(images, labels)] * 2))
    assert all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    assert made.bad_steps == 1 and made.average is not None and made.average.state_dict()["updates"] == 0
    assert math.isfinite(made.train_step([(images, labels)] * 2)) and made.bad_steps == 0
    assert not all(torch.equal(before[name], value) for name, value in made.model.named_parameters())


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_spoils_its_step_alone(clip: float, shapes: Path, tmp_path: Path) -> None:
    """Also where the loss is: a kernel may overflow on the way back only."""
    made = trainer(settings(shapes, tmp_path, clip_grad=clip, ema=0.5))
    images, labels = made.batches[0]
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    spoiled = [True, False]
    made.model.head.weight.register_hook(lambda grad: grad * math.nan if not spoiled or spoiled.pop(0) else grad)
    assert math.isfinite(made.train_step([(images, labels)])) and made.bad_steps == 1
    assert all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    assert made.average is not None and made.average.state_dict()["updates"] == 0
    assert math.isfinite(made.train_step([(images, labels)])) and made.bad_steps == 0
    assert not all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    made.train_step([(images, labels)])
    goes_on = trainer(made.config)
    goes_on.load_state_dict(made.state_dict())
    assert goes_on.bad_steps == 1, "a run that goes on is the same run"
    with pytest.raises(loop.TrainingError, match="the gradient was not finite in each of the 10 steps up to step 11: "):
        for _ in range(loop.MAX_BAD_STEPS - 1):
            made.train_step([(images, labels)])


@pytest.mark.parametrize("stop", [5, *(pytest.param(stop, marks=pytest.mark.long) for stop in (1, 4))])
def test_a_run_with_several_batches_a_step_goes_on_exactly(stop: int, shapes: Path, tmp_path: Path) -> None:
    changes = {"accumulate": 2, "memory_size": 48, "ema": 0.8, "warmup_steps": 2}
    straight = settings(shapes, tmp_path / "straight", **changes)
    assert_goes_on(straight, settings(shapes, tmp_path / "parts", resume=True, **changes), stop)


# ---- a compiled network ---------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile traces, and generates no code, which takes seconds; what it is called with."""
    compiled: list[Any] = []
    original = torch.compile

    def compile(network: Any, **how: Any) -> Any:
        compiled.append(network)
        return original(network, backend="aot_eager", **how)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile)
    return compiled


def test_a_compiled_run_is_the_run_and_its_checkpoint_has_the_same_names(
    shapes: Path, tmp_path: Path, quickly: list[Any]
) -> None:
    plain = run.run(settings(shapes, tmp_path / "plain", lr=1e-4))
    assert not quickly
    compiled = run.run(settings(shapes, tmp_path / "compiled", lr=1e-4, compile=True))
    assert len(quickly) == 1
    for name in ("loss", "evaluation", "drift"):
        for one, other in zip(plain["history"][name], compiled["history"][name], strict=True):
            times = {"seconds": 0}
            assert one | times == pytest.approx(other | times, rel=1e-3, abs=1e-4), name
    ends = [stored(tmp_path / name) for name in ("plain", "compiled")]
    assert list(ends[0]["model"]) == list(ends[1]["model"])
    assert ends[0]["config"] == ends[1]["config"], "it may be left out when the run goes on"
    assert Trained(tmp_path / "compiled").step == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": 0.8, "accumulate": 2, "memory_size": 48},
        *(pytest.param(changes, marks=pytest.mark.long) for changes in ({}, {"features": "frozen"})),
    ],
)
def test_a_compiled_run_goes_on_exactly(
    changes: dict[str, Any], shapes: Path, tmp_path: Path, quickly: list[Any]
) -> None:
    straight = settings(shapes, tmp_path / "straight", compile=True, **changes)
    assert_goes_on(straight, settings(shapes, tmp_path / "parts", compile=True, resume=True, **changes), 5)
    assert len(quickly) == 3


@pytest.mark.long
def test_a_run_goes_on_with_it_or_without(shapes: Path, tmp_path: Path, quickly: list[Any]) -> None:
    for first in (True, False):
        with pytest.raises(loop.Interrupted):
            out = tmp_path / str(first)
            run.run(settings(shapes, out, compile=first), asked_to_stop=miniatures.after(3))
        assert run.run(settings(shapes, out, compile=not first, resume=True))["steps"] == STEPS
    assert len(quickly) == 2


@pytest.mark.parametrize("of_cache", [False, True])
def test_what_cannot_be_compiled_is_said_in_a_line(
    of_cache: bool, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "/cache")

    def backend(*_: object) -> Any:
        raise RuntimeError("there is no C++ compiler. Install one")

    original = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda network, **how: forward if of_cache else original(network, backend=backend, **how)
    )
    with pytest.raises(ConfigError, match=r"^--compile: torch cannot compile the network \(.*; leave it out$"):
        run.run(settings(shapes, tmp_path, compile=True))


@pytest.mark.long
def test_generated_code_trains_and_goes_on_exactly(shapes: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    straight = settings(shapes, tmp_path / "straight", compile=True)
    assert_goes_on(straight, settings(shapes, tmp_path / "parts", compile=True, resume=True), 5)
