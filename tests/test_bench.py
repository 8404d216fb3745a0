"""The benchmark runs, its implementations agree, and a step stays within its memory budget."""

import json

import pytest

from xbn_ext.bench.__main__ import main
from xbn_ext.bench.baselines import IMPLEMENTATIONS
from xbn_ext.bench.measure import peak_extra_megabytes
from xbn_ext.bench.problem import Problem


def test_command(tmp_path, capsys):
    names = [name for name in IMPLEMENTATIONS if name != "compile"]  # compiling takes longer than all other tests
    file = tmp_path / "rows.json"
    main(["--batch", "20", "--memory", "700", "--dim", "33", "--classes", "30", "--threads", "1", "--repeats", "2",
          "--json", str(file), "--only", *names])  # fmt: skip
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


@pytest.mark.parametrize("argument", [["--batch", "0"], ["--only", "magic"], ["--memory", "many"]])
def test_bad_arguments(argument, capsys):
    with pytest.raises(SystemExit):
        main(argument)
    assert argument[0] in capsys.readouterr().err
