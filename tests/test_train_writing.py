"""Where a run cannot or must not write: the folder or file is named, and what was there stays."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import files_end_after
from tiny_runs import settings

from train import checkpoint, events, results, run
from train.arguments import parse
from train.config import Config, ConfigError
from train.data import tree

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_folder_that_is_read_only_is_named_before_any_work(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shapes, tmp_path / "finished", steps=1)
    run.run(config)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and mode == os.R_OK)  # root may all
    run.run(config)  # which only shows it
    monkeypatch.setattr(run, "_load", lambda config: pytest.fail("data were read"))
    for out in (tmp_path / "new" / "out", tmp_path):
        with pytest.raises(ConfigError, match=rf"--out {out}: {tmp_path} may not be written to; choose another"):
            run.run(replace(config, out=out))


def test_a_run_stays_where_its_events_may_not_be_looked_into(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shapes, tmp_path, steps=1)
    run.run(config)
    before = {path.name for path in tmp_path.iterdir()}
    closed = tmp_path / "tensorboard"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed or not mode & os.R_OK)
    with pytest.raises(ConfigError, match=rf"--out {closed}: {closed} may not be read; choose another"):
        run.run(replace(config, overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private").mkdir()
    shut_off(tmp_path / "private", monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "private")
    for out in (tmp_path / "private" / "out", tmp_path / "private"):
        with pytest.raises(ConfigError, match=rf"--out {out}: {tmp_path / 'private'} may not be written to"):
            run.run(Config(out=out))


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the settings come from a file, which is compared with what is in it, or not."""
    (tmp_path / "own.yaml").write_text("steps: 2")

    def glob(folder: Path, files: str) -> list[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "glob", glob)
    out = tmp_path / "private"
    out.mkdir()
    for words in (
        [],
        ["--config", str(tmp_path / "own.yaml")],
        ["--overwrite", "--config", str(tmp_path / "own.yaml")],
    ):
        config = parse([*words, "--out", str(out)])
        for not_allowed, said in ((os.W_OK, "written to"), (os.R_OK, "read")):
            monkeypatch.setattr(os, "access", lambda path, mode, no=not_allowed: not mode & no)
            with pytest.raises(ConfigError, match=f"--out {out}: {out} may not be {said}; choose another"):
                run.run(config)


def shut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the folder may be looked at, as without its x permission; the tests' user may be root, who may all."""
    real = os.stat

    def stat(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, str | Path) and folder in Path(path).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", stat)


def test_a_folder_that_cannot_be_made_is_named(
    shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, **_: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / 'out'} failed \(Operation not permitted\)"):
        run.run(settings(shapes, tmp_path / "out"))


def test_results_are_not_written_among_the_images(shapes: Path, tmp_path: Path, tiny: None) -> None:
    images = tmp_path / "images"
    shutil.copytree(shapes, images)
    for out in (images / "runs", images / "corners-03"):
        with pytest.raises(ConfigError, match=rf"--out {out} lies in --data folder:{images}: its pictures would be"):
            run.run(settings(images, out))
        assert not (images / "runs").exists()
    assert run.run(settings(images, images / ".runs", steps=1))["steps"] == 1
    pool = tmp_path / "pool"
    (images / "corners-03").rename(pool)
    (images / "corners-03").symlink_to(pool)
    for out in (pool, pool / "runs"):
        with pytest.raises(ConfigError, match=rf"--out {out} lies in --data folder:{images}: its pictures would be"):
            run.run(settings(images, out))
    assert run.run(settings(images, pool / ".runs", steps=1))["steps"] == 1


