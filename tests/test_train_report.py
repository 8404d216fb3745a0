"""`python -m train report`: a finished run as a page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import pytest
from pages import Page
from PIL import Image

from train import place, report, run
from train.checkpoint import CURVES, METRICS, NEIGHBOURS, REPORT


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = tmp_path_factory.mktemp("data") / "<b>shapes & 'co'"
    miniatures.make_shapes(shapes)
    return miniatures.make_run(shapes, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def its(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / METRICS).read_text())
    return content


def change(folder: Path, **entries: Any) -> None:
    (folder / METRICS).write_text(json.dumps(metrics(folder) | entries))


def test_a_report_has_all_of_a_run(its: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in its.rglob("*") if path.is_file()}
    assert report.main([str(its)]) == 0
    assert capsys.readouterr().out == f"{its / REPORT}\n"
    shown, found = Page(its / REPORT), metrics(its)
    assert [each.size for each in shown.pictures] == [Image.open(its / name).size for name in (CURVES, NEIGHBOURS)]
    assert "axbn, convnet on folder <b>shapes & 'co'" in shown.text
    for scores in (found["before"], found["untrained_head"], found):
        assert " ".join(f"{scores[name]:.1f}" for name in found["before"]) in shown.text
    assert f"{found['before']['recall@1']:.1f} → {found['recall@1']:.1f} %" in shown.text
    assert "Recall@1 Recall@10 Recall@100 MAP@R" in shown.text
    for name, value in found["config"].items():
        assert f"{name.replace('_', '-')} {'not given' if value is None else value} " in shown.text
    assert "train images 16 " in shown.text and f"torch {found['machine']['torch']} " in shown.text
    assert {path: path.read_bytes() for path in before} == before
    first = (its / REPORT).read_bytes()
    assert report.main([str(its), "--out", str(its.parent / "other.html")]) == 0
    assert (its.parent / "other.html").read_bytes() == first


def test_credit_and_harm_are_named(its: Path) -> None:
    data = metrics(its)["data"] | {"name": "</title><script>x</script>", "credit": ["A & B, CC BY 4.0"]}
    change(its, data=data, before=dict.fromkeys(metrics(its)["before"], 100.0), backbone="</p><img src=x>")
    report.main([str(its)])
    shown = Page(its / REPORT)
    assert "A & B, CC BY 4.0" in shown.text and "Recall@1 and MAP@R fell below the backbone alone" in shown.text
    assert "</title><script>x</script>" in shown.text and "</p><img src=x>" in shown.text


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-400])])
def test_pictures_that_are_gone_are_left_out(spoil: Callable[[Path], object], its: Path) -> None:
    spoil(its / CURVES)
    assert report.main([str(its)]) == 0
    shown = Page(its / REPORT)
    assert len(shown.pictures) == 1 and "curves.png cannot be read, or is no longer in the folder" in shown.text


def no_machine(folder: Path) -> None:
    (folder / METRICS).write_text(json.dumps({k: v for k, v in metrics(folder).items() if k != "machine"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, r"RUN .*/run: cannot read metrics.json \(No such file or directory\); RUN must be the --out"),
        (lambda run: (run / METRICS).unlink(), "RUN .*/run: is not finished, but at step 3 of 3; .* --resume"),
        (lambda run: (run / METRICS).write_text("{"), "RUN .*/run: cannot read metrics.json"),
        (no_machine, r"cannot read metrics.json \(there is no 'machine' in it\)"),
        (lambda run: change(run, before=[]), "cannot read metrics.json"),
        (lambda run: change(run, **{"recall@1": "many"}), "cannot read metrics.json"),
        (lambda run: (run / REPORT).mkdir(), "report.html: .*report.html is a folder: choose another"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_a_line(
    spoil: Callable[[Path], object], said: str, its: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(its)
    before = sorted(its.parent.rglob("*"))
    assert report.main([str(its)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m train report: error: ") and error.count("\n") == 1
    assert re.search(said, error), error
    assert sorted(its.parent.rglob("*")) == before


def test_a_run_that_starts_again_removes_the_report(its: Path) -> None:
    assert report.main([str(its)]) == 0
    place.prepare(its)
    assert not (its / REPORT).exists()
    (its / REPORT).mkdir()
    with pytest.raises(run.ConfigError, match=r"report.html in it is a folder, which no run makes"):
        place.look(run.Config(out=its))
