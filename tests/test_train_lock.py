"""One run at a time in a folder."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from train import checkpoint, lock, run
from train.compare import study
from train.config import ConfigError

HOLD = """
import pathlib, sys
from train import lock
with lock.alone(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process has."""
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield folder
        process.kill()


@pytest.mark.parametrize(
    "option", ["--resume", *(pytest.param(o, marks=pytest.mark.long) for o in ("", "--overwrite"))]
)
def test_a_second_run_leaves_the_first_alone(
    option: str, taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(8):
        (tmp_path / f"images/{i // 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / f"images/{i // 2}/{i}.png")
    (taken / checkpoint.CURVES).write_bytes(b"first")
    small = "--backbone convnet --image-size 32 --batch-size 4 --samples-per-class 2 --memory-size 4 --steps 1"
    arguments = ["--data", f"folder:{tmp_path}/images", "--out", str(taken), *small.split(), *option.split()]
    assert run.main(arguments) == 2
    assert f"error: --out {taken}: another process is at work there; wait, or cho" in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in taken.iterdir()] == [(checkpoint.CURVES, b"first")]


@pytest.mark.long
def test_a_second_study_leaves_the_first_alone(taken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--data", "folder:/nowhere", "--out", str(taken)]) == 2
    assert f"error: --out {taken}: another process is at work there" in capsys.readouterr().err
    assert not any(taken.iterdir())


@pytest.mark.parametrize("name", [checkpoint.METRICS, checkpoint.CHECKPOINT])
def test_what_another_run_wrote_since_the_folder_was_looked_at_stays(name: str, tmp_path: Path) -> None:
    before = lock.state(tmp_path)
    with lock.alone(tmp_path, before):
        (tmp_path / name).write_bytes(b"new")
    with pytest.raises(ConfigError, match=f"--out {tmp_path}: another process has written there meanwhile"):
        lock.alone(tmp_path, before).__enter__()
    with lock.alone(tmp_path, lock.state(tmp_path)):
        pass


@pytest.mark.parametrize("name", ["os.open", "fcntl.flock"])
def test_a_folder_that_cannot_be_locked_is_used_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(name, fail)
    with lock.alone(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_process_that_prepares_images_does_not_hold_the_lock(tmp_path: Path) -> None:
    """It may outlive a run that is killed, by some seconds."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    outlives = context.Process(target=lambda: (begun.set(), signal.pause()), daemon=True)
    with lock.alone(tmp_path):
        outlives.start()
        assert begun.wait(20)
    with lock.alone(tmp_path):
        assert outlives.is_alive()
    outlives.kill()
