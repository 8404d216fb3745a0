"""The ragged shapes that the ops are tested on, by sizes at the edges of tiles, vectors and blocks."""

from itertools import product

SIZES = [1, 7, 63, 64, 65, 257, 1000]
ROWS = [*SIZES[:-1], 520]  # of a batch or a memory where they meet: more than eight tiles, a quarter of the work
# [B, M, D]: every two sizes in every two places, by a Latin square where the largest two meet the smallest third;
PAIRS = [(ROWS[i], ROWS[j], SIZES[(5 - i - j) % 7]) for i in range(7) for j in range(7)]
# and one, one short of a tile, one more than a tile in all three.
SHAPES = sorted({*PAIRS, *product([1, 63, 65], repeat=3)})


def name(shape: tuple[int, ...]) -> str:
    return "-".join(map(str, shape))
