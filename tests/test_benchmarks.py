"""The benchmarks run, what they compare agrees, and a step and every loss stay within their memory budget."""

import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_cases import problem as loss_problem
from loss_cases import run

from benchmarks import compare, options, peaks, plot, ranks, roofline, scaling, table, torch_memory
from benchmarks.__main__ import main, parse
from benchmarks.chunked import can_be_chunked, chunked_loss
from benchmarks.clock import Timer, Timing, interleaved
from benchmarks.comparisons import COMPARISONS, OURS, THEIRS, theirs_installed
from benchmarks.crossover import crossover
from benchmarks.dense import dense_loss
from benchmarks.implementations import NAMES, ROUNDS, make, weighted_pairs, why_not
from benchmarks.memory import extra_megabytes, in_fresh_process, peak_extra_megabytes
from benchmarks.problem import KERNELS, BankProblem, Problem
from benchmarks.recorded import Recorded
from benchmarks.roofline import Bound, Work, bound_of, measure_machine, work_of
from benchmarks.rows import exponent, spectrum, unscaled
from xbn_ext import build_info, reference
from xbn_ext.testing import error

TINY = ["--batch", "20", "--memory", "700", "--dim", "33", "--classes", "30", "--threads", "1"]
KEYS = {
    "implementation", "kernel", "loss", "device", "dtype", "batch", "memory", "dim", "density", "rows", "ms", "ms_low",
    "ms_high", "peak_mb", "pairs", "active", "gflops", "gbs", "roofline", "error",
}  # fmt: skip
MACHINE = {"float32": 100.0, "float64": 50.0, "tf32": 800.0, "read": 20.0, "copy": 16.0}
QUICK = [name for name in NAMES if "compile" not in name]  # compiling takes longer than all other tests


@pytest.fixture
def in_this_process(monkeypatch):
    """All tables without the time to start processes and to measure the machine; the second shape of the memory table
    as tiny as the first."""
    monkeypatch.setattr(compare, "peak_extra_megabytes", lambda *args: 1.0)
    monkeypatch.setattr("benchmarks.__main__.measure_machine", lambda *args: MACHINE)
    monkeypatch.setattr(peaks, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(peaks, "limit_memory", lambda megabytes: None)
    monkeypatch.setattr(peaks, "SKEWED", BankProblem(16, 200, 24, classes=8, majority=0.35))


# --- The command --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "argument",
    [
        ["--batch", "0"], ["--only", "magic"], ["--memory", "many"], ["--kernel", "magic"], ["--loss", "magic"],
        ["--drift", "magic"], ["--update", "magic"], ["--dtype", "int8"], ["--device", "tpu"], ["--preset", "magic"],
        ["--repeats", "0"], ["--memory", "8", "9", "--kernel", "memory"], ["--magic"],
        ["--density", "0.51"], ["--density", "-0.01"], ["--density", "nan"], ["--density", "0.1", "--kernel", "memory"],
        ["--threads", "0"], ["--threads", "1,"], ["--threads", "1,5000"], ["--threads", "1,2", "--kernel", "memory"],
        ["--threads", "1,2", "--only", "chunked"],
    ],
)  # fmt: skip
def test_bad_arguments(argument, capsys):
    with pytest.raises(SystemExit):
        main(argument)
    assert argument[0] in capsys.readouterr().err


def test_without_a_gpu_or_matplotlib_the_argument_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.__main__.can_plot", lambda: False)
    for argument, words in ((["--device", "cuda"], "--device"), (["--plot", "x.png"], "pip install matplotlib")):
        with pytest.raises(SystemExit):
            main(argument)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(argument, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.can_plot", lambda: True)
    (tmp_path / "text").touch()
    wrong = {
        str(tmp_path): "is a folder",
        "": "is a folder",
        str(tmp_path / "new" / "x.png"): f"there is no folder {tmp_path / 'new'}",
        str(tmp_path / f"{300 * 'x'}.png"): "File name too long",
        str(tmp_path / "text" / "x.png"): "Not a directory",
    }
    for file, message in wrong.items():
        with pytest.raises(SystemExit):
            parse([argument, file])
        assert message in capsys.readouterr().err
    file = tmp_path / "x.png"
    for _ in range(2):
        assert parse([argument, str(file)])
        file.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != file)  # the tests' user may be root, who may all
    with pytest.raises(SystemExit):
        parse([argument, str(file)])
    assert f"{argument}: {file} may not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (f"--memory {10**13}", "they take 20,480,000,001,179,648 bytes"),
        (f"--batch {10**13}", "arguments --memory, --batch, --dim: they take"),
        (f"--dim {10**7} --memory 9", "arguments --memory, --batch, --dim: they take"),
        ("--memory x", "argument --memory: must be a whole number, got 'x'"),
        ("--threads 1,", "argument --threads: must be a whole number, got ''"),
        ("--density x", "argument --density: must be within [0, 0.5], got x"),
        (f"--classes {2**63}", f"argument --classes: must be below 2^63, got {2**63}"),
    ],
)
def test_a_number_that_cannot_be_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments.split())
    assert message in capsys.readouterr().err


