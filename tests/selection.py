"""Which tests run: of each `make test` takes few sets of parameters, `make test-all` (pytest's `--all`) all.

Of a test's sets of parameters enough are taken for any two values to meet that ever do. The others are marked long.
"""

import re
import zlib
from itertools import groupby

import pytest
from covering import covering

MANY_SETS = 40  # of parameters of one test
SELECTED = pytest.StashKey()  # [(test, its columns, is it marked long by hand, was it drawn)]


def is_long(item):
    return item.get_closest_marker("long") is not None


def test_of(item):
    return item.nodeid.partition("[")[0]


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def columns(item):
    """{parameter: value, as text}. Sizes in a shape are parameters of their own; the implementation and the dtype are
    one, so that each loss meets each dtype on each of them."""
    found = {}
    for name, value in parameters(item).items():
        if name == "shape":
            found |= {f"size {place}": str(size) for place, size in enumerate(value)}
        elif name == "dtype" and "implementation" in parameters(item):
            found["implementation"] = f"{parameters(item)['implementation']} {value}"
        else:
            found.setdefault(name, repr(value))
    return found


def goes_this_way(item):
    """False where the loss would silently go another way."""
    params = parameters(item)
    path = params.get("implementation", ("", ""))[1]
    if path in ("tensor", "simt") and getattr(params.get("loss"), "formula", None) == "triplet_all":
        return False
    by_fours = params.get("D", 4) % 4 == 0 and params.get("shape", (4,))[-1] % 4 == 0
    return by_fours or path not in ("tensor", "screen", "pairs")


def few(items):
    """A set of the items in which every pair of parameter values that occurs in any of a test's items still occurs.
    Among equally good sets of parameters, those come first that are first in an order decided by their names."""
    shuffled = sorted(items, key=lambda item: (test_of(item), zlib.crc32(item.nodeid.encode())))
    chosen = set()
    for _, group in groupby(shuffled, key=test_of):
        sets = list(group)
        chosen.update(sets[i] for i in covering([columns(item) for item in sets]))
    return chosen


def many(items):
    """The items, as a set. Where a test has many sets of parameters, each is executed on the CPU by one of the ways and
    dtypes only, drawn by its name: the fuzz of test_sanitizers takes all ways, a GPU all of both. Plain PyTorch,
    which has no tiles and no ways, takes few of many sets."""
    ways = {}  # by test and set of parameters
    plain = {}  # by test
    for item in items:
        name, path = parameters(item).get("implementation", ("", ""))
        if name == "emu" and path != "auto":
            one_set = re.sub(rf"{name}-{path}(-f..)?", "", item.nodeid)
            ways.setdefault(test_of(item), {}).setdefault(one_set, []).append(item)
        if name == "plain":
            plain.setdefault(test_of(item), []).append(item)
    left_out = set()
    for sets in ways.values():
        for one_set, its_items in sets.items() if len(sets) > MANY_SETS else ():
            left_out.update(its_items)
            left_out.remove(its_items[zlib.crc32(one_set.encode()) % len(its_items)])
    for its_items in plain.values():
        if len(its_items) > MANY_SETS:
            left_out.update(its_items)
    return {item for item in items if item not in left_out}


def select(config, items):
    """The items that are ever run; those among them that only `make test-all` runs get the mark for it."""
    possible = [item for item in items if goes_this_way(item)]
    drawn = few([item for item in possible if not is_long(item)])
    kept = drawn | many(possible)
    config.stash[SELECTED] = [(test_of(item), columns(item), is_long(item), item in drawn) for item in possible]
    for item in kept - drawn:
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
