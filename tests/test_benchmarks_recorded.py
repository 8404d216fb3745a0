"""The rows that the benchmarks read from a file, `--rows`, and what may be wrong with one."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.__main__ import main, parse
from benchmarks.comparisons import OURS
from benchmarks.problem import Problem
from benchmarks.recorded import Recorded


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


def test_one_file_is_not_written_over_another(rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.can_plot", lambda: True)
    (tmp_path / "rows.png").symlink_to(rows_file)
    for first, second in (("--json", "--plot"), ("--rows", "--json"), ("--rows", "--plot")):
        file = str(rows_file) if first == "--rows" else str(tmp_path / "x.png")
        other = str(tmp_path / "rows.png") if first == "--rows" else file
        with pytest.raises(SystemExit):
            parse([first, file, second, other])
        assert f"argument {second}: {other} is the file of {first}" in capsys.readouterr().err