def test_a_picture_has_the_name_of_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.can_plot", lambda: True)
    for name in ("x.xyz", "x", "x.svg"):
        with pytest.raises(SystemExit):
            parse(["--plot", str(tmp_path / name)])
        assert f"argument --plot: {tmp_path / name}: its name must end in .png" in capsys.readouterr().err
    assert parse(["--plot", str(tmp_path / "x.PNG")])


def test_one_file_is_not_written_over_another(rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.can_plot", lambda: True)
    (tmp_path / "rows.png").symlink_to(rows_file)
    for first, second in (("--json", "--plot"), ("--rows", "--json"), ("--rows", "--plot")):
        file = str(rows_file) if first == "--rows" else str(tmp_path / "x.png")
        other = str(tmp_path / "rows.png") if first == "--rows" else file
        with pytest.raises(SystemExit):
            parse([first, file, second, other])
        assert f"argument {second}: {other} is the file of {first}" in capsys.readouterr().err


def test_explicit_arguments_go_before_a_preset():
    assert len(parse([])[1]) == 1 and parse([])[1][0] == options.DEFAULTS
    for preset, cases in options.PRESETS.items():
        _, chosen = parse(["--preset", preset, "--repeats", "7", "--memory", "9"])
        assert len(chosen) == len(cases)
        assert all(case["repeats"] == 7 and case["memory"] == [9] for case in chosen)
        assert [case["dim"] for case in chosen] == [case.get("dim", 512) for case in cases]
        assert all(case["density"] == 0.01 for case in chosen)
    assert max(options.PRESETS["sweep"][0]["memory"]) == 1_000_000
    assert len(parse(["--preset", "paper", "--batch", "7"])[1]) == 5  # two differ in the batch alone


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


def test_efficiency_is_of_the_least_number_of_threads():
    rows = [{"implementation": OURS, "memory": 8, "threads": n, "ms": ms} for n, ms in ((4, 2.0), (2, 3.0), (8, None))]
    scaling.add_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [75, 100, None]
    lines = scaling.efficiency_table(rows).splitlines()[1:]
    assert lines[0].startswith("efficiency in %: 2 x time at 2 /")
    assert lines[2].split() == ["8", OURS, "100", "75", "-"]


def test_more_threads_than_processors_are_named(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.cores", lambda: 1)
    for threads in "1", "2":
        main([*TINY, "--threads", threads, "--kernel", "moments", "--repeats", "1", "--only", "eager"])
        said = capsys.readouterr().out.startswith("2 threads take turns on 1 processors")
        assert said == (threads == "2")


# --- The rows -----------------------------------------------------------------------------------------------------


def share_above_the_margin(x, labels, bank, bank_labels):
    negative = labels[:, None] != bank_labels
    return float(((x @ bank.T > 0.5) & negative).sum() / negative.sum())


DENSITIES = [(64, 0.001), (512, 0.05)]  # others in `make test-all`: the rows take seconds


@pytest.mark.parametrize(
    "dim, density",
    [
        *DENSITIES,
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product([64, 128, 512], [0.001, 0.01, 0.05])
            if case not in DENSITIES
        ),
    ],
)
def test_density_is_what_was_asked_for(dim, density):
    """Over thousands of classes, each with one row: a batch has 16, and some have few neighbours."""
    scale = spectrum(dim, exponent(dim, Problem.classes, density, "cpu"), "cpu")
    (x, labels), (bank, bank_labels) = (unscaled(n, dim, Problem.classes, n, "cpu") for n in (3000, 8000))
    x, bank = (F.normalize(t * scale, dim=1) for t in (x, bank))
    assert share_above_the_margin(x, labels, bank, bank_labels) == pytest.approx(density, rel=0.2)


@pytest.mark.long
def test_rows_are_alike_in_all_directions_where_no_pair_is_to_be_active():
    problem = Problem(memory=4096, dim=128, density=0.0)
    assert share_above_the_margin(*problem.embeddings(256, seed=7), *problem.bank()) < 1e-5
    std = problem.bank()[0].std(0)
    assert std.max() < 1.2 * std.min()


def test_few_dimensions_cannot_have_less_than_rows_alike_in_all_directions():
    assert exponent(8, 100, 0.001, "cpu") == 0 < exponent(8, 100, 0.3, "cpu")


def test_all_rows_of_a_problem_are_of_the_same_classes():
    """Four a batch, whatever the seed; as unlike as any without a class in common."""
    problem = Problem(dim=64, classes=300, density=0.0)
    (x, labels), (y, others) = problem.embeddings(402, seed=1), problem.embeddings(400, seed=2)
    assert labels.unique_consecutive().numel() in (100, 101) and not labels.equal(others)
    s, positive = x @ y.T, labels[:, None] == others
    assert s[positive].mean() > 0.65 and abs(s[~positive].mean()) < 0.01
    assert all(torch.equal(a, b) for a, b in zip(problem.embeddings(402, seed=1), (x, labels), strict=True))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float64, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_rows_have_the_dtype_of_the_problem(stored, computed):
    problem = Problem(memory=40, dim=16, classes=1, dtype=stored)  # without a negative, nothing to reach
    assert problem.bank()[0].dtype == stored and problem.embeddings(8, seed=1)[0].dtype == computed
    assert all(t.dtype == computed and t.isfinite().all() for t in problem.target())


@pytest.mark.long
@pytest.mark.parametrize(
    "drift, dim",
    [
        ("axbn", 64),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product(["none", "axbn", "ema"], [64, 128])
            if case != ("axbn", 64)
        ),
    ],
)
def test_moving_the_memory_leaves_the_density(dim, drift):
    problem = Problem(memory=4096, dim=dim, drift=drift)
    active = weighted_pairs(problem) / problem.memory - 1 / problem.classes
    assert problem.density / 1.5 < active < 1.5 * problem.density


