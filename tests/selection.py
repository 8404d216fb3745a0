"""Which tests run: of a test's sets of parameters `make test` takes so many that any two values meet that ever do (of a
test marked singly, that each value occurs), and `make test-all` (pytest's `--all`) so many that one more meets: any
three, or two.

What only the latter takes is marked long.
"""

import zlib
from itertools import groupby

import pytest
from covering import covering

SELECTED = pytest.StashKey()  # [(test, how many meet, its columns, is it marked long by hand, was it drawn)]


def is_long(item):
    return item.get_closest_marker("long") is not None


def test_of(item):
    return item.nodeid.partition("[")[0]


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def columns(item):
    """{parameter: value, as text}. Sizes in a shape are parameters of their own."""
    found = {}
    for name, value in parameters(item).items():
        if name == "shape":
            found |= {f"size {place}": str(size) for place, size in enumerate(value)}
        else:
            found[name] = repr(value)
    return found


def goes_this_way(item):
    """False where the loss would silently go another way."""
    params = parameters(item)
    path = params.get("implementation", ("", ""))[1]
    if path in ("tensor", "simt", "halves") and getattr(params.get("loss"), "formula", None) == "triplet_all":
        return False
    by_fours = params.get("D", 4) % 4 == 0 and params.get("shape", (4,))[-1] % 4 == 0
    return by_fours or path not in ("tensor", "screen", "halves", "pairs")


def together(item):
    """How many values of its test `make test` lets meet."""
    return 1 if item.get_closest_marker("singly") else 2


def drawn(items, together):
    """A set of the items in which any so many parameter values meet that meet in any of a test's items; `together` says
    of an item how many. Of equally good sets of parameters, the first is taken in an order decided by their names."""
    shuffled = sorted(items, key=lambda item: (test_of(item), zlib.crc32(item.nodeid.encode())))
    chosen = set()
    for _, group in groupby(shuffled, key=test_of):
        sets = list(group)
        chosen.update(sets[i] for i in covering([columns(item) for item in sets], together(sets[0])))
    return chosen


def select(config, items, every):
    """The items that `make test` runs; or every item that is ever run, where those of `make test-all` alone get the
    mark for it."""
    possible = [item for item in items if goes_this_way(item)]
    quick = drawn([item for item in possible if not is_long(item)], together)
    kept = quick
    if every:
        kept = quick | drawn(possible, lambda item: together(item) + 1)
    config.stash[SELECTED] = [
        (test_of(item), together(item), columns(item), is_long(item), item in quick) for item in possible
    ]
    for item in kept - quick:
        if not is_long(item):
            item.add_marker(pytest.mark.long)
    return [item for item in possible if item in kept]


def in_train(item):
    return item.path.name.startswith("test_train_")


def dealt(items, workers):
    """The items in an order where every worker begins with CUDA kernels under sanitizers, minutes each, side by
    side: in the end nothing waits for them. `--dist worksteal` gives each worker a run of the items to begin with, and
    takes from the end of one: tests of train come first, so that one worker makes what a whole module shares."""
    long = [item for item in items if item.originalname == "test_cuda_kernels"]
    others = sorted((item for item in items if item not in long), key=lambda item: not in_train(item))
    order = []
    for worker in range(workers):
        its_own = long[worker::workers]
        share = (len(items) - len(order)) // (workers - worker)
        rest = max(share - len(its_own), 0)
        order += its_own + others[:rest]
        del others[:rest]
    return order
