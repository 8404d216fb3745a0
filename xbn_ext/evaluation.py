"""How good are embeddings? Each row queries a gallery, a chunk of queries at a time; `scores.py` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, scores
from ._autograd import without_autocast

CHUNK_BYTES_ON_CPU, CHUNK_BYTES_ELSEWHERE = 1 << 26, 1 << 29
NUMBERS_OF_A_PAIR = 3
"""How many numbers, of the dtype of the product, a pair of a chunk takes: the product, with and without copies of a
row, and what orders it."""
BYTES_OF_A_PLACE = 48
"""What a place of a query's list takes: the rows of its class, and the list while it is scored."""
SOME_ROWS = 4096
"""That are scaled at a time."""


class _Alike(NamedTuple):
    """Of each query the rows of the gallery that have its number, be it of a class or of a sample."""

    order: Tensor
    """The rows of the gallery by their numbers, `[G]`; each query's are consecutive."""
    first: Tensor
    """Where those of a query begin, `[Q]`."""
    many: Tensor
    """How many it has, `[Q]`."""

    @classmethod
    def of(cls, queries: Tensor, gallery: Tensor) -> _Alike:
        """Of integers `[Q]` and `[G]`."""
        ascending, order = gallery.sort()
        first = torch.searchsorted(ascending, queries)
        return cls(order, first, torch.searchsorted(ascending, queries, right=True) - first)

    def rows(self, some: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Of some queries `[q]`: positions in the gallery `[q, most]`, all different, and which of them are meant."""
        place = torch.arange(most, device=some.device)
        where = (self.first[some, None] + place).remainder_(max(len(self.order), 1))
        return self.order[where], place < self.many[some, None]


@torch.no_grad()
def evaluate(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 10, 100, 1000),
    ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> dict[str, float]:
    """Scores of embeddings in a search by cosine similarity: every row queries all the others, or those of a gallery.

    - `recall_at_k`, for each of `ks`: the part of the queries with a row of their class among the k most similar, or
      among all, where there are fewer.
    - `precision_at_1`: the part of the queries whose most similar row is of their class.
    - `r_precision`, `mean_average_precision_at_r`: with R the number of rows of the query's class, how many of the R
      most similar rows are of that class, divided by R; and the sum of precision@i over those of these R places i whose
      row is of that class, divided by R ([Musgrave et al.](https://arxiv.org/abs/2003.08505)).

    Each is a mean over the queries with R > 0; a query of whose class there is nothing to be found has no score, and
    is in the gallery of the others. Copies of a row, too, are to be found, unless they have its id. Of rows of length 1
    the values are those of pytorch-metric-learning's `AccuracyCalculator`.

    A row of another class that is exactly as similar as one of the query's class comes before it. This holds of copies,
    so that embeddings that are all the same score lowest. It holds of integers of length 64 at most (8,192 in float64),
    also times a power of two; of those of one length, such as codes of ±1 with up to 4,096 bits, the order is exact,
    while cosines that differ by 1e-7 of themselves or less (2e-16) may count as equal. Otherwise rows are as similar
    as computed: of two that differ by rounding alone either comes first, by their order and `chunk_bytes`.

    The Q×G similarities are never stored: there are a copy of what is given, and what one chunk of queries takes.
    Products are float32, or float64 if the embeddings are. Autocast does not round them, TF32 does.

    Examples:
        >>> evaluate(embeddings, labels)["mean_average_precision_at_r"]
        >>> evaluate(queries, query_labels, gallery, gallery_labels, ks=(1, 10, 20, 30, 40, 50))

    Args:
        embeddings: the queries, `[Q, D]`, of any floating-point dtype and length, on any device that has float64.
        labels: their classes, integers `[Q]`, not uint64.
        gallery: the rows to be found, `[G, D]`, on the same device. None: all rows but the query itself.
        gallery_labels: their classes, integers `[G]`.
        ks: each k of Recall@k.
        ids: which sample each query is, integers `[Q]`. A row of the gallery with the same id is left out of the
            query's search, as if it were not there: the query itself, where it is in the gallery, or another view of
            its image. A negative id means that the row has none.
        gallery_ids: those of the gallery, integers `[G]`.
        chunk_bytes: what a chunk of queries may take. One query, which is the least, takes 12·G bytes (24·G in
            float64) and 48 for each row of its class. None: 64 MB on a CPU, 512 MB elsewhere.

    Returns:
        Each score by its name, from 0 to 1.

    Raises:
        TypeError: an argument is no tensor of its kind.
        ValueError: shapes, devices or numbers do not fit; a row is NaN or Inf; or no query has a row of its class.
    """
    checks.search(embeddings, labels, gallery, gallery_labels, ids, gallery_ids)
    try:
        ks = [checks.whole("ks", k, 1) for k in ks]
    except TypeError:
        raise TypeError(f"ks must be a sequence of integers, got {checks.kind(ks)}") from None
    device = embeddings.device
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES_ON_CPU if device.type == "cpu" else CHUNK_BYTES_ELSEWHERE
    chunk_bytes = checks.whole("chunk_bytes", chunk_bytes, 1)

    wide = any(rows is not None and rows.dtype == torch.float64 for rows in (embeddings, gallery))
    dtype = torch.float64 if wide else torch.float32
    queries = found = _scaled_rows("embeddings", embeddings, dtype)
    if gallery is not None:
        found = _scaled_rows("gallery", gallery, dtype)
    numbers = _numbered(device, labels, gallery_labels)
    samples = _numbered(device, *_samples(device, ids, gallery_ids, len(queries), gallery))
    both = (
        of_class * (len(queries) + len(found)) + of_sample for of_class, of_sample in zip(numbers, samples, strict=True)
    )
    same_class, same_sample = _Alike.of(*numbers), _Alike.of(*samples)
    wanted = same_class.many - _Alike.of(*both).many
    with without_autocast(device.type):
        chunks = list(_chunks(queries, found, same_class, same_sample, wanted, chunk_bytes))
    if not chunks:
        raise ValueError("labels: no query has a row of its class to be found")
    ahead, precision, average = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return {
        **{f"recall_at_{k}": scores.recall(ahead, k) for k in ks},
        "precision_at_1": scores.recall(ahead, 1),
        "r_precision": float(precision.mean()),
        "mean_average_precision_at_r": float(average.mean()),
    }


def _chunks(
    queries: Tensor, gallery: Tensor, same_class: _Alike, same_sample: _Alike, wanted: Tensor, chunk_bytes: int
) -> Iterator[tuple[Tensor, ...]]:
    """Of some queries after the other: how many wrong rows come before the first right one, R-precision, and the part
    in MAP@R."""
    distinct, copy_of = _distinct(gallery)
    squares = torch.cat([some.square().sum(1) for some in distinct.split(SOME_ROWS)])
    if copy_of is not None:
        squares = squares[copy_of]
    asked = wanted.nonzero()[:, 0]
    asked = asked[same_class.many[asked].argsort(descending=True, stable=True)]  # lists of one length together
    lengths = same_class.many[asked].tolist()
    of_a_sample = int(same_sample.many.max()) if lengths else 0
    pairs = NUMBERS_OF_A_PAIR * gallery.element_size() * len(gallery)
    start = 0
    while start < len(lengths):
        bytes_of_a_query = pairs + BYTES_OF_A_PLACE * (lengths[start] + of_a_sample)
        some = asked[start : start + max(1, chunk_bytes // bytes_of_a_query)]
        products = queries[some] @ distinct.T
        if copy_of is not None:
            products = products[:, copy_of]
        keys = _in_order(products, squares)
        right, ahead = _ranked(keys, same_class.rows(some, lengths[start]), same_sample.rows(some, of_a_sample))
        yield ahead, scores.r_precision(right, wanted[some]), scores.average_precision(right, wanted[some])
        start += len(some)


def _ranked(keys: Tensor, of_class: tuple[Tensor, Tensor], of_sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Which of the most similar rows are right, bool, best first, as many as `of_class` has places; and how many wrong
    ones come before the first right one; there must be one. Overwrites the keys `[q, G]`, which can be doubled."""
    keys.mul_(2)  # even: wrong
    rows, there = of_class
    keys.scatter_(
        1, rows, keys.gather(1, rows).sub_(there.to(keys.dtype))
    )  # odd: right, so a wrong one as similar is first
    left_out, meant = of_sample
    least = torch.iinfo(keys.dtype).min  # behind all others, as a wrong one
    keys.scatter_(1, left_out, keys.gather(1, left_out).masked_fill_(meant, least))
    nearest = keys.gather(1, rows).masked_fill_(~there, least).amax(1, keepdim=True)
    right = keys.topk(rows.shape[1]).values.bitwise_and_(1) == 1
    return right, (keys > nearest).sum(1)


def _in_order(products: Tensor, squares: Tensor) -> Tensor:
    """Overwrites products `[q, G]` of queries with rows of these squared lengths `[G]`, all of length 1 at most, with
    integers of the same size in the order of the cosines, which can be doubled. What is divided is the square of the
    product: of small integers it is exact, and so is the square of a length, which a length is not, so that equal
    cosines give equal quotients. The length of the query changes no order. In float32 a cosine below 1e-23 is 0."""
    bits = products.view(_integers_like(products))
    negative = bits >> torch.iinfo(bits.dtype).bits - 1  # -1 or 0
    products.square_().div_(squares.clamp(min=torch.finfo(products.dtype).tiny))  # below 2, and not negative
    return bits.bitwise_xor_(negative).sub_(negative)


def _integers_like(numbers: Tensor) -> torch.dtype:
    """Integers that have the bits of the numbers: of those that are not negative they are in the same order."""
    return torch.int64 if numbers.dtype == torch.float64 else torch.int32


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows without copies of each other, and which of them each is; None: there are no copies. In a product of matrices
    two columns that are the same may be rounded differently, by where they are."""
    G = len(rows)
    draw = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, rows.shape[1:], generator=draw, device="cpu").to(rows.device)
    kind = _integers_like(rows)
    hashes = [(some + 0.0).view(kind).long().mul_(weights).sum(1) for some in rows.split(SOME_ROWS)]  # of -0 as of 0
    if not hashes:
        return rows, None
    kinds, of_rows = torch.cat(hashes).unique(return_inverse=True)
    if len(kinds) == G:
        return rows, None
    numbers = torch.arange(G, device=rows.device)
    first = numbers.new_full(kinds.shape, G).scatter_reduce_(0, of_rows, numbers, "amin")[of_rows]
    parts = zip(rows.split(SOME_ROWS), first.split(SOME_ROWS), strict=True)
    same = torch.cat([(some == rows[its]).all(1) for some, its in parts])
    chosen, copy_of = torch.where(same, first, numbers).unique(return_inverse=True)
    return rows[chosen], copy_of


def _samples(
    device: torch.device, ids: Tensor | None, gallery_ids: Tensor | None, Q: int, gallery: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Which sample each of Q queries and each row of the gallery is, which is None where the queries are it."""
    known = None if ids is None else ids.long()  # torch compares no uint16 and no uint32
    if gallery is None:
        own = -1 - torch.arange(Q, device=device if known is None else known.device)
        return (own if known is None else torch.where(known < 0, own, known)), None
    if known is None or gallery_ids is None:
        return torch.full((Q,), -1, device=device), torch.full((len(gallery),), -2, device=device)
    found = gallery_ids.long()
    return known.clamp(min=-1), torch.where(found < 0, -2, found)


def _numbered(device: torch.device, of_queries: Tensor, of_gallery: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same numbers, counted from 0; those of the queries twice, where they are the gallery."""
    both = of_queries.to(device, torch.int64)
    if of_gallery is not None:
        both = torch.cat([both, of_gallery.to(device, torch.int64)])
    numbers = torch.unique(both, return_inverse=True)[1]
    Q = len(of_queries)
    return numbers[:Q], numbers[:Q] if of_gallery is None else numbers[Q:]


def _scaled_rows(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """In a copy, divided by powers of two, which rounds nothing, so that lengths are within [1/2, 1], however long or
    short the rows are; or 0. Raises ValueError for one that is not finite."""
    scaled = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    largest = scaled.new_empty(len(rows), 1)
    for some, some_scaled, size in zip(*(t.split(SOME_ROWS) for t in (rows, scaled, largest)), strict=True):
        torch.amax(some.to(dtype).abs(), 1, keepdim=True, out=size)
        some_scaled.copy_(some).div_(_power_of_two(size))  # so that no square overflows
        some_scaled.div_(2 * _power_of_two(some_scaled.norm(dim=1, keepdim=True)))
    bad = (~largest.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"{name} must be finite: row {int(bad[0, 0])} has NaN or Inf")
    return scaled


def _power_of_two(numbers: Tensor) -> Tensor:
    """The largest one that each number, which is not negative, is not below; at least the smallest normal one."""
    exponent = torch.full_like(numbers, math.inf).view(_integers_like(numbers))  # all bits of it, and no others
    power = numbers.view(exponent.dtype).bitwise_and(exponent).view(numbers.dtype)
    return power.clamp(min=torch.finfo(numbers.dtype).tiny)
