"""Arguments of the benchmarks: one that cannot be is named before anything is measured; presets give way to others."""

import pytest
import torch

from benchmarks import options
from benchmarks.__main__ import main, parse


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