@pytest.fixture
def rows_file(tmp_path):
    """Of 30 classes with 5 rows and 10 with 1, with labels that leave some out."""
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(160, 24)).astype(np.float32)
    labels = 7 + 3 * np.concatenate([np.repeat(np.arange(30), 5), np.arange(30, 40)])
    file = tmp_path / "trained.npz"
    np.savez(file, rows=3 * rows, labels=labels)
    return file


def test_rows_of_a_file(rows_file):
    recorded = Recorded(str(rows_file))
    rows, labels = recorded.batch(64, seed=1)
    originals = F.normalize(torch.from_numpy(np.load(rows_file)["rows"]), dim=1)
    assert recorded.classes == 40 and (rows @ originals.T).amax(1).min() > 1 - 1e-6
    runs = labels.unique_consecutive(return_counts=True)[1]
    assert (runs == 4).sum() >= 6 and runs.max() <= 5  # of a class with five, one is alone
    assert not torch.equal(labels, recorded.batch(64, seed=2)[1])
    rows, labels = recorded.batch(400, seed=1)
    assert torch.equal(rows[:160], rows[160:320]) and rows[:160].unique(dim=0).shape == (160, 24)
    rows, labels = recorded.memory(400, seed=1)
    assert labels.min() == 0 and labels.max() >= 80 and torch.equal(labels[:160] + 40, labels[160:320])
    s = F.cosine_similarity(rows[:160], rows[160:320])
    assert s.min() > 0.97 and s.max() < 0.9999


