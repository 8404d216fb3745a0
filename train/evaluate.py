"""How good are embeddings? Test images query others; their classes decide which neighbours are right.

Either every image queries all the others (leave-one-out), or some images query a gallery of others. A query of whose
class there is nothing to be found has no score: it is left out of the means, and stays in the gallery of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import search
from .augment import EvaluationBatches
from .loading import plain_errors
from .ranks import ALONE, Ranks
from .search import Positions, Search

RECALLS = (1, 10, 100)
LIST_NUMBERS = 1 << 21
"""Neighbours that are looked at at a time: a chunk has fewer queries where their lists are long."""
Scores = dict[str, float]
"""Percentages: ``recall@K`` for each K, and ``map@r``."""


Network = Callable[[Tensor], Sequence[Tensor]]
"""Images uint8 [B, 3, H, W] to one or more outputs [B, *]."""


def embed(
    network: Network, batches: EvaluationBatches, device: torch.device, workers: int = 0, ranks: Ranks = ALONE
) -> list[Tensor]:
    """Each output of the network for all images: [N, *], float32 on the CPU, the same bits for any number of processes.

    These share the work by whole chunks of images: an image's output may depend, in its last bits, on how many others
    are computed with it.
    """
    chunks = ranks.parts(len(batches))
    parts = [batches.rows(of_rank) for of_rank in chunks]
    with ranks.together(), plain_errors():
        rows = parts[ranks.rank]
        own = _embed(network, batches.batches(workers, chunks[ranks.rank]), device, rows.stop - rows.start)
    shapes = ranks.leader(lambda: [output.shape[1:] for output in own])
    own = own or [torch.empty(0, *shape) for shape in shapes]  # fewer chunks than processes: rank 0 has one
    return [ranks.joined(output, parts) for output in own]


def _embed(network: Network, batches: Iterable[Tensor], device: torch.device, count: int) -> list[Tensor]:
    outputs: list[Tensor] = []
    done = 0
    with torch.inference_mode():
        for images in batches:
            parts = network(images.to(device))
            outputs = outputs or [torch.empty(count, *part.shape[1:]) for part in parts]
            for output, part in zip(outputs, parts, strict=True):
                output[done : done + len(images)] = part
            done += len(images)
    return outputs


def neighbours(
    embeddings: Tensor,
    count: int,
    where: Positions | None = None,
    *,
    queries: Positions | None = None,
    gallery: Positions | None = None,
) -> Positions:
    """The rows of the gallery most similar (cosine) to each query, best first: positions [Q, <= count].

    Args:
        embeddings: [N, D].
        count: how many; all there are where there are fewer.
        where: the queries to ask for; None: all.
        queries: as of ``evaluate``, and so is ``gallery``.
    """
    index = Search(embeddings, queries, gallery)
    where = index.queries if where is None else where
    chunk = _queries_at_a_time(min(count, index.reach))
    return np.concatenate([index(where[i : i + chunk], count) for i in range(0, len(where), chunk)])


def answers(labels: NDArray[np.int64], queries: Positions | None = None, gallery: Positions | None = None) -> Positions:
    """How many right ones there are to be found for each query, [Q]."""
    if queries is None or gallery is None:
        counts: Positions = np.bincount(labels)[labels] - 1
        return counts
    found: Positions = np.bincount(labels[gallery], minlength=int(labels.max()) + 1)[labels[queries]]
    return found


def evaluate(
    embeddings: Tensor,
    labels: NDArray[np.int64],
    *,
    queries: Positions | None = None,
    gallery: Positions | None = None,
    recalls: Sequence[int] = RECALLS,
) -> Scores:
    """Scores of embeddings.

    Recall@K: the part of queries with a right one among the first K, or among all where the gallery has fewer. MAP@R
    (Musgrave et al., arXiv 2003.08505): with R the number of right ones there are, the mean of precision@i over those
    i <= R that are right, wrong ones counting 0. Queries with R = 0 are left out of both.

    Memory holds the gallery once more, and the neighbours of a chunk of queries, as far as that chunk's largest R.

    Args:
        embeddings: [N, D], floating point.
        labels: [N], 0 or more.
        queries: positions [Q] of the rows that query; None together with ``gallery``.
        gallery: positions [G] of the rows to be found, none of them a query; None: every row queries all the others.
        recalls: each K.

    Raises:
        ValueError: an embedding is not finite, or no query has a right one to be found.
    """
    index = Search(embeddings, queries, gallery)
    wanted = answers(labels, queries, gallery)
    asked = np.flatnonzero(wanted)
    if not len(asked):
        raise ValueError("no query has an image of its class to be found")
    asked = asked[np.argsort(-wanted[asked], kind="stable")]  # lists of one length together
    first = np.empty(len(asked), np.int64)
    average = np.empty(len(asked))
    start = 0
    while start < len(asked):
        count = min(max(*recalls, int(wanted[asked[start]])), index.reach)
        chunk = slice(start, start + _queries_at_a_time(count))
        where = index.queries[asked[chunk]]
        right = labels[index(where, count)] == labels[where][:, None]
        first[chunk], average[chunk] = first_right(right), average_precision(right, wanted[asked[chunk]])
        start = chunk.stop
    scores = {f"recall@{k}": 100 * float((first < min(k, index.reach)).mean()) for k in recalls}
    return scores | {"map@r": 100 * float(average.mean())}


def first_right(right: NDArray[np.bool_]) -> Positions:
    """Of each list [n, count], where the first right one is, from 0; far beyond the list if all are wrong."""
    found: Positions = np.where(right.any(1), right.argmax(1), np.iinfo(np.int64).max)
    return found


def average_precision(right: NDArray[np.bool_], wanted: Positions) -> NDArray[np.float64]:
    """Of each list [n, count] its part in MAP@R: ``wanted`` [n] is R, 1 .. count."""
    right = right[:, : int(wanted.max())]
    rank = np.arange(1, right.shape[1] + 1)
    precision = np.cumsum(right, axis=1) / rank
    average: NDArray[np.float64] = (precision * right * (rank <= wanted[:, None])).sum(1) / wanted
    return average


def _queries_at_a_time(count: int) -> int:
    return max(1, min(search.CHUNK, LIST_NUMBERS // max(1, count)))
