"""A few of many rows of a table, such that any two values that meet in one of all rows meet in one of these, too."""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Row = Mapping[str, Hashable]  # {column: value}


def pairs(row: Row) -> set[Hashable]:
    """What a row is there for: every two of its values, or the only one."""
    return set(combinations(sorted(row.items(), key=lambda item: item[0]), 2 if len(row) > 1 else 1))


def covering(rows: Sequence[Row]) -> set[int]:
    """Indices of some rows, that contain all pairs of all rows. Greedy: always the row with the most new ones, and of
    those the first, so the order of rows is that of preference."""
    missing = [pairs(row) for row in rows]
    new = [(-len(row), i) for i, row in enumerate(missing)]
    heapq.heapify(new)
    seen: set[Hashable] = set()
    chosen = set()
    while new:
        before, i = heapq.heappop(new)
        missing[i] -= seen
        if missing[i] and -before > len(missing[i]):  # others were chosen since it was counted
            heapq.heappush(new, (-len(missing[i]), i))
        elif missing[i] or not rows[i]:
            chosen.add(i)
            seen |= missing[i]
    return chosen
