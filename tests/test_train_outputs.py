"""A command replaces what it has written itself, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from train import embed, export, report, search

PICTURE = "corners-03/red.png"


COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "embed": (embed.main, ["run", "pictures"]),
    "search": (search.main, ["run", "pictures", f"pictures/{PICTURE}"]),
    "report": (report.main, ["run"]),
    "export": (export.main, ["run"]),
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "out", "said"),
    [
        ("embed", "run/metrics", "would replace metrics.json, which the command embed has not written: move it, or"),
        ("embed", "mine", "would replace mine.npy, which the command embed has not written"),
        ("embed", "both", "would replace both.npy and both.json, which the command embed has not written"),
        ("search", f"pictures/{PICTURE}", "is there and is no page of HTML: move it, or choose another"),
        ("search", "run/checkpoint.pt", "is there and is no page of HTML"),
        ("report", "run/metrics.json", "is there and is no page of HTML"),
        ("export", "others", "would replace network.json, which the command export has not written"),
        ("embed", "y" * 251, "File name too long"),
        ("search", "y" * 256, "File name too long"),
        ("report", "y" * 256, "File name too long"),
        ("embed", "none/mine", "there is no folder none: make it, or choose another"),
        ("search", "none/page.html", "there is no folder none: make it, or choose another"),
        ("search", "others", "others is a folder: choose another"),
        ("report", "mine.npy/page.html", "Not a directory: choose another"),
        ("export", "mine.npy/folder", "Not a directory: choose another"),
    ],
)
def test_what_is_not_its_own_stays(
    command: str, out: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "others").mkdir()
    for name in ("mine.npy", "both.npy", "both.json", "others/network.json"):
        (here / name).write_text('{"mine": 1}')
    before = contents(here)
    main, words = COMMANDS[command]
    assert main([*words, "--out", out]) == 2
    assert f"--out {out}: {said}" in capsys.readouterr().err
    assert contents(here) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_its_own_is_replaced(command: str, here: Path) -> None:
    main, words = COMMANDS[command]
    (here / "empty").touch()  # as mktemp makes it
    out = {"embed": "rows", "export": "exported"}.get(command, "empty")
    assert main([*words, "--out", out]) == 0
    first = {path for path in here.rglob("*") if path.is_file()}
    assert main([*words, "--out", out]) == 0
    assert {path for path in here.rglob("*") if path.is_file()} == first


@pytest.mark.parametrize("command", ["embed", "export"])
def test_what_a_process_that_was_killed_has_left_is_replaced(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never files of one network beside those of another."""
    main, words = COMMANDS[command]
    (here / "out").mkdir()
    words = [*words, "--out", "out" if command == "export" else "out/rows"]
    replace, renamed = os.replace, []

    def rename(source: str, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        replace(source, target)
        renamed.append(target)

    for _ in range(2):  # the second time over whole ones
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", rename)
            main(words)
        assert list((here / "out").iterdir()) == [here / renamed.pop()]
        assert main(words) == 0


def test_embeddings_of_another_version_are_replaced(here: Path) -> None:
    assert embed.main(["run", "pictures", "--out", "rows"]) == 0
    about = json.loads((here / "rows.json").read_text())
    (here / "rows.json").write_text(json.dumps({name: about[name] for name in ("run", "step", "folder", "paths")}))
    assert embed.main(["run", "pictures", "--out", "rows"]) == 0
    assert json.loads((here / "rows.json").read_text()) == about


def test_a_name_may_be_as_long_as_the_system_takes(here: Path) -> None:
    out = "y" * 255
    assert report.main(["run", "--out", out]) == 0
    assert (here / out).read_bytes().startswith(b"<!doctype html>")


def test_what_a_name_holds_that_cannot_be_seen_is_escaped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["run", "--out", "two\nlines.html"]) == 0
    assert capsys.readouterr().out == "two\\nlines.html\n"
    assert (here / "two\nlines.html").exists()
