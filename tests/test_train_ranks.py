"""One run in several processes is the run of one: the same losses, scores and checkpoint, one voice, one end."""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Answer, Processes
from torch import Tensor

from train import augment, checkpoint, convnet, evaluate, journal, loop, pictures, ranks, run
from train.compare import study
from train.config import Config, ConfigError
from train.data import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
CHUNK = 5
"""Test images at a time; there are 16."""


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes(3) as started:
        yield started


def arguments(shapes: Path, out: Path, *others: object) -> list[str]:
    words = (
        "--data", f"folder:{shapes}", "--out", out, "--backbone", "convnet", "--batchnorm", "frozen", "--image-size",
        32, "--embedding-dim", 8, "--memory-size", 24, "--batch-size", 8, "--samples-per-class", 2, "--steps", STEPS,
        "--lr-warmup", 2, "--eval-every", 5, "--threads", 1, "--device", "cpu", *others,
    )  # fmt: skip
    return [str(word) for word in words]


Change = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def small(change: Change | None = None) -> Iterator[pytest.MonkeyPatch]:
    """Every step's loss in the history, few test images at a time, pictures of one byte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "MEAN_LOSS_OVER", 1)
        patch.setattr(augment, "EVALUATION_BATCH", CHUNK)
        for picture in ("curves", "neighbours"):
            patch.setattr(pictures, picture, lambda path, *_: path.write_bytes(b"."))
        if change is not None:
            change(patch)
        yield patch


def train(words: list[str], change: Change | None = None) -> tuple[int, dict[str, Any]]:
    """The exit status, and what this process has at the end."""
    trainers: list[loop.Trainer] = []
    original = loop.Trainer.run

    def noted(trainer: loop.Trainer, *arguments: Any, **named: Any) -> Tensor:
        trainers.append(trainer)
        return original(trainer, *arguments, **named)

    with small(change) as patch:
        patch.setattr(loop.Trainer, "run", noted)
        status = run.main(words)
    if not trainers:
        return status, {}
    trainer = trainers[0]
    parts = {name: getattr(trainer, name).state_dict() for name in ("model", "criterion", "optimizer", "scaler")}
    return status, parts | {"history": without_times(trainer.history), "before": trainer.before, "step": trainer.step}


def without_times(history: dict[str, Any]) -> dict[str, Any]:
    scored = {name: history[name] for name in ("evaluation", "validation") if name in history}
    return history | {name: [{**point, "seconds": 0} for point in points] for name, points in scored.items()}


def values(answers: list[Answer]) -> list[Any]:
    for answer in answers:
        assert not answer.fault, answer.fault
    return [answer.value for answer in answers]


def one_voice(answers: list[Answer]) -> None:
    assert not any(answer.out or answer.err for answer in answers[1:]), "rank 0 alone prints"


def assert_close(a: Any, b: Any, exact: bool = False, where: str = "") -> None:
    """Of one structure; numbers and tensors up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], exact, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_close(*pair, exact, f"{where}[{i}]")
    elif exact or isinstance(a, str):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, where
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True), where


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, scores, drift, network and memory."""
    names = ("step", "history", "before", "model", "criterion")
    assert_close({name: found[name] for name in names}, {name: expected[name] for name in names})


CASES = {
    "axbn": (),
    "deferred supcon": ("--loss", "supcon", "--update", "deferred"),
    "no memory": ("--method", "batch"),
    "frozen features": ("--features", "frozen", "--hidden", 16),
    "16 bits": ("--precision", "float16"),
    "several batches": ("--accumulate", 2, "--clip-grad", 0.5),
    "averaged": ("--ema", 0.7, "--validation-share", 0.5, "--batch-size", 4),
    "timm": ("--backbone", "timm:test_resnet", "--weights", "none"),
}
ROUGH = {"16 bits": 0.02, "frozen features": 1e-4}
"""Where losses alone are compared, and how far: sums are rounded to 16 bits; or all embeddings are within 0.0005 of
each other, as random features are, so that Adam makes much of rounding."""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("axbn", 2),
        *(pytest.param(name, 2, marks=pytest.mark.long) for name in CASES if name != "axbn"),
        pytest.param("frozen features", 3, marks=pytest.mark.long),
        pytest.param("axbn", 3, marks=pytest.mark.long),
    ],
)
def test_a_run_is_that_of_one_process(name: str, size: int, shapes: Path, tmp_path: Path, processes: Processes) -> None:
    """Three processes have 3, 3 and 2 images of a batch, and 2, 1 and 1 chunks of the test images."""
    slow = (*CASES[name], "--lr", 2e-4)  # Adam moves a weight whose gradient is rounding as far as any other
    status, expected = train(arguments(shapes, tmp_path / "one", *slow))
    assert status == 0
    answers = processes(size, train, arguments(shapes, tmp_path / "many", *slow))
    for status, found in values(answers):
        assert status == 0
        if name in ROUGH:
            losses = [[point["loss"] for point in each["history"]["loss"]] for each in (found, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=ROUGH[name])
        else:
            assert_same_run(found, expected)
        assert len(found["history"]["loss"]) == STEPS and found["history"]["drift"]
        assert found["before"] == expected["before"], "scores of the same network by bits"
    one_voice(answers)
    ends = [end for _, end in values(answers)]
    for end in ends[1:]:
        assert_close(end, ends[0], exact=True)
    assert f"on cpu, {size} processes, results in" in answers[0].out
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("one", "many")]
    assert names[0] == names[1]
    stored = [checkpoint.load(tmp_path / out / "checkpoint.pt") for out in ("one", "many")]
    assert_close(*({key: state[key] for key in ("config", "data", "start")} for state in stored), exact=True)
    assert [[t.shape for t in probe.values() if isinstance(t, Tensor)] for probe in stored[0]["drift"]["probes"]] == [
        [t.shape for t in probe.values() if isinstance(t, Tensor)] for probe in stored[1]["drift"]["probes"]
    ], "probes are of whole batches"


@pytest.mark.long
def test_scores_are_those_of_one_process_by_bits(shapes: Path, tmp_path: Path, processes: Processes) -> None:
    ((_, found), _, _) = values(processes(3, train, arguments(shapes, tmp_path)))
    config = Config(**checkpoint.load(tmp_path / "checkpoint.pt")["config"])
    with small():
        trainer = loop.Trainer(config, run.model.build(config)[0], run._load(config), torch.device("cpu"))
        trainer.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
        last = found["history"]["evaluation"][-1]
        assert trainer.scores(trainer.test_embeddings()).items() <= last.items()


@pytest.mark.long
@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_best_weights_are_those_of_one_process(
    share: float, shapes: Path, tmp_path: Path, processes: Processes
) -> None:
    """Also where nothing is tested; and a run that goes on in one process writes them again."""
    words = ("--validation-share", 0.5, "--test-share", share, "--batch-size", 4, "--lr", 2e-4)
    status, expected = train(arguments(shapes, tmp_path / "one", *words))
    assert status == 0 and len(expected["history"]["validation"]) == 3
    answers = processes(2, train, arguments(shapes, tmp_path / "many", *words))
    for status, found in values(answers):
        assert status == 0
        assert_same_run(found, expected)
    one_voice(answers)
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("one", "many")]
    assert names[0] == names[1] and "best.pt" in names[0] and ("neighbours.png" in names[0]) == (share > 0)
    one, many = (checkpoint.load(tmp_path / out / "best.pt", kinds=checkpoint.WEIGHTS) for out in ("one", "many"))
    assert one["step"] == many["step"]
    assert_close(many["model"], one["model"])
    (tmp_path / "many" / "best.pt").unlink()
    (tmp_path / "many" / "metrics.json").unlink()
    assert train(arguments(shapes, tmp_path / "many", *words, "--resume"))[0] == 0
    again = checkpoint.load(tmp_path / "many" / "best.pt", kinds=checkpoint.WEIGHTS)
    assert_close(again["model"], many["model"], exact=True)


@pytest.mark.parametrize(("count", "chunk"), [(16, 5), (1, 5), (5, 5), (6, 5), (11, 1)])
def test_embeddings_are_gathered_on_all(count: int, chunk: int, processes: Processes) -> None:
    """Also where there are fewer chunks than processes."""
    for found in values(processes(3, embed, count, chunk)):
        assert torch.equal(found, embed(count, chunk))


def embed(count: int, chunk: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=rng, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64).numpy()
    part = augment.Part(list(images.numpy()), labels, ("a",), ("",) * count)
    weights = torch.randn(192, 7, generator=rng)
    with pytest.MonkeyPatch.context() as patch, ranks.join() as joined:
        patch.setattr(augment, "EVALUATION_BATCH", chunk)
        batches = augment.EvaluationBatches(part, lambda image: image)

        def network(x: Tensor) -> tuple[Tensor]:
            return (x.flatten(1).float() @ weights,)

        (found,) = evaluate.embed(network, batches, torch.device("cpu"), ranks=joined)
    return found


# ---- stopping and going on ------------------------------------------------------------------------------------------


def own_rank() -> int:
    return int(os.environ.get("RANK", 0))


def stop_after(steps: int, rank: int, patch: pytest.MonkeyPatch) -> None:
    """One process alone is asked to stop."""
    asked = iter([False] * (steps - 1) + [own_rank() == rank])

    @contextmanager
    def signals() -> Iterator[Callable[[], bool]]:
        yield lambda: next(asked)

    patch.setattr(run, "stop_signals", signals)


@pytest.mark.parametrize(
    ("first", "then", "stop"),
    [(2, 1, 7), *(pytest.param(*run, marks=pytest.mark.long) for run in ((1, 2, 4), (3, 2, 5)))],  # 5: an evaluation
)
def test_a_run_goes_on_in_another_number_of_processes(
    first: int, then: int, stop: int, shapes: Path, tmp_path: Path, processes: Processes
) -> None:
    def go(size: int, words: list[str], change: Change | None = None) -> list[tuple[int, dict[str, Any]]]:
        if size == 1:
            return [train(words, change)]
        answers = processes(size, train, words, change)
        one_voice(answers)
        return values(answers)

    _, expected = train(arguments(shapes, tmp_path / "one"))
    words = arguments(shapes, tmp_path / "parts", "--resume")
    for status, found in go(first, words, partial(stop_after, stop, first - 1)):
        assert status == 130 and found["step"] == stop, "all stop after the same step"
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == stop
    for status, found in go(then, words):
        assert status == 0
        assert_same_run(found, expected)


def test_a_run_goes_on_exactly_in_as_many_processes(shapes: Path, tmp_path: Path, processes: Processes) -> None:
    whole = values(processes(2, train, arguments(shapes, tmp_path / "whole")))
    words = arguments(shapes, tmp_path / "parts", "--resume")
    assert [status for status, _ in values(processes(2, train, words, partial(stop_after, 7, 0)))] == [130, 130]
    for (_, found), (_, expected) in zip(values(processes(2, train, words)), whole, strict=True):
        assert_close(found, expected, exact=True)


def test_a_finished_run_is_shown_once(shapes: Path, tmp_path: Path, processes: Processes) -> None:
    assert train(arguments(shapes, tmp_path))[0] == 0
    answers = processes(2, train, arguments(shapes, tmp_path))
    assert values(answers) == [(0, {})] * 2
    one_voice(answers)
    assert "holds this run, finished" in answers[0].out and "trained, axbn" in answers[0].out


# ---- faults ---------------------------------------------------------------------------------------------------------


def fails(place: str, rank: int, error: Exception, time: int, patch: pytest.MonkeyPatch) -> None:
    """A function raises in one process, when it is called for the so many-eth time."""
    original, calls = pkgutil.resolve_name(place), iter(range(1, 10**6))

    def broken(*arguments: Any, **named: Any) -> Any:
        if own_rank() == rank and next(calls) == time:
            raise error
        return original(*arguments, **named)

    patch.setattr(place, broken)


FULL = ConfigError("writing x failed (No space left on device)")
BROKEN = DataError("--data: cannot read image y")


@pytest.mark.parametrize(
    ("place", "rank", "error", "time", "message"),
    [
        ("train.augment.TrainingBatches.__getitem__", 1, BROKEN, 4, f"error: rank 1: {BROKEN}"),
        ("train.checkpoint.save", 0, FULL, 2, f"error: {FULL}"),
        ("train.run._load", 1, BROKEN, 1, f"error: rank 1: {BROKEN}"),
        *(
            pytest.param(*fault, marks=pytest.mark.long)
            for fault in (
                ("train.augment.TrainingBatches.__getitem__", 0, BROKEN, 4, f"error: {BROKEN}"),
                ("train.augment.EvaluationBatches.__getitem__", 1, BROKEN, 2, f"error: rank 1: {BROKEN}"),
                ("train.events.Events.add_scalar", 0, FULL, 9, f"error: {FULL}"),
                ("train.events.Events.close", 0, FULL, 1, f"error: {FULL}"),
                ("train.events.Events.__init__", 0, FULL, 1, f"error: {FULL}"),
                ("train.place.prepare", 0, FULL, 1, f"error: {FULL}"),
                ("train.checkpoint.write_metrics", 0, FULL, 1, f"error: {FULL}"),
                ("train.run._load", 0, BROKEN, 1, f"error: {BROKEN}"),
                ("train.model.build", 1, ConfigError("--weights z"), 1, "error: rank 1: --weights z"),
            )
        ),
    ],
    ids=str,
)
def test_a_fault_of_one_ends_all_with_one_message(
    place: str, rank: int, error: Exception, time: int, message: str, shapes: Path, tmp_path: Path,
    processes: Processes,
) -> None:  # fmt: skip
    answers = processes(2, train, arguments(shapes, tmp_path), partial(fails, place, rank, error, time))
    assert [status for status, _ in values(answers)] == [2, 2]
    one_voice(answers)
    assert answers[0].err == f"python -m train: {message}\n"
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "place", ["TrainingBatches.__getitem__", pytest.param("EvaluationBatches.__getitem__", marks=pytest.mark.long)]
)
def test_what_torch_says_of_a_fault_in_its_workers_becomes_a_line(
    place: str, shapes: Path, tmp_path: Path, processes: Processes
) -> None:
    """Without such a process: one forked from a process with threads may hang (CPython before 3.12)."""
    error = DataError(f"Caught DataError in DataLoader worker process 0.\nTraceback\nDataError: {BROKEN}\n")
    change = partial(fails, f"train.augment.{place}", 1, error, 1)
    answers = processes(2, train, arguments(shapes, tmp_path), change)
    assert [status for status, _ in values(answers)] == [2, 2]
    assert answers[0].err == f"python -m train: error: rank 1: {BROKEN}\n"


def overflow(patch: pytest.MonkeyPatch) -> None:
    """At its third step one process has a gradient that is not finite."""
    original = ranks.Ranks.add_up if os.environ.get("WORLD_SIZE", "1") == "1" else ranks._Several.add_up
    calls = iter(range(100))

    def add_up(joined: ranks.Ranks, parameters: Any) -> None:
        parameters = list(parameters)
        if next(calls) == 2 and own_rank() == joined.size - 1:
            parameters[0].grad[0] = torch.inf
        original(joined, parameters)

    patch.setattr(ranks._Several if own_rank() or "RANK" in os.environ else ranks.Ranks, "add_up", add_up)


@pytest.mark.long
def test_gradients_that_overflow_in_one_are_skipped_by_all(shapes: Path, tmp_path: Path, processes: Processes) -> None:
    (_, first), (_, second) = values(
        processes(2, train, arguments(shapes, tmp_path, "--precision", "float16"), overflow)
    )
    assert first["scaler"]["scale"] == 2.0**15, "halved, once"
    assert_close(first, second, exact=True)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--batchnorm", "batch"), "error: --batchnorm: on CPUs several processes cannot normalise by the statistics"),
        (("--data", "folder:/nowhere"), "error: --data folder:/nowhere: no such folder"),
        (
            ("--memory-size", 64, "--samples-per-class", 4, "--batch-size", 32),
            "error: --batch-size 32 with --samples-per-class 4 needs 8",
        ),
        pytest.param(
            ("--device", "cuda"),
            "error: --device cuda, GPU 0: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("--steps", 0), "error: --steps 0: must be more than 0"),
        (("--lr", "1e15", "--steps", 40, "--eval-every", 0), "error: the loss was nan in each of the 10 steps"),
    ],
)
def test_what_cannot_be_done_is_said_once(
    others: tuple[object, ...], message: str, shapes: Path, tmp_path: Path, processes: Processes
) -> None:
    answers = processes(2, main, arguments(shapes, tmp_path / "out", *others))
    assert values(answers) == [2, 2]
    one_voice(answers)
    assert message in answers[0].err
    assert "--lr" in others or not (tmp_path / "out").exists()


def main(words: list[str]) -> int:
    """As the program: argparse exits."""
    with small():
        try:
            return run.main(words)
        except SystemExit as exits:
            return exits.code


def test_more_processes_than_images() -> None:
    many = ranks.Ranks()
    many.size = 9
    with pytest.raises(ConfigError, match="--batch-size 8: it is dealt out to all processes, and there are 9"):
        run.require_parts(Config(batch_size=8), many)
    many.size = 8
    run.require_parts(Config(batch_size=8), many)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (8, 8), (2, 5), (0, 2), (64, 7), (7, 1)])
def test_parts_are_those_of_array_split(count: int, size: int) -> None:
    joined = ranks.Ranks()
    joined.size = size
    expected = np.array_split(np.arange(count), size)
    assert [list(range(count))[part] for part in joined.parts(count)] == [part.tolist() for part in expected]


def test_batch_normalisation_over_all_keeps_names_and_parameters() -> None:
    """The conversion; what it computes has not been run: torch has it for GPUs only."""
    network = convnet.convnet()
    before = dict(network.named_parameters())
    names = list(network.state_dict())
    converted = ranks._Several.synchronized(ranks.ALONE, network)  # type: ignore[arg-type]
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules()) == 4
    assert list(converted.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in converted.named_parameters())


def test_a_study_is_not_for_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", f"python -m train compare: error: {study.NOT_SHARED}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert study.main(["--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


def train_or_end(words: list[str], change: Change) -> tuple[int, dict[str, Any]]:
    """As ``train``; what the program does not catch ends the process."""
    try:
        return train(words, change)
    except RuntimeError:
        os._exit(1)


@pytest.mark.parametrize(("size", "ends"), [(3, 2), (2, 0)])
def test_the_others_do_not_wait_for_one_that_has_ended(
    size: int, ends: int, shapes: Path, tmp_path: Path, processes: Processes
) -> None:
    change = partial(fails, "train.model.Embedder.forward", ends, RuntimeError("out of luck"), 5)
    answers = processes(size, train_or_end, arguments(shapes, tmp_path), change)
    others = [answer for rank, answer in enumerate(answers) if rank != ends]
    assert answers[ends].fault == "has ended"
    assert [status for status, _ in values(others)] == [2] * len(others)
    if ends:
        said = "another process of this run has ended; it, or torchrun, says why"
        assert answers[0].err == f"python -m train: error: {said}\n"


# ---- torchrun -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint(shapes: Path, tmp_path: Path) -> None:
    words = arguments(shapes, tmp_path, "--steps", 100_000, "--eval-every", 0)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train", *words]
    process = subprocess.Popen([sys.executable, *launch], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert out.count("results in") == 1 and err.count("stopped; the same command with --resume continues") == 1, err
    assert 0 < checkpoint.load(tmp_path / "checkpoint.pt")["step"] < 100_000