def test_rows_of_a_file_are_measured(rows_file, in_this_process, tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--batch", "20", "--memory", "700", "--threads", "1", "--repeats", "1", "--rows", str(rows_file)]
    main([*arguments, "--dim", "24", "--json", str(file), "--only", OURS, "eager"])
    rows, out = json.loads(file.read_text()), capsys.readouterr().out
    assert "D=24, rows of trained.npz, 40 classes" in out
    for row in rows:
        of_file = {"dim": 24, "classes": 40, "rows": "trained.npz", "density": None}
        assert of_file.items() <= row.items() and row["error"] < 1e-5
    assert len(parse(["--preset", "paper", "--rows", str(rows_file)])[1]) == 6  # two differ in D alone


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"rows": np.ones((2, 3))}, "no array labels"),
        ({"labels": np.ones(2, int)}, "no array rows"),
        ({"rows": np.ones(3), "labels": np.ones(3, int)}, "rows must be floating-point numbers [n, D]"),
        ({"rows": np.ones((2, 3), int), "labels": np.ones(2, int)}, "rows must be floating-point numbers [n, D]"),
        ({"rows": np.ones((0, 3)), "labels": np.ones(0, int)}, "rows must be floating-point numbers [n, D]"),
        ({"rows": np.ones((2, 3)), "labels": np.ones(3, int)}, "labels must be whole numbers [2]"),
        ({"rows": np.ones((2, 3)), "labels": np.ones(2)}, "labels must be whole numbers [2]"),
        ({"rows": np.full((2, 3), np.nan), "labels": np.ones(2, int)}, "rows must be finite"),
        ({"rows": np.eye(3, 4)[:, 1:], "labels": np.ones(3, int)}, "no row may be all zeros"),
        ({"rows": np.array([[None]]), "labels": np.ones(1, int)}, "allow_pickle"),
    ],
)
def test_a_file_with_something_else_in_it(arrays, words, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SystemExit):
        parse(["--rows", str(tmp_path / "x.npz")])
    message = capsys.readouterr().err
    assert f"argument --rows: {tmp_path / 'x.npz'}: " in message and words in message


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    text, cut = tmp_path / "text", tmp_path / "cut.npz"
    text.write_text("rows")
    np.savez(cut, rows=np.ones((200, 3)), labels=np.ones(200, int))
    damaged = bytearray(cut.read_bytes())
    damaged[300] ^= 1
    cut.write_bytes(damaged)
    refused = {tmp_path / "none": "No such file", tmp_path: "directory", text: "not an .npz", cut: "CRC"}
    for file, words in refused.items():
        with pytest.raises(SystemExit):
            parse(["--rows", str(file)])
        message = capsys.readouterr().err
        assert f"argument --rows: {file}: " in message and words in message


@pytest.mark.parametrize(("name", "value"), [("dim", "25"), ("classes", "9"), ("density", "0.1"), ("kernel", "memory")])
def test_what_a_file_decides_is_not_an_argument(name, value, rows_file, capsys):
    with pytest.raises(SystemExit):
        parse(["--rows", str(rows_file), f"--{name}", value])
    assert f"argument --{name if name != 'kernel' else 'rows'}: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="has rows of 24 numbers, not 25"):
        Problem(dim=25, rows=str(rows_file)).bank()


# --- What is compared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", COMPARISONS)
def test_dense_and_chunked_baselines_are_the_loss(loss):
    loss = COMPARISONS[loss].loss
    z, labels, bank, bank_labels = loss_problem(23, 331, 17, classes=12)
    labels[0] = 99  # an anchor without positives
    value, grad = run(lambda z: reference.memory_loss(z, labels, bank, bank_labels, loss), z)
    results = [run(lambda z: dense_loss(loss, (z @ bank.T).div_(bank.norm(dim=1)), labels[:, None] == bank_labels), z)]
    if can_be_chunked(loss):
        results += [chunked_loss(loss, z, labels, bank, bank_labels, rows=rows) for rows in (50, 1000)]
    for result, result_grad in results:
        assert value > 0 and error(result, value) < 1e-12 and error(result_grad, grad) < 1e-12


def test_loss_of_all_triplets_has_no_chunks():
    loss = COMPARISONS["triplet_all"].loss
    z, labels, bank, bank_labels = loss_problem(4, 9, 3)
    assert not can_be_chunked(loss)
    with pytest.raises(TypeError, match="no chunks for Triplet"):
        chunked_loss(loss, z, labels, bank, bank_labels)


@pytest.mark.singly
@pytest.mark.parametrize("drift", ["none", "xbn", "axbn", "ema"])
def test_steps_stay_together(drift):
    """Not only the first one, which every row's error is of."""
    problem = Problem(batch=20, memory=300, dim=24, classes=9, drift=drift, dtype=torch.float64)
    names = [name for name in QUICK if why_not(name, problem) is None and name != THEIRS]
    assert len(names) >= 4
    calls = {name: make(name, problem) for name in names}
    for seed in range(20):
        x, labels = problem.embeddings(problem.batch, seed)
        losses = {name: call(x, labels)[0] for name, call in calls.items()}
        for name, loss in losses.items():
            assert error(loss, losses[OURS]) < 1e-10, (name, seed)