@pytest.mark.parametrize("link", ["corners-03/more", "corners-03/deep/er", "pool/more"])
def test_nor_where_a_link_below_a_class_leads(link: str, shapes: Path, tmp_path: Path) -> None:
    """A later run was trained on its curves."""
    images, other = tmp_path / "images", tmp_path / "other"
    shutil.copytree(shapes, images)
    (tmp_path / "pool").mkdir()
    (images / "pool").symlink_to(tmp_path / "pool")
    (images / link).parent.mkdir(exist_ok=True)
    (images / link).symlink_to(other / "kept")
    for round_ in (images, other):
        (images / f"corners-03/to-{round_.name}").symlink_to(round_)
    for read in (other, other / "kept", other / "x"):
        (other / "kept").mkdir(parents=True, exist_ok=True)
        assert tree.would_read(images, read / "run")
        assert not tree.would_read(images, read / ".hidden" / "run")
    (images / "corners-03/to-other").unlink()
    assert tree.would_read(images, other / "kept")
    assert not tree.would_read(images, other) and not tree.would_read(images, tmp_path)
    (images / link).unlink()
    (images / "corners-03/.hidden").symlink_to(other / "kept")
    assert not tree.would_read(images, other / "kept")
    (images / ".store").mkdir()
    assert not tree.would_read(images, images / ".store" / "run")
    (images / link).symlink_to(images / ".store")
    assert tree.would_read(images, images / ".store" / "run")


@pytest.fixture
def full_disk() -> Iterator[None]:
    with files_end_after(100_000):
        yield


@pytest.mark.parametrize(
    ("name", "write", "content"),
    [
        ("checkpoint.pt", checkpoint.save, {"model": torch.zeros(200_000)}),
        ("metrics.json", checkpoint.write_json, {"history": "." * 200_000}),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_the_old_file_whole(
    name: str, write: Callable[..., None], content: dict[str, Any], full_disk: None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ConfigError, match=rf"writing {tmp_path / name} failed \(File too large\): make sure .* room"):
        write(tmp_path / name, content)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


@pytest.mark.parametrize("name", ["checkpoint.tmp", "best.tmp"])
def test_a_file_of_yours_beside_a_checkpoint_stays(name: str, shapes: Path, tmp_path: Path, tiny: None) -> None:
    (tmp_path / name).write_text("mine")
    run.run(settings(shapes, tmp_path, steps=1, batch_size=4, validation_share=0.5))
    assert (tmp_path / name).read_text() == "mine" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["curves.png", "tensorboard"])
def test_a_picture_or_a_log_that_cannot_be_written_is_named(
    name: str, shapes: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *{"curves.png": (results.pictures, "curves"), "tensorboard": (events.SummaryWriter, "__init__")}[name], fail
    )
    with pytest.raises(ConfigError, match=rf"writing {tmp_path}.* failed \(No space left on device\)"):
        run.run(settings(shapes, tmp_path, steps=1))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("last_step", [True, False])
def test_a_log_that_cannot_be_written_to_later_is_named(
    last_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    log = events.Events(tmp_path, 0)
    log.file_writer.event_writer._async_writer._byte_queue.join()  # the head of the file is there
    monkeypatch.setattr(log.file_writer.event_writer._async_writer._writer, "write", fail)
    log.add_scalar("loss", 0.5, 1)
    with pytest.raises(ConfigError, match=rf"writing {tmp_path} failed \(No space left on device\)"):
        if not last_step:
            log.file_writer.event_writer._async_writer._byte_queue.join()
            log.add_scalar("loss", 0.5, 2)
        log.close()
    assert not capsys.readouterr().err, "of the thread no traceback"


@pytest.mark.parametrize("changes", [{}, {"resume": True}, {"overwrite": True}])
def test_what_no_run_makes_is_not_removed(changes: dict[str, bool], tmp_path: Path) -> None:
    for name, kind in (("checkpoint.pt", "a folder"), ("metrics.json", "a folder"), ("tensorboard", "a file")):
        out = tmp_path / name
        out.mkdir()
        (out / name).mkdir() if kind == "a folder" else (out / name).touch()
        with pytest.raises(ConfigError, match=rf"--out {out}: {name} in it is {kind}, which no run makes: move it"):
            run.run(Config(out=out, **changes))
