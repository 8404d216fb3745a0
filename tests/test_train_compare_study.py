"""Whole studies: the report that one leaves, and that one that is stopped or killed goes on to the same numbers."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from studies import arguments, results, small_plan

from train import checkpoint
from train.compare import statistics, study, work
from train.compare.plan import VALIDATION

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(emoji_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing has disturbed."""
    out = tmp_path_factory.mktemp("a study")
    assert study.main(arguments(emoji_cache, out, jobs=2)) == 0
    return out


@pytest.mark.long
def test_a_study_leaves_a_report_with_its_pictures(whole: Path) -> None:
    text, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    assert "python -m train compare --data emoji --max-classes 40" in text
    assert f"--out {shlex.quote(str(whole))}" in text, "a shell takes the command as it stands"
    assert "Network: convnet, random weights, as asked for. Loss: " in text
    assert "All at learning rate 0.001: **" in text
    rates = 1 + ("Each method at its own learning rate: **" in text)  # where one has another
    judged = [line for line in text.splitlines() if " against " in line and line.startswith("- ")]
    assert len(judged) == 2 * rates, "axbn against two"
    assert f"corrected for the number of comparisons below, {2 * rates} (" in text
    assert all("significant" in line and "seed by seed" in line for line in judged)
    tested = sum(name.startswith("test-") for name in results(whole))
    assert 6 <= tested <= 12 and f"{len(results(whole)) - tested} + {tested} runs" in text
    for name in ("final", "map", "drift", "effects"):
        assert f"]({name}.png)" in text and f'src="{name}.png"' in page
        with Image.open(whole / f"{name}.png") as image:
            assert image.width > 400 and np.asarray(image.convert("L")).std() > 5
    assert page.count("<table>") == sum(line.startswith("| ---") for line in text.splitlines()) > 4
    scores = {
        method: [
            r["scores"]["map@r"] for name, r in results(whole).items() if name.startswith(f"test-{method}-lr0.001-")
        ]
        for method in ("batch", "xbm")
    }
    for method, values in scores.items():
        assert f"| {method} |" in text and str(statistics.estimate(values)) in text


@pytest.mark.long
def test_a_finished_study_is_only_written_again(
    whole: Path, emoji_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_do", lambda *_: pytest.fail("trained again"))
    before = (whole / "report.md").read_text()
    assert study.main(arguments(emoji_cache, whole, jobs=2)) == 0
    assert (whole / "report.md").read_text() == before


@pytest.mark.long
def test_a_folder_with_other_settings_is_left_alone(
    whole: Path, emoji_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main([*arguments(emoji_cache, whole), "--weight-decay", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--weight-decay 0.0001 there, 0.5 now" in error and "or delete it" in error


@pytest.mark.long
def test_a_run_of_a_study_that_is_stopped_goes_on_to_the_same_numbers(
    whole: Path, emoji_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(small_plan().base, cache=emoji_cache)
    run = small_plan(base=base).run(VALIDATION, "axbn", 0, lr=1e-3)
    workshop = work.Workshop(tmp_path / "runs", 1, 1, "cpu")
    workshop.folder.mkdir()
    asked = iter([False] * 7 + [True])  # before each step, and of the runs
    monkeypatch.setattr(work, "_stop", SimpleNamespace(is_set=lambda: next(asked)), raising=False)
    assert work._do(workshop, run) is None and not results(tmp_path)
    assert 0 < checkpoint.load(tmp_path / "runs" / run.name / checkpoint.CHECKPOINT)["step"] < 12
    monkeypatch.setattr(work, "_stop", SimpleNamespace(is_set=lambda: False))
    assert work._do(workshop, run) is not None
    assert results(tmp_path)[f"{run.name}.json"] == results(whole)[f"{run.name}.json"]
    assert not (tmp_path / "runs" / run.name).exists(), "no checkpoint left behind"
    (tmp_path / "runs" / run.name).mkdir()  # as if killed right after the result
    with work.Workers(workshop, lambda: False) as workers:
        assert list(workers.carry_out([run], "again")) == [run.name]
    assert not (tmp_path / "runs" / run.name).exists()


def wait_for(found: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < end, "the study ended, or hangs"
        time.sleep(0.02)


@pytest.mark.long
def test_a_study_that_is_stopped_then_killed_comes_to_the_same_numbers(
    whole: Path, emoji_cache: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "train.compare", *arguments(emoji_cache, tmp_path, jobs=2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = f"runs/*/{checkpoint.CHECKPOINT}"
    done = 0
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
        )  # fmt: skip
        wait_for(lambda least=done + 2: any(tmp_path.glob(started)) and len(results(tmp_path)) >= least, process)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as Ctrl-C does: the working processes get it, too
            assert process.wait(60) == 130
        else:
            process.kill()
            process.wait(60)
            left = Path("/proc") if sys.platform == "linux" else None
            end = time.monotonic() + 20
            while left and any(group_of(path) == process.pid for path in left.glob("[0-9]*")):
                assert time.monotonic() < end, "working processes outlive the study"
                time.sleep(0.1)
        assert done + 2 <= len(results(tmp_path)) < len(results(whole)) and not (tmp_path / "report.md").exists()
        done = len(results(tmp_path))
    assert study.main(arguments(emoji_cache, tmp_path)) == 0
    assert results(tmp_path) == results(whole)
    assert not any(path.is_dir() for path in (tmp_path / "runs").iterdir()), "no checkpoints left behind"


def group_of(process: Path) -> int | None:
    """The process group of a running process."""
    try:
        after_name = (process / "stat").read_text().rpartition(")")[2].split()
        return int(after_name[2]) if after_name[0] != "Z" else None
    except OSError:
        return None
