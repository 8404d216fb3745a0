"""What is done with a run: `python -m train embed`, `search`, `export` and `report`."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import files_end_after
from PIL import Image
from safetensors import safe_open

from train import embed, export, report
from train.augment import evaluation_view, to_tensor
from train.checkpoint import CHECKPOINT, load
from train.data import DataError, images
from train.data.folder import pictures
from train.trained import Trained


def by_hand(path: Path, file: Path) -> torch.Tensor:
    network = Trained(path).network.eval()
    view = evaluation_view(32, "photo")
    with torch.no_grad():
        row = network(view(to_tensor(images.decode(file)))[None])[0]
    return row / row.norm()


def test_pictures_of_a_folder_are_embedded_as_a_test_sees_them(
    trained: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(shapes, tmp_path / "pictures"))
    (folder / ".hidden.png").write_text("no picture")
    Image.new("RGB", (90, 31), "red").save(folder / "line\nbreak.png")
    monkeypatch.setattr(sys, "argv", ["train", "embed", str(trained), str(folder), "--out", str(tmp_path / "all")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("train", run_name="__main__", alter_sys=True)
    assert "33 pictures, 12 numbers each" in capsys.readouterr().out
    rows, about = np.load(tmp_path / "all.npy"), json.loads((tmp_path / "all.json").read_text())
    assert rows.shape == (33, 12) and rows.dtype == np.float32 and about["step"] == 3
    assert about["bytes"] == [(folder / path).stat().st_size for path in about["paths"]]
    assert about["paths"] == sorted(about["paths"]) and "line\nbreak.png" in about["paths"]
    for i in (0, 17, 32):
        expected = by_hand(trained, folder / about["paths"][i])
        torch.testing.assert_close(torch.from_numpy(rows[i]), expected, rtol=1e-4, atol=1e-5)


def _head(run: Path) -> torch.Tensor:
    bias: torch.Tensor = load(run / CHECKPOINT)["model"]["head.bias"]
    return bias


def _change(run: Path, part: str, name: str, value: object) -> None:
    state = load(run / CHECKPOINT)
    state[part][name] = value
    torch.save(state, run / CHECKPOINT)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run, folder: shutil.rmtree(folder), "cannot read folder .*: No such file"),
        (lambda run, folder: [file.unlink() for file in folder.rglob("*.png")], "no pictures in it"),
        (
            lambda run, folder: _change(run, "model", "head.weight", torch.zeros(1)),
            "cannot read .*: size mismatch .*RUN",
        ),
        (
            lambda run, folder: _change(run, "model", "head.bias", torch.full_like(_head(run), torch.nan)),
            "RUN: its network gives embeddings that are not finite",
        ),
        (lambda run, folder: _change(run, "config", "of_another_version", 1), "cannot read .*of_another_version.*RUN"),
        (lambda run, folder: _change(run, "config", "image_size", "32"), "cannot read .*RUN"),
        (lambda run, folder: (folder / "a.png").write_text("text"), "cannot read image"),
        (lambda run, folder: (run / CHECKPOINT).unlink(), "RUN must be the --out of a run"),
        (lambda run, folder: (run / CHECKPOINT).write_text("text"), "RUN must be the --out of a run"),
    ],
)
def test_what_is_missing_is_said_in_a_line_and_nothing_is_written(
    spoil: Any, said: str, trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, its = Path(shutil.copytree(shapes, tmp_path / "p")), Path(shutil.copytree(trained, tmp_path / "run"))
    spoil(its, folder)
    before = sorted(tmp_path.rglob("*"))
    assert embed.main([str(its), str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train embed: error: ") and error.count("\n") == 1
    assert re.search(said, error) and "--out /" not in error.replace("choose another --out", "")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "nonsense"), "--device nonsense: "),
        (("--device", "meta"), "--device meta: holds no values"),
        (("--device", ""), "--device : "),
        (("--workers", "-1"), "--workers -1: must be between 0 and"),
        (("--workers", "100000"), "--workers 100000: must be between 0 and"),
        (("--out", ""), "does not end with the name of a file"),
        (("--out", "."), "does not end with the name of a file"),
        (("--out", ".."), "does not end with the name of a file"),
    ],
)
def test_an_argument_of_embed_that_will_not_do_is_named(
    words: tuple[str, str], said: str, trained: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert embed.main([str(trained), str(shapes), *words]) == 2
    except SystemExit as error:  # argparse's own
        assert error.code == 2
    assert f"error: {said}" in (told := capsys.readouterr().err) or said in told.splitlines()[-1]


def test_a_picture_that_cannot_be_looked_at_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its link leads to is not only absent."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").symlink_to("x" * 300)
    assert embed.main([str(trained), str(tmp_path / "pictures"), "--out", str(tmp_path / "all")]) == 2
    assert re.search(r"error: .*cannot read image .*x\.png: ", capsys.readouterr().err)
    assert not list(tmp_path.glob("all*"))


def test_what_cannot_be_written_is_named_as_it_was_given(
    trained: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, taken = tmp_path / "none" / "all", tmp_path / "all"
    (tmp_path / "all.npy").mkdir()
    for out, said in ((missing, f"there is no folder {missing.parent}: make it"), (taken, f"{taken}.npy is a folder:")):
        assert embed.main([str(trained), str(shapes), "--out", str(out)]) == 2
        assert f"error: --out {out}: {said}" in capsys.readouterr().err


@pytest.fixture
def no_room() -> Iterator[None]:
    with files_end_after(1000):
        yield


@pytest.mark.parametrize("use", [embed, export])
def test_where_there_is_no_room_nothing_is_left(
    use: Any, trained: Path, shapes: Path, tmp_path: Path, no_room: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy cut the array short and said nothing; torch's writer ended the process."""
    words = [str(shapes), "--out", str(tmp_path / "x" / "all")] if use is embed else ["--out", str(tmp_path / "x")]
    (tmp_path / "x").mkdir()
    assert use.main([str(trained), *words]) == 2
    assert "failed (File too large)" in capsys.readouterr().err
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_name_is_not_the_current_folder(
    place: int, trained: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained), str(shapes)]
    words[place] = ""
    with pytest.raises(SystemExit, match=r"^2$"):
        embed.main(words)
    with pytest.raises(SystemExit, match=r"^2$"):
        export.main([str(trained), "--out", ""])
    with pytest.raises(SystemExit, match=r"^2$"):
        report.main([""])
    assert capsys.readouterr().err.count("the name of a folder is empty") == 3


