"""`make test` runs few of a test's sets of parameters; any two values that ever meet still do."""

import random
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from covering import covering, met
from selection import SELECTED, dealt
from shapes import PAIRS, ROWS, SHAPES, SIZES


def all_met(rows, together=2):
    return {values for row in rows for values in met(row, together)}


@pytest.mark.parametrize(("together", "least", "most"), [(2, 9, 20), (3, 27, 70)])
def test_any_values_meet_in_few_rows(together, least, most):
    rows = [dict(zip("abcdefg", values, strict=True)) for values in product("123", repeat=7)]
    chosen = [rows[i] for i in covering(rows, together)]
    assert all_met(chosen, together) == all_met(rows, together) and least <= len(chosen) <= most  # of 2187


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_values_that_never_meet_are_not_missed(seed, together):
    draw = random.Random(seed)
    rows = [{column: draw.randrange(4) for column in "abcd"} for _ in range(200)]
    chosen = [rows[i] for i in covering(rows, together)]
    assert all_met(chosen, together) == all_met(rows, together)
    assert len(chosen) < len({tuple(row.values()) for row in rows})


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
    for test, together, columns, marked, drawn in request.config.stash[SELECTED]:
        if not marked:
            every.setdefault((test, together), []).append(columns)
            if drawn:
                quick.setdefault((test, together), []).append(columns)
    assert any(test.endswith("test_values_that_never_meet_are_not_missed") for test, _ in every)
    for (test, together), sets in every.items():
        assert all_met(quick.get((test, together), []), together) == all_met(sets, together), test


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
