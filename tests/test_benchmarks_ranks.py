"""Benchmarks of many processes: what they measure, and what they plan for."""

import json

import pytest

from benchmarks import ranks


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
