"""`make test` runs few of a test's sets of parameters; any two values that ever meet still do."""

import random
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from covering import covering, pairs
from selection import SELECTED, dealt
from shapes import PAIRS, ROWS, SHAPES, SIZES


def met(rows):
    return set().union(*map(pairs, rows))


def chosen_of(rows):
    return [rows[i] for i in covering(rows)]


def test_any_two_values_meet_in_few_rows():
    rows = [dict(zip("abcdefg", values, strict=True)) for values in product("123", repeat=7)]
    chosen = chosen_of(rows)
    assert met(chosen) == met(rows) and 9 <= len(chosen) <= 20  # of 2187


@pytest.mark.parametrize("seed", range(20))
def test_two_values_that_never_meet_are_not_missed(seed):
    draw = random.Random(seed)
    rows = [{column: draw.randrange(4) for column in "abcd"} for _ in range(60)]
    chosen = chosen_of(rows)
    assert met(chosen) == met(rows) and len(chosen) < len({tuple(row.values()) for row in rows})


def test_of_one_column_every_value_and_of_none_the_row():
    assert covering([{"a": 1}, {"a": 2}, {"a": 1}]) == {0, 1}
    assert covering([{}]) == {0} and covering([]) == set()


@pytest.mark.parametrize("shapes", [PAIRS, SHAPES], ids=["PAIRS", "SHAPES"])
def test_any_two_sizes_meet_in_any_two_places(shapes):
    sizes = [ROWS, ROWS, SIZES]
    for a, b in combinations(range(3), 2):
        assert {(shape[a], shape[b]) for shape in shapes} >= set(product(sizes[a], sizes[b]))


def test_what_make_test_runs_leaves_no_two_values_apart(request):
    """Of all tests collected with this one. A few sets of parameters are marked long by hand."""
    quick, every = {}, {}
    for test, columns, marked, drawn in request.config.stash[SELECTED]:
        if not marked:
            every.setdefault(test, []).append(columns)
            if drawn:
                quick.setdefault(test, []).append(columns)
    assert any(test.endswith("two_values_that_never_meet_are_not_missed") for test in every)
    for test, sets in every.items():
        assert met(quick.get(test, [])) == met(sets), test


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_worker_begins_with_what_takes_longest(workers):
    names = [("test_a.py", 40), ("test_sanitizers.py", 2), ("test_train_run.py", 30)]
    items = [
        SimpleNamespace(path=Path(name), originalname="test_cuda_kernels" if "sanitizers" in name else "test_x", i=i)
        for name, count in names
        for i in range(count)
    ]
    order = dealt(items, workers)
    assert sorted(map(id, order)) == sorted(map(id, items))
    shares = [order[len(items) * worker // workers :] for worker in range(min(workers, 2))]
    assert all(share[0].originalname == "test_cuda_kernels" for share in shares)
    others = [item.path.name for item in order if item.path.name != "test_sanitizers.py"]
    assert others == ["test_train_run.py"] * 30 + ["test_a.py"] * 40
