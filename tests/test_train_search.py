"""`python -m train search`: which pictures are found, and the table and the page that show them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image

from train import embed, page, search, terminal
from train.checkpoint import CHECKPOINT, load
from train.data import images
from train.trained import Trained


def rows_of(out: str) -> list[list[str]]:
    """Query, rank, similarity and file of each line of the table; names have no spaces."""
    return [line.split() for line in out.splitlines()[1:-1]]


def by_hand(query: str, folder: Path) -> list[tuple[float, str]]:
    """All pictures of the folder except the query, best first, with their similarity."""
    network = Trained(Path("run"))
    files = sorted(folder.rglob("*.png"))
    rows = network.embed(images.Files([Path(query), *files])).double()
    similarities = (rows[1:] @ rows[0]).tolist()
    pairs = zip(similarities, files, strict=True)
    return sorted(
        ((s, file.relative_to(folder).as_posix()) for s, file in pairs if not file.samefile(query)), reverse=True
    )


def test_the_nearest_pictures_as_a_table_and_as_a_page(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, outside = "pictures/corners-04/red.png", "outside.png"
    Image.new("RGB", (70, 40), "red").save(outside)
    assert search.main(["run", "pictures", inside, outside, "--count", "5"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["query", "rank", "similarity", "file"]
    assert out.splitlines()[-1] == "shown in search.html"
    found = rows_of(out)
    for query, part in ((inside, found[:5]), (outside, found[5:])):
        assert [row[:2] for row in part] == [[query, str(rank)] for rank in range(1, 6)]
        expected = by_hand(query, Path("pictures"))[:5]
        assert [float(row[2]) for row in part] == pytest.approx([s for s, _ in expected], abs=2e-3)
        assert [row[3] for row in part] == [file for _, file in expected]
    shown = Page(here / "search.html")
    assert len(shown.pictures) == 12 and shown.titles == [
        inside, *(row[3] for row in found[:5]), outside, *(row[3] for row in found[5:])
    ]  # fmt: skip
    assert "Of 32 pictures in pictures, by the network of run at step 3." in shown.text
    assert all(row[2] in shown.text for row in found)


def test_a_query_finds_neither_itself_nor_links_to_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "few"
    folder.mkdir()
    for i, name in enumerate(("a", "b", "c")):
        shutil.copy(here / "pictures" / "corners-03" / f"{miniatures.COLOURS[i]}.png", folder / f"{name}.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    (folder / "link.png").symlink_to("a.png")
    (here / "from-outside.png").symlink_to(folder / "a.png")
    (here / "hard.png").hardlink_to(folder / "a.png")
    for query in ("few/a.png", "few/link.png", "from-outside.png", "hard.png", "few/../few/a.png"):
        assert search.main(["run", "few", query]) == 0
        found = rows_of(capsys.readouterr().out)
        assert found[0][2:] == ["1.000", "copy.png"] and sorted(row[3] for row in found[1:]) == ["b.png", "c.png"]
    assert search.main(["run", "few", "few/b.png", "few/link.png", "few/b.png", "--count", "1"]) == 0
    assert [row[:2] for row in rows_of(capsys.readouterr().out)] == [
        ["few/b.png", "1"], ["few/link.png", "1"], ["few/b.png", "1"]
    ]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_table_that_cannot_be_written_is_an_error_and_one_that_is_not_read_is_none(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for file, status, said in (
        ("/dev/full", 2, "python -m train search: error: standard output: No space left on device\n"),
        (writer, 0, ""),
    ):
        with open(file, "w") as output, monkeypatch.context() as its:
            its.setattr(sys, "stdout", output)
            assert search.main(["run", "pictures", "pictures/corners-04/red.png"]) == status
            assert capsys.readouterr().err == said
    assert len(Page(here / "search.html").pictures) == 9


def test_a_query_that_is_the_only_picture_of_the_folder_does_not_end_the_search_for_others(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "one").mkdir()
    shutil.copy(here / "pictures" / "corners-03" / "red.png", here / "one" / "q.png")
    other = "pictures/corners-04/red.png"
    assert search.main(["run", "one", "one/q.png", other]) == 0
    itself, row = rows_of(capsys.readouterr().out)
    assert itself == ["one/q.png", "-", "-", "(no", "other", "picture)"]
    assert row[:2] == [other, "1"] and row[3] == "q.png"
    assert Page(here / "search.html").titles == ["one/q.png", other, "q.png"]


def test_written_embeddings_give_the_same_and_are_not_computed_again(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "pictures/corners-07/blue.png"
    assert search.main(["run", "pictures", query]) == 0
    computed = capsys.readouterr().out
    assert embed.main(["run", "pictures", "--out", "written"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(Trained, "embed", lambda *_: pytest.fail("computed again"))
    monkeypatch.chdir(here / "pictures")  # the same run and folder by other names
    assert search.main(["../run", ".", "corners-07/blue.png", "--embeddings", "../written", "--out", "../2.html"]) == 0
    assert [row[1:] for row in rows_of(capsys.readouterr().out)] == [row[1:] for row in rows_of(computed)]
    assert Page(here / "2.html").titles[1:] == Page(here / "search.html").titles[1:]


def of_another_step() -> None:
    state = load(Path("run") / CHECKPOINT)
    torch.save(state | {"step": 2}, Path("run") / CHECKPOINT)
    change_weights()


def change_weights() -> None:
    state = load(Path("run") / CHECKPOINT)
    for tensor in state["model"].values():
        tensor += 1
    torch.save(state, Path("run") / CHECKPOINT)


def of_another_folder() -> None:
    shutil.move("pictures", "moved")
    shutil.copytree("moved", "pictures")
    about = json.loads(Path("written.json").read_text())
    Path("written.json").write_text(json.dumps(about | {"folder": str(Path("moved").resolve())}))


def of_another_version() -> None:
    about = json.loads(Path("written.json").read_text())
    del about["network"]
    Path("written.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (of_another_step, r"they are of .*/run at step 3, not of .*/run at step 2; write them with .* embed"),
        (change_weights, "they are of .*/run at step 3, which has been trained again since; write them with"),
        (of_another_folder, "they are of .*/moved, not of .*/pictures; write them with"),
        (of_another_version, r"cannot read written.json \(network is missing\); write them with"),
        (lambda: Path("pictures/corners-03/red.png").unlink(), "pictures has changed since, in 'corners-03/red.png'; "),
        (lambda: shutil.copy("pictures/corners-03/red.png", "pictures/z.png"), "has changed since, in 'z.png'; "),
        (lambda: Image.new("RGB", (9, 9)).save("pictures/corners-03/red.png"), "changed since, in 'corners-03/red"),
        (lambda: Path("written.npy").write_text("text"), "cannot read written.npy"),
        (lambda: np.save("written.npy", np.zeros((32, 11), np.float32)), r"of float32 \[32, 11\] for 32 pictures"),
        (lambda: np.save("written.npy", np.array([None] * 32)), "cannot read written.npy"),
        (lambda: np.save("written.npy", np.full((32, 12), np.nan, np.float32)), "not all of its numbers are finite"),
        (lambda: Path("written.npy").unlink(), r"cannot read written.npy \(No such file or directory\)"),
        (lambda: Path("written.json").unlink(), r"cannot read written.json \(No such file or directory\)"),
        (lambda: Path("written.json").write_text("[]"), "cannot read written.json"),
    ],
)
def test_embeddings_of_something_else_are_refused(
    spoil: Callable[[], object], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(["run", "pictures", "--out", "written"]) == 0
    spoil()
    assert search.main(["run", "pictures", "pictures/corners-04/red.png", "--embeddings", "written"]) == 2
    refused(capsys, f"--embeddings written: .*{said}")


def refused(capsys: pytest.CaptureFixture[str], said: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("python -m train search: error: ")
    assert re.search(said, error), error
    assert not Path("search.html").exists()


@pytest.mark.parametrize(
    ("spoil", "arguments", "said"),
    [
        (lambda: None, ["none", "pictures", "q.png"], "RUN none: cannot read checkpoint.pt .*; RUN must be the --out"),
        (lambda: None, ["run", "none", "q.png"], "cannot read folder none: No such file"),
        (lambda: Path("empty").mkdir(), ["run", "empty", "q.png"], "empty: no pictures in it"),
        (lambda: None, ["run", "pictures", "none.png"], "QUERY: cannot read image none.png: "),
        (lambda: None, ["run", "pictures", "q.png", "pictures"], "QUERY: cannot read image pictures: "),
        (lambda: Path("q.txt").write_text("text"), ["run", "pictures", "q.png", "q.txt"], "QUERY: cannot .* q.txt"),
        (lambda: os.mkfifo("p.png"), ["run", "pictures", "p.png"], "QUERY: cannot read image p.png: it is a pipe"),
        (lambda: Path("q\n.png").write_text("text"), ["run", "pictures", "q\n.png"], r"QUERY: cannot read .* q\\n.png"),
        (lambda: Path("pictures/x.png").write_text("text"), ["run", "pictures", "q.png"], "cannot .* pictures/x"),
        (lambda: hollow("pictures/x.bmp"), ["run", "pictures", "q.png"], "cannot read image pictures/x.bmp"),
        (lambda: hollow("q.bmp"), ["run", "pictures", "q.bmp"], "cannot read image q.bmp"),
        (lambda: alone(), ["run", "one", "one/q.png"], "FOLDER one: has no picture except one/q.png"),
        (lambda: None, ["run", "pictures", "q.png", "--device", "abacus"], "--device abacus: "),
        (lambda: None, ["run", "pictures", "q.png", "--out", "none/page.html"], "there is no folder none: make it"),
        (lambda: infinite(), ["run", "pictures", "q.png"], "RUN: its network gives embeddings that are not finite"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(
    spoil: Callable[[], object], arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("pictures/corners-03/red.png", "q.png")
    spoil()
    before = sorted(here.rglob("*"))
    assert search.main(arguments) == 2
    refused(capsys, said)
    assert sorted(here.rglob("*")) == before


def hollow(path: str) -> None:
    """A picture that starts well and has no pixels."""
    Image.new("RGB", (40, 40)).save(path)
    Path(path).write_bytes(Path(path).read_bytes()[:60])


def alone() -> None:
    Path("one").mkdir()
    shutil.copy("q.png", "one/q.png")


def infinite() -> None:
    state = load(Path("run") / CHECKPOINT)
    for tensor in state["model"].values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    torch.save(state, Path("run") / CHECKPOINT)


@pytest.mark.parametrize(
    "arguments", [["run", "pictures"], *(["run", "pictures", "q.png", "--count", n] for n in ("0", "-1", "2.5", ""))]
)
def test_usage(arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        search.main(arguments)
    assert "python -m train search: error: " in capsys.readouterr().err


NAMES = ["<script>alert(1)<", "a\"b'c&amp;d", "line\nbreak", "\u202eright to left", "雪だるま", "\x1b[31mred"]


def test_any_name_is_shown_as_what_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "names"
    folder.mkdir()
    raw = os.fsencode(folder) + b"/not-\xff-utf-8.png"
    paths = [*(folder / f"{name}.png" for name in NAMES), Path(os.fsdecode(raw))]
    for i, path in enumerate(paths):
        Image.new("RGB", (20, 20), (30 * i, 255 - 30 * i, 100)).save(path)
    (here / "<b>dir").symlink_to(folder)
    assert embed.main(["run", "<b>dir", "--out", "written"]) == 0
    assert search.main(["run", "<b>dir", *map(str, paths), "--embeddings", "written", "--out", "<i>.html"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 1 + 7 * 6 + 1 and all(line.isprintable() for line in out)
    shown = Page(here / "<i>.html")
    names = {terminal.printable(path.name) for path in paths}
    assert names == {title.rpartition("/")[2] for title in shown.titles}
    assert {"<script>alert(1)<.png", "line\\nbreak.png", "not-\\udcff-utf-8.png", "\\u202eright to left.png"} < names
    assert "pictures in <b>dir, by" in shown.text and len(shown.pictures) == 7 * 7
    source = (here / "<i>.html").read_text(encoding="utf-8")
    assert "<script" not in source and "&lt;script&gt;alert(1)&lt;.png" in source


def test_a_page_has_its_bounds(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(search, "PICTURES", 10)
    monkeypatch.setattr(search, "OF_QUERY", 3)
    queries = [f"pictures/corners-{i:02}/red.png" for i in range(3, 8)]
    Image.new("RGB", (3000, 2), "red").save("pictures/strip.png")
    assert search.main(["run", "pictures", *queries, "--count", "40"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 5 * 32
    shown = Page(here / "search.html")
    assert len(shown.pictures) == 2 * (1 + 3)
    assert "This page shows the first 2 of 5 queries and the first 3 pictures found for a query;" in shown.text


def test_thumbnails_are_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(900, 1300, 3), dtype=np.uint8)
    assert len(page.thumbnail(noise)) < 60_000
    for height, width in ((1, 4000), (4000, 1), (3, 2)):
        assert page.thumbnail(noise[:1, :1].repeat(height, 0).repeat(width, 1)).startswith("data:image/jpeg;base64,")


def test_processes_that_prepare_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["run", "pictures", "pictures/corners-03/red.png", "--workers", "1"]) == 0
    hollow("pictures/x.bmp")
    capsys.readouterr()
    Path("search.html").unlink()
    assert search.main(["run", "pictures", "pictures/corners-03/red.png", "--workers", "1"]) == 2
    refused(capsys, "cannot read image pictures/x.bmp")
