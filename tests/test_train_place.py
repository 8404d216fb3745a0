"""The folder of a run: what is there already is neither lost nor taken for a run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniatures
import pytest

from train import checkpoint, export, place, run, settings_file
from train.arguments import parse
from train.config import Config, ConfigError
from train.scoring import Scoring

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

NAMES = [*place.REPLACED, "tensorboard/events.out.tfevents.1", "tensorboard/drift_in memory/events.out.tfevents.1"]
OTHER = [name for name in NAMES if name not in (checkpoint.METRICS, checkpoint.CHECKPOINT)]


def settings(shapes: Path, out: Path, **changes: Any) -> Config:
    return miniatures.settings(shapes, out, **{"steps": 2} | changes)


def words(config: Config, *others: object) -> list[str]:
    """A command line that gives these settings in a file, which is not in --out."""
    out = config.folder
    file = out.parent / "given.yaml"
    file.write_text(settings_file.text(config))
    return [str(word) for word in ("--config", file, "--out", out, "--threads", 1, *others)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", OTHER)
def test_files_in_a_folder_without_a_run_are_not_replaced_unasked(
    name: str, resume: bool, shapes: Path, tmp_path: Path
) -> None:
    config = settings(shapes, tmp_path, resume=resume)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    named = name.partition("/")[0]
    with pytest.raises(ConfigError, match=rf"--out {tmp_path}: there is no run in it, .* replace {named}: choose"):
        run.run(config)
    assert contents(tmp_path) == {str(tmp_path / name): b"mine"}


def test_where_the_events_cannot_go_the_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a run's")
    before, real = contents(tmp_path), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if "events" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ConfigError, match=rf"writing {tmp_path} failed \(Permission denied\)"):
        place.prepare(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in OTHER if "events" not in name])
def test_beside_settings_that_a_killed_run_has_left_other_files_stay(name: str, shapes: Path, tmp_path: Path) -> None:
    config = settings(shapes, tmp_path)
    (tmp_path / checkpoint.SETTINGS).write_text(settings_file.text(config))
    (tmp_path / name).write_text(f"# mine\n{settings_file.text(config)}")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no run in it, and a new one would replace .*: choose"):
        run.run(config)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_its_first_checkpoint_is_begun_again(
    resume: bool, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Scoring, "before", end)
        run.run(settings(shapes, tmp_path))
    left = {path.name.partition(".tfevents")[0] for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "log.csv", "tensorboard"}
    with pytest.raises(ConfigError, match=r"a new one would replace config.yaml, log.csv, tensorboard: choose another"):
        run.run(settings(shapes, tmp_path, seed=1))
    assert run.run(settings(shapes, tmp_path, resume=resume, eval_every=1))["steps"] == 2
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_a_run_that_is_killed_while_it_removes_another_is_known_to_be_one(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.run(settings(shapes, tmp_path))
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == checkpoint.NEIGHBOURS:
            raise KeyboardInterrupt
        original(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", unlink)
        place.prepare(tmp_path)
    with pytest.raises(ConfigError, match="holds an unfinished run: continue it with --resume, or --overwrite it"):
        run.run(settings(shapes, tmp_path))


def test_a_file_of_settings_in_the_folder_of_the_run_is_not_lost(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mine = tmp_path / "out", f"# mine\nseed: 1\ndata: folder:{shapes}\n"
    assert run.main(words(settings(shapes, out))) == 0
    own = out / "config.yaml"
    written = own.read_text()
    again = ["--config", str(own), "--out", str(out)]
    assert run.main([*again, "--resume"]) == run.main(again) == 0, "finished"
    assert run.main([*again, "--seed", "1", "--overwrite", "--threads", "1"]) == 0
    assert own.read_text() == written.replace("seed: 0", "seed: 1")

    for name in ("config.yaml", "report.html"):
        (out / name).write_text(mine)
        (tmp_path / "link.yaml").unlink(missing_ok=True)
        (tmp_path / "link.yaml").symlink_to(out / name)
        for file in (out / name, tmp_path / "link.yaml"):
            capsys.readouterr()
            with pytest.raises(SystemExit, match=r"^2$"):
                parse(["--config", str(file), "--out", str(out), "--overwrite"])
            said = f"--config {file}: --overwrite would replace it, and it is not as a run has written it: move it"
            assert said in capsys.readouterr().err and (out / name).read_text() == mine
    whole = settings_file.text(parse(["--config", str(own)]))
    own.write_text(whole)  # nothing is lost where the new run writes it again
    assert parse([*again, "--overwrite", "--eval-every", "7"]).seed == 1
    own.write_text(f"{whole}# mine\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        parse([*again, "--overwrite"])
    own.write_text(whole)
    for name in (checkpoint.METRICS, checkpoint.CHECKPOINT):
        (out / name).write_text("broken")
    assert parse([*again, "--overwrite"]).overwrite


def test_the_table_of_the_images_is_not_overwritten(shapes: Path, tmp_path: Path, tiny: None) -> None:
    """Under a name that a run gives to a file of its own."""
    images = sorted(shapes.rglob("*.png"))
    table = tmp_path / "log.csv"
    table.write_text("label,path\n" + "".join(f"{image.parent.name},{image}\n" for image in images))
    config = settings(shapes, tmp_path, data=f"csv:{table}", overwrite=True)
    (tmp_path / "tensorboard").mkdir()
    events = tmp_path / "tensorboard" / "events.out.tfevents.csv"
    events.symlink_to(table)
    for name in (table, events):
        with pytest.raises(ConfigError, match=r"--data csv:.*: --overwrite would replace it: move it out of --out"):
            run.run(replace(config, data=f"csv:{name}"))
    assert table.read_text().startswith("label,path\n") and events.is_symlink()

    (tmp_path / "link").symlink_to(tmp_path)
    picture = Path(shutil.copy(images[0], tmp_path / "neighbours.png"))
    (tmp_path / "linked.png").symlink_to(picture)
    other = tmp_path / "other.csv"
    for name in (f"link/{picture.name}", "linked.png"):
        other.write_text(table.read_text().replace(f"{images[0]}", f"{tmp_path / name}"))
        with pytest.raises(ConfigError, match=rf"--overwrite would replace .*/{name}, a picture of it: move"):
            run.run(replace(config, data=f"csv:{other}"))
    assert picture.exists() and table.exists()


@pytest.mark.parametrize("stop", [False, True])
def test_other_settings_than_those_of_the_run_are_refused_with_what_helps(
    stop: bool, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run.run(settings(shapes, out))
    if stop:
        (out / checkpoint.METRICS).unlink()
    assert run.main(["--out", str(out), "--resume"]) == 2
    own = f"--config {out}/config.yaml"
    said = f"continue it with {own} --resume, or --overwrite it" if stop else f"show it with {own}, or --overwrite it"
    assert f"choose another --out, or {said}" in capsys.readouterr().err
    (out / "config.yaml").unlink()
    assert run.main(["--out", str(out), "--resume"]) == 2
    assert "choose another --out, or --overwrite it" in capsys.readouterr().err


def test_what_was_exported_of_another_network_does_not_stay(shapes: Path, tmp_path: Path) -> None:
    run.run(settings(shapes, tmp_path))
    export.export(tmp_path, tmp_path)
    assert all((tmp_path / name).exists() for name in checkpoint.EXPORTED)
    run.run(settings(shapes, tmp_path, seed=1, overwrite=True))
    assert not any((tmp_path / name).exists() for name in checkpoint.EXPORTED)
    (tmp_path / "mine").mkdir()
    shutil.copy(__file__, tmp_path / "mine" / "network.pt2")
    place.prepare(tmp_path)
    assert (tmp_path / "mine" / "network.pt2").exists()


def test_a_run_from_before_a_setting_goes_on_as_it_was_begun() -> None:
    """It has no center_gradient, which is on by default now."""
    stored = Config().settings()
    del stored["center_gradient"]
    checkpoint.require_same(replace(Config(), center_gradient=False), Path("out"), stored, "a run")
    with pytest.raises(ConfigError, match=r"other settings \(--center-gradient False there, True now\)"):
        checkpoint.require_same(Config(), Path("out"), stored, "a run")
