"""A step and every loss stay within their memory budget, and the measurement of memory sees what there is."""

import json
import os

import pytest
import torch
from benchmark_cases import TINY

from benchmarks import peaks
from benchmarks.__main__ import main
from benchmarks.comparisons import COMPARISONS, OURS, THEIRS
from benchmarks.memory import extra_megabytes, in_fresh_process, peak_extra_megabytes
from benchmarks.problem import BankProblem, Problem


@pytest.mark.parametrize("update", [OURS, pytest.param("xbn_ext deferred", marks=pytest.mark.long)])
def test_a_step_needs_less_than_16_megabytes_besides_the_bank(update):
    assert peak_extra_megabytes(update, Problem(batch=64, memory=65536, dim=128), threads=2) < 16


@pytest.mark.long
def test_the_memory_measurement_sees_a_similarity_matrix():
    """The test of the test: eager PyTorch holds at least the 16.8 MB of its similarities and a bank's copy."""
    assert peak_extra_megabytes("eager", Problem(batch=64, memory=65536, dim=128), threads=2) > 16.8 + 33.6


@pytest.mark.long
def test_memory_command(in_this_process, tmp_path, capsys):
    pytest.importorskip("pytorch_metric_learning")
    file = tmp_path / "rows.json"
    main([*TINY, "--kernel", "memory", "--json", str(file)])
    rows, table = json.loads(file.read_text()), capsys.readouterr().out
    shapes = [(20, 700, 33, 30), (16, 200, 24, 8)]
    names = {loss: (OURS, THEIRS)[: 1 + (comparison.name is not None)] for loss, comparison in COMPARISONS.items()}
    expected = [(loss, *shape, name) for loss in COMPARISONS for shape in shapes for name in names[loss]]
    keys = "loss", "batch", "memory", "dim", "classes", "implementation"
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert all(f"\n{loss} " in table for loss in COMPARISONS)
    compared = [row for row in rows if len(names[row["loss"]]) == 2]
    for ours, theirs in zip(compared[::2], compared[1::2], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-5) and ours["value"] > 0.01, (ours, theirs)
        for row in (ours, theirs):
            assert (row["kernel"], row["device"], row["dtype"]) == ("memory", "cpu", "float32")
            assert row["peak_mb"] >= 0


def test_memory_command_without_the_other_library(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "theirs_installed", lambda: False)
    rows = main([*TINY, "--kernel", "memory"])
    assert [row["implementation"] for row in rows] == [OURS] * 2 * len(COMPARISONS)
    theirs = [comparison for comparison in COMPARISONS.values() if comparison.name is not None]
    assert capsys.readouterr().out.count("not installed") >= 2 * len(theirs)


@pytest.mark.long
def test_a_loss_that_does_not_fit_is_shown_as_such():
    pytest.importorskip("pytorch_metric_learning")
    problem = BankProblem(64, 2048, 16, classes=28)  # every one of 4,700 positives with all 126,000 negatives: 10 GB
    assert peaks.peak("ntxent", OURS, problem, threads=1, limit=300) is not None
    assert peaks.peak("ntxent", THEIRS, problem, threads=1, limit=300) is None
    assert peaks.text(None, limit=12_000) == "> 12,000"


def peaks_of_all_losses(threads):
    """By loss; in one process, as what is freed goes back to the system before each."""
    torch.set_num_threads(threads)
    tensors = BankProblem(64, 65536, 512, classes=11318).tensors()
    result = {}
    for name, comparison in COMPARISONS.items():
        result[name] = extra_megabytes(lambda: peaks._forward_backward(comparison.ours, *tensors))  # noqa: B023
    return result


@pytest.mark.long
def test_a_loss_needs_less_than_16_megabytes_besides_the_bank():
    measured = in_fresh_process(peaks_of_all_losses, 2)
    assert measured.keys() == COMPARISONS.keys()
    assert all(megabytes < 16 for megabytes in measured.values()), measured


def allocate(megabytes):
    for size in (20, 4, 20, 4):  # leaves the C library with freed memory, which it would hand out unseen
        freed = [torch.ones(size * 250_000) for _ in range(10)]
        del freed
    return extra_megabytes(lambda: torch.ones(megabytes * 250_000).sum())


@pytest.mark.long
@pytest.mark.parametrize("megabytes", [10, 100])
def test_the_memory_measurement_sees_an_allocation(megabytes):
    assert megabytes <= in_fresh_process(allocate, megabytes) < megabytes + 3


def die(signal):
    os.kill(os.getpid(), signal)


@pytest.mark.parametrize(
    ("signal", "error"), [(9, MemoryError), pytest.param(15, RuntimeError, marks=pytest.mark.long)]
)
def test_a_process_that_dies_is_an_error(signal, error):
    with pytest.raises(error, match=rf"exit code -{signal}"):
        in_fresh_process(die, signal)