@pytest.mark.parametrize("loss", ["contrastive", "circle"])
def test_compiled_is_tuned(loss, monkeypatch):
    """Without the time to compile."""
    for name in ("moments", "transform", "loss"):
        monkeypatch.setattr(f"benchmarks.torch_memory._compiled_{name}", getattr(torch_memory, f"_{name}"))
    problem = Problem(batch=20, memory=300, dim=24, classes=9, loss=loss, dtype=torch.float64)
    x, labels = problem.embeddings(problem.batch, seed=2)
    kinds = torch_memory.Compiled, torch_memory.TorchMemory
    a, b = (kind(*problem.bank(), problem.pair_loss, target=problem.target()) for kind in kinds)
    for results in (
        zip(a.moments(x), b.moments(x), strict=True),
        zip(a.rank(x, labels), b.rank(x, labels), strict=True),
        zip(a.step(x, labels), b.step(x, labels), strict=True),
        [(a.bank, b.bank)],
    ):
        assert all(error(one, other) < 1e-12 for one, other in results)


def test_crossover_names_the_largest_size_at_which_a_baseline_is_faster(monkeypatch):
    def timed(names, problem, rounds, copies):
        return {name: Timing(*[100.0 if name == OURS else problem.memory] * 3) for name in names}

    monkeypatch.setattr("benchmarks.crossover.timed", timed)
    problem = Problem(batch=16, memory=5000, dim=8)
    assert "up to M = 64 (eager-tuned 64.000 ms" in crossover(problem, [OURS, "eager-tuned"], 1)
    assert "xbn_ext is faster than eager-tuned at M = 128, 512, 2048" in crossover(
        replace(problem, batch=128), [OURS, "eager-tuned"], 1
    )
    assert crossover(replace(problem, kernel="moments"), [OURS, "eager-tuned"], 1) == ""


# --- The roofline -------------------------------------------------------------------------------------------------


def test_work_of_known_cases():
    problem = Problem(batch=2, memory=100, dim=8)
    loss = Work(flop=2 * 2 * 8 * (100 + 3), bytes=4 * 800 + 8 * 100 + 2 * 4 * 16 + 8 * 2)
    assert work_of(replace(problem, kernel="loss"), False, 3) == loss
    deferred = Work(loss.flop + 2 * 2 * 2 * 8, loss.bytes + 4 * 16 + 8 * 2)
    assert work_of(problem, False, 3) == deferred
    assert work_of(problem, True, 3) == Work(deferred.flop + 2 * 800, deferred.bytes + 4 * 800, True)
    assert work_of(replace(problem, kernel="transform", dtype=torch.float16), True, 0) == Work(1600, 2 * 2 * 800, True)
    assert work_of(replace(problem, kernel="moments"), False, 0) == Work(48, 64)
    assert work_of(replace(problem, kernel="normalize"), False, 0) == Work(48, 128, True)
    assert work_of(replace(problem, kernel="batch_loss"), False, 1) == Work(2 * 2 * 8 * 3, 2 * 64 + 8 * 2)
    assert work_of(replace(problem, kernel="enqueue"), False, 0) == Work(0, 2 * 4 * 16 + 2 * 8 * 2, True)


def test_bound_is_of_what_binds():
    problem = Problem()
    assert bound_of(Work(1e9, 1e6), MACHINE, problem, OURS) == Bound(10.0, "FMA")
    assert bound_of(Work(1e9, 1e6), MACHINE, replace(problem, dtype=torch.float64), OURS) == Bound(20.0, "FMA")
    assert bound_of(Work(1e9, 1e6), MACHINE, problem, "eager tf32") == Bound(1.25, "tensor")
    assert bound_of(Work(3e9, 1e6), MACHINE, problem, "tensor deferred") == Bound(11.25, "tensor")
    assert bound_of(Work(1e9, 1e9), MACHINE, problem, OURS) == Bound(50.0, "memory")
    assert bound_of(Work(1e9, 1e9, True), MACHINE, problem, OURS) == Bound(62.5, "memory")


def test_weighted_pairs_are_those_that_cost_something():
    problem = Problem(kernel="loss", batch=20, memory=300, dim=4, classes=9)
    bank, bank_labels = problem.bank()
    active = 0.0
    for x, labels in map(problem.round, range(ROUNDS)):
        s, positive = x @ bank.T, labels[:, None] == bank_labels
        active += float(torch.where(positive, s < 1, s > 0.5).sum()) / 20 / ROUNDS
    assert weighted_pairs(problem) == pytest.approx(active, rel=0.01) and 0 < active < 300
    assert weighted_pairs(replace(problem, loss="supcon")) == 300
    assert weighted_pairs(replace(problem, kernel="moments")) == 0


