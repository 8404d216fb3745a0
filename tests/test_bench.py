"""The benchmarks run, what they compare agrees, and a step and every loss stay within their memory budget."""

import json
import os

import pytest
import torch

from xbn_ext.bench import peaks
from xbn_ext.bench.__main__ import main
from xbn_ext.bench.baselines import IMPLEMENTATIONS
from xbn_ext.bench.comparisons import COMPARISONS, OURS, THEIRS
from xbn_ext.bench.measure import extra_megabytes, in_fresh_process, peak_extra_megabytes
from xbn_ext.bench.problem import BankProblem, Problem

TINY = ["--batch", "20", "--memory", "700", "--dim", "33", "--classes", "30", "--threads", "1"]


def test_command(tmp_path, capsys):
    names = [name for name in IMPLEMENTATIONS if name != "compile"]  # compiling takes longer than all other tests
    file = tmp_path / "rows.json"
    main([*TINY, "--repeats", "2", "--json", str(file), "--only", *names])
    rows, table = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["implementation"] for row in rows] == names
    for row in rows:
        assert row["ms"] > 0 and row["error"] < 1e-5, row
        assert row["implementation"] in table


@pytest.mark.parametrize("update", ["xbn_ext", "xbn_ext deferred"])
def test_a_step_needs_less_than_16_megabytes_besides_the_bank(update):
    assert peak_extra_megabytes(update, Problem(batch=64, memory=65536, dim=512), threads=2) < 16


def test_the_memory_measurement_sees_a_similarity_matrix():
    """The test of the test: eager PyTorch holds at least the 16.8 MB of its similarities and a bank's copy."""
    assert peak_extra_megabytes("eager", Problem(batch=64, memory=65536, dim=128), threads=2) > 16.8 + 33.6


@pytest.fixture
def in_this_process(monkeypatch):
    """The memory table without the time to start 28 processes, its second shape as tiny as the first."""
    monkeypatch.setattr(peaks, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(peaks, "limit_memory", lambda megabytes: None)
    monkeypatch.setattr(peaks, "SKEWED", BankProblem(16, 200, 24, classes=8, majority=0.35))


def test_memory_command(in_this_process, tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    file = tmp_path / "rows.json"
    main([*TINY, "--kernel", "memory", "--json", str(file)])
    rows, table = json.loads(file.read_text()), capsys.readouterr().out
    shapes = [(20, 700, 33, 30), (16, 200, 24, 8)]
    expected = [(loss, *shape, name) for loss in COMPARISONS for shape in shapes for name in (OURS, THEIRS)]
    keys = "loss", "batch", "memory", "dim", "classes", "implementation"
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert all(f"\n{loss} " in table for loss in COMPARISONS)
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-5) and ours["value"] > 0.01, (ours, theirs)
        for row in (ours, theirs):
            assert (row["kernel"], row["device"], row["dtype"]) == ("memory", "cpu", "float32")
            assert row["peak_mb"] >= 0


def test_memory_command_without_the_other_library(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "theirs_installed", lambda: False)
    rows = main([*TINY, "--kernel", "memory"])
    assert [row["implementation"] for row in rows] == [OURS] * 2 * len(COMPARISONS)
    assert capsys.readouterr().out.count("not installed") >= 2 * len(COMPARISONS)


def test_a_loss_that_does_not_fit_is_shown_as_such():
    pytest.importorskip("pytorch_metric_learning")
    problem = BankProblem(64, 2048, 16, classes=28)  # every one of 4,700 positives with all 126,000 negatives: 10 GB
    assert peaks.peak("ntxent", OURS, problem, threads=1, limit=300) is not None
    assert peaks.peak("ntxent", THEIRS, problem, threads=1, limit=300) is None
    assert peaks.text(None, limit=12_000) == "> 12,000"


@pytest.mark.parametrize("loss", COMPARISONS)
def test_a_loss_needs_less_than_16_megabytes_besides_the_bank(loss):
    measured = peaks.peak(loss, OURS, BankProblem(64, 65536, 512, classes=11318), threads=2, limit=1000)
    assert measured is not None and measured.megabytes < 16


def allocate(megabytes):
    for size in (20, 4, 20, 4):  # leaves the C library with freed memory, which it would hand out unseen
        freed = [torch.ones(size * 250_000) for _ in range(10)]
        del freed
    return extra_megabytes(lambda: torch.ones(megabytes * 250_000).sum())


@pytest.mark.parametrize("megabytes", [10, 100])
def test_the_memory_measurement_sees_an_allocation(megabytes):
    assert megabytes <= in_fresh_process(allocate, megabytes) < megabytes + 3


def die(signal):
    os.kill(os.getpid(), signal)


@pytest.mark.parametrize(("signal", "error"), [(9, MemoryError), (15, RuntimeError)])
def test_a_process_that_dies_is_an_error(signal, error):
    with pytest.raises(error, match=rf"exit code -{signal}"):
        in_fresh_process(die, signal)


@pytest.mark.parametrize(
    "argument", [["--batch", "0"], ["--only", "magic"], ["--memory", "many"], ["--kernel", "magic"]]
)
def test_bad_arguments(argument, capsys):
    with pytest.raises(SystemExit):
        main(argument)
    assert argument[0] in capsys.readouterr().err
