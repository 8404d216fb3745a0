"""Times of calls that take turns, and the tables that show them."""

from benchmarks import scaling, table
from benchmarks.clock import Timer, interleaved
from benchmarks.comparisons import OURS


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


def test_efficiency_is_of_the_least_number_of_threads():
    rows = [{"implementation": OURS, "memory": 8, "threads": n, "ms": ms} for n, ms in ((4, 2.0), (2, 3.0), (8, None))]
    scaling.add_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [75, 100, None]
    lines = scaling.efficiency_table(rows).splitlines()[1:]
    assert lines[0].startswith("efficiency in %: 2 x time at 2 /")
    assert lines[2].split() == ["8", OURS, "100", "75", "-"]