def test_machine_is_measured(monkeypatch):
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 20)
    machine = measure_machine("cpu", threads=1)
    assert machine.keys() == {"read", "copy", "float32", "float64"} and all(value > 0 for value in machine.values())


@pytest.mark.parametrize("float64", [False, True])
def test_peak_fma_counts_its_operations(float64):
    """The accumulators of one round are 6 x 4 vectors where there are 32 registers, else 6 x 2."""
    flop, result = torch.ops.xbn_ext._peak_fma(3, 10, float64)
    isa = build_info()["cpu_isa"].removesuffix("_vnni")
    per_round = {"avx512": 6 * 4 * 64, "avx2": 6 * 2 * 32, "baseline": 6 * 2 * 16, "neon": 6 * 4 * 16}[isa]
    assert flop == 3 * 10 * 2 * per_round / (8 if float64 else 4)
    assert result == 1


@pytest.mark.parametrize(("threads", "rounds", "name"), [(0, 1, "threads"), (1, 0, "rounds")])
def test_peak_fma_refuses(threads, rounds, name):
    with pytest.raises(RuntimeError, match=f"_peak_fma: {name} must be at least 1, got 0"):
        torch.ops.xbn_ext._peak_fma(threads, rounds, False)


# --- Times and tables ---------------------------------------------------------------------------------------------


def test_calls_take_turns():
    """Each is warmed up twice; then every round has both, and a batch of its own."""
    said = []
    timers = {name: Timer([lambda name=name: said.append(name)] * 2) for name in "ab"}
    times = interleaved(timers, 3, lambda round: said.append(str(round)))
    rounds = "".join(said).partition("0")[2].replace("bbaa", "aabb")
    assert "".join(said).startswith("aaaabbbb0") and rounds == "aabb1aabb2aabb"
    assert all(t.ms_low <= t.ms <= t.ms_high and t.samples == 3 and t.how == "wall" for t in times.values())


def test_table_with_a_column_for_each_way():
    row = {"M": 8, "way": "simt", "ms": 0.0123, "how": "graph", "roofline": 40.0}
    rows = [row, row | {"way": "auto", "ms": 1.5, "how": "events"}, {"M": 9, "way": "simt", "error": "lost"}]
    lines = table.pivot("times", rows, ["M"], "way", ["auto"])
    assert lines == ["", "times", "M       auto      simt", "8  1500* 40%  12.3 40%", "9          -     error"]
    assert table.pivot("times", [], ["M"], "way", []) == []


# --- Memory -------------------------------------------------------------------------------------------------------


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


@pytest.mark.long
def test_ranks_are_measured(tmp_path, capsys):
    shape = ["--batch", "8", "--memory", "300", "--dim", "16"]
    ranks.main(["--ranks", "2", "--shards", "2", "--repeats", "3", *shape, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    ways = ["each ranks its own rows", "also against the batch", "all rank all rows", "2 shards"]
    ways.append("the first exchange alone")
    assert [row["what"] for row in rows] == [*(f"2 processes, {way}" for way in ways), "one process, whole batch"]
    assert all(0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["memory"] == 300 for row in rows)
    # 8 rows of 16 floats and 3 integers, and 136; of the other shard 14 doubles a row, and 5 a dimension
    assert "a rank receives 2,384 bytes a step" in capsys.readouterr().out


def test_plan_of_ranks(capsys):
    rates = ["--flops", "1e12", "--bandwidth", "1e12", "--link", "1e9", "--latency", "1e-3"]
    sizes = ["--batch", "100", "--memory", "1000", "--dim", "100"]
    ranks.main(["--plan", "--ranks", "1", "2", *sizes, *rates])
    one, two = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert one == ["1", "1", "100", "0", "0", "0.0224", "0.000424"]
    # 42.5 kB at 1 GB/s and four latencies; 2 b D (M + 10 active pairs) + 2 N N D + 2 M D operations, of N = 2 b rows
    assert two == ["2", "1", "200", "0.04254", "4.043", "0.0284", "0.000424"]
    # 48.8 kB more, of sums and gradients, by four more; all rows against half of the memory, which alone is moved
    ranks.main(["--plan", "--ranks", "2", "--shards", "2", *sizes, *rates])
    assert capsys.readouterr().out.split()[-7:] == ["2", "2", "200", "0.09134", "8.091", "0.0283", "0.000212"]