def test_what_cannot_be_listed_is_not_passed_over(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(shapes, tmp_path / "p"))
    closed = sorted(entry for entry in folder.iterdir() if entry.is_dir())[1]
    scandir = os.scandir

    def refuse(path: str) -> Any:  # the user that runs this test may read every folder
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"cannot read folder {closed}: Permission denied"):
        pictures(folder)


@pytest.mark.filterwarnings("error:No complete tensor")
def test_an_exported_network_gives_the_same_embeddings(trained: Path, tmp_path: Path) -> None:
    assert export.main([str(trained), "--out", str(tmp_path / "new" / "folder")]) == 0
    out = tmp_path / "new" / "folder"
    program = torch.export.load(out / export.PROGRAM).module()
    network = Trained(trained)
    for batch in (1, 2, 7):
        pixels = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(program(pixels), network(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program(pixels).norm(dim=1), torch.ones(batch))
    state = load(trained / CHECKPOINT)["model"]
    with safe_open(out / export.WEIGHTS, "pt") as weights:
        assert set(weights.keys()) == set(state)
        assert all(torch.equal(weights.get_tensor(name), tensor) for name, tensor in state.items())
        assert json.loads(weights.metadata()["embedding_dim"]) == 12
    about = json.loads((out / export.ABOUT).read_text())
    assert (about["image_size"], about["resize"], about["settings"]["loss"]) == (32, 37, "contrastive")
    assert about["network"] == network.digest(), "as embed writes it"


def test_the_page_says_how_a_picture_becomes_an_input(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^``` \{\.python\}\n(.*?torch\.export\.load.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "runs").mkdir()
    assert export.main([str(trained), "--out", str(tmp_path / "runs" / "axbn")]) == 0
    pixels = np.random.default_rng(0).integers(256, size=(90, 70, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "picture.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/training.md", "exec"), names)
    expected = Trained(trained).embed(images.Files([Path("picture.png")]))
    torch.testing.assert_close(names["embeddings"], expected, rtol=1e-4, atol=1e-5)


class Tied(torch.nn.Module):
    """A backbone that has a weight twice, as some of timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.again = torch.nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.again(self.conv(images)).mean((2, 3))
        return features


class Branching(Tied):
    """One that does what depends on what it sees, which no program of torch.export can."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = super().forward(images)
        return features if float(features.detach().sum()) > 0 else -features


@pytest.mark.parametrize("backbone", [Tied, Branching])
def test_an_unusual_network_is_exported_or_it_is_said_in_a_line(
    backbone: type[Tied], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = Trained(trained)
    made.network.backbone, made.network.head = backbone(), torch.nn.Linear(3, 12)
    monkeypatch.setattr(export, "Trained", lambda *_: made)
    status = export.main([str(trained), "--out", str(tmp_path / "out")])
    if backbone is Branching:
        assert status == 2 and "torch.export cannot take its network" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    with safe_open(tmp_path / "out" / export.WEIGHTS, "pt") as weights:
        assert torch.equal(weights.get_tensor("backbone.conv.weight"), weights.get_tensor("backbone.again.weight"))


def test_of_no_run_nothing_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path / "none")]) == 2
    assert "RUN must be the --out of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", ""], "argument --out: '' does not end with the name of a file"),
        (["--out", ".."], "argument --out: '..' does not end"),
        (["--device", "abacus"], "--device abacus: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
)
def test_arguments_that_cannot_be_used(
    arguments: list[str], said: str, trained: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        assert embed.main([str(trained), str(shapes), *arguments]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_digest_tells_networks_apart(trained: Path) -> None:
    first, second = Trained(trained), Trained(trained)
    assert first.digest() == second.digest()
    with torch.no_grad():
        next(second.network.parameters()).mul_(1.001)
    assert first.digest() != second.digest()


@pytest.mark.parametrize("change", [{"config": {"no_setting": 1}}, {"model": {}}])
def test_a_checkpoint_of_something_else(
    change: dict[str, Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load(trained / CHECKPOINT)
    state["config"] |= change.get("config", {})
    torch.save(state | {name: value for name, value in change.items() if name != "config"}, tmp_path / CHECKPOINT)
    assert export.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"python -m train export: error: RUN {tmp_path}: cannot read ")
