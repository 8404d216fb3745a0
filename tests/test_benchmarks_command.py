"""`python -m benchmarks`: what it measures with each kernel, option and number of threads, and what it writes."""

import json

import pytest
import torch
from benchmark_cases import KEYS, QUICK, TINY

from benchmarks import compare, plot, roofline
from benchmarks.__main__ import main
from benchmarks.comparisons import OURS, THEIRS, theirs_installed
from benchmarks.problem import KERNELS


@pytest.mark.long
def test_command(tmp_path, capsys):
    """As it is, with its own processes and peaks."""
    file = tmp_path / "rows.json"
    main([*TINY, "--repeats", "2", "--json", str(file), "--only", OURS, "chunked"])
    rows, table = json.loads(file.read_text()), capsys.readouterr().out
    assert [row["implementation"] for row in rows] == [OURS, "chunked"]
    for row in rows:
        assert row.keys() >= KEYS and row["peak_mb"] >= 0 and row["ms"] > 0 and row["error"] < 1e-5
    assert "roofline, measured now" in table and "crossover: " in table
    assert ", 1 thread, B=20 D=33, density 1 %, 30 classes" in table and " active " in table
    for row in rows:
        assert (row["density"], row["rows"]) == (0.01, None) and "efficiency" not in row
        assert row["active"] == pytest.approx(100 * row["pairs"] / 700) and row["active"] > 0.5


@pytest.mark.parametrize(
    ("kernel", "loss"),
    [
        *((kernel, "contrastive") for kernel in KERNELS),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("loss", "supcon"), ("step", "triplet_all"))),
    ],
)
def test_every_kernel(kernel, loss, in_this_process, tmp_path, capsys):
    file = tmp_path / "rows.json"
    main([*TINY, "--repeats", "2", "--kernel", kernel, "--loss", loss, "--json", str(file), "--only", *QUICK])
    rows, table = json.loads(file.read_text()), capsys.readouterr().out
    names = [row["implementation"] for row in rows]
    assert {OURS, "eager", "eager-tuned"} <= set(names)
    assert ("chunked" in names) == (kernel in ("loss", "step") and loss != "triplet_all")
    assert ("cannot go through triplet_all in chunks" in table) == (loss == "triplet_all")
    assert (THEIRS in names) == (kernel in ("loss", "step") and theirs_installed())
    for row in rows:
        assert row.keys() >= KEYS and row["kernel"] == kernel
        assert row["loss"] == (loss if kernel in ("loss", "step") else None)
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["gbs"] > 0 and row["roofline"] > 0
        assert (row["active"] is None) == (kernel not in ("loss", "step"))
        assert row["error"] < 1e-5, row
        assert f" {row['implementation']} " in table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--update", "deferred", "--drift", "ema"], ["xbn_ext deferred", "eager-tuned"]),
        (["--drift", "xbn", "--dtype", "float64"], [OURS, "xbn_ext deferred", "eager-tuned"]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (["--update", "inplace"], [OURS, "eager-tuned"]),
                (["--drift", "none"], [OURS, "eager-tuned"]),
                (["--dtype", "float16"], ["xbn_ext deferred", "eager-tuned"]),
                (["--kernel", "transform", "--dtype", "bfloat16"], [OURS, "eager-tuned"]),
            )
        ),
    ],
)
def test_options_of_a_step(arguments, expected, in_this_process):
    names = [OURS, "xbn_ext deferred", "eager-tuned", "xbn_ext simt"]
    rows = main([*TINY, "--repeats", "1", "--classes", "5", *arguments, "--only", *names])
    assert [row["implementation"] for row in rows] == expected
    limit = {"float64": 1e-12, "float32": 1e-5}.get(rows[0]["dtype"], 0.02)
    assert all(row["error"] < limit for row in rows), rows


def test_plot_of_several_sizes(in_this_process, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    rows = main([*TINY, "--memory", "64", "300", "--repeats", "1", "--only", OURS, "eager", "--plot", str(file)])
    assert [row["memory"] for row in rows] == [64, 64, 300, 300]
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and file.stat().st_size > 10_000


@pytest.mark.long
def test_what_does_not_fit_has_a_row_without_numbers(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "peak_extra_megabytes", lambda name, *args: None if name == "eager" else 1.0)
    rows = main([*TINY, "--repeats", "1", "--only", OURS, "eager"])
    assert [row["ms"] is None for row in rows] == [False, True] and rows[1]["error"] is None
    assert "needs more memory than there is" in capsys.readouterr().out
    if plot.can_plot():
        plot.plot(rows, tmp_path / "plot.png")


def test_without_the_compiled_library_it_measures_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("xbn_ext._library.native", False)
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(roofline.MM_SIZE, "cpu", 64)
    monkeypatch.setattr(compare, "peak_extra_megabytes", lambda *args: 1.0)
    main([*TINY, "--repeats", "1", "--only", OURS, "eager"])
    assert "without the compiled library" in capsys.readouterr().out


@pytest.mark.long
def test_more_threads(in_this_process, tmp_path, capsys):
    """This library with each number; the others with the largest."""
    file = tmp_path / "rows.json"
    arguments = ["--repeats", "1", "--threads", "2,1,2", "--only", OURS, "eager", "--json", str(file)]
    main([*TINY, "--memory", "64", "300", *arguments])
    rows, out = json.loads(file.read_text()), capsys.readouterr().out
    of = [(row["threads"], row["implementation"], row["memory"]) for row in rows]
    assert of == [(1, OURS, 64), (1, OURS, 300)] + [(2, name, M) for M in (64, 300) for name in (OURS, "eager")]
    assert torch.get_num_threads() == 2 and ", 1 thread, " in out and ", 2 threads, " in out
    ours = {row["threads"]: row for row in rows if row["memory"] == 64 and row["implementation"] == OURS}
    assert ours[1]["efficiency"] == pytest.approx(100)
    assert ours[2]["efficiency"] == pytest.approx(100 * ours[1]["ms"] / (2 * ours[2]["ms"]))
    assert "efficiency" not in rows[-1] and "efficiency in %: time at 1 / (n x time at n)" in out
    torch.set_num_threads(1)  # as the other tests


def test_more_threads_than_processors_are_named(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.cores", lambda: 1)
    for threads in "1", "2":
        main([*TINY, "--threads", threads, "--kernel", "moments", "--repeats", "1", "--only", "eager"])
        said = capsys.readouterr().out.startswith("2 threads take turns on 1 processors")
        assert said == (threads == "2")
