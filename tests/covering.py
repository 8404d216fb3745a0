"""Some of many rows of a table, in which any two (or three) values meet that meet in one of all rows."""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

Row = Mapping[str, Hashable]  # {column: value}


def met(row: Row, together: int = 2) -> set[Hashable]:
    """What a row is there for: any so many of its values, or all if it has fewer."""
    return set(combinations(sorted(row.items(), key=lambda item: item[0]), min(together, len(row))))


def covering(rows: Sequence[Row], together: int = 2) -> set[int]:
    """Indices of some rows, in which all is met that is met in any. Greedy: always the row with most that is new. Of
    those it is the first, so the order of rows is that of preference."""
    missing = [met(row, together) for row in rows]
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
