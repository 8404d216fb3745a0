"""How good are embeddings? Test images query others; their classes decide which neighbours are right.

Either every image queries all the others, or some images query a gallery; a query never finds itself. A query that has
nothing of its class to find has no score: it is left out of the means, and stays in the gallery of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import xbn_ext

from . import index
from .augment import EvaluationBatches
from .index import Index, Positions
from .loading import plain_errors
from .ranks import ALONE, Ranks

RECALLS = (1, 10, 100)
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
    found = Index(embeddings, queries, gallery)
    where = found.queries if where is None else where
    chunks = (where[first : first + index.CHUNK] for first in range(0, len(where), index.CHUNK))
    return np.concatenate([found(chunk, count) for chunk in chunks])


def answers(labels: NDArray[np.int64], queries: Positions | None = None, gallery: Positions | None = None) -> Positions:
    """How many right ones there are to be found for each query, [Q]."""
    if queries is None or gallery is None:
        counts: Positions = np.bincount(labels)[labels] - 1
        return counts
    found: Positions = np.bincount(labels[gallery], minlength=int(labels.max()) + 1)[labels[queries]]
    return found - np.isin(queries, gallery)


def evaluate(
    embeddings: Tensor,
    labels: NDArray[np.int64],
    *,
    queries: Positions | None = None,
    gallery: Positions | None = None,
    recalls: Sequence[int] = RECALLS,
) -> Scores:
    """Scores of embeddings.

    ``recall@K`` and ``map@r`` are those of ``xbn_ext.evaluate``, in per cent.

    Args:
        embeddings: [N, D], floating point.
        labels: [N].
        queries: positions [Q] of the rows that query; None together with ``gallery``.
        gallery: positions [G] of the rows to be found, a query never by itself; None: every row queries all the others.
        recalls: each K.

    Raises:
        ValueError: an embedding is not finite, or no query has a right one to be found.
    """
    classes = torch.from_numpy(labels)
    if queries is None or gallery is None:
        found = xbn_ext.evaluate(embeddings, classes, ks=recalls)
    else:
        rows, others = torch.from_numpy(queries), torch.from_numpy(gallery)
        asked, searched = (embeddings[rows], classes[rows]), (embeddings[others], classes[others])
        found = xbn_ext.evaluate(*asked, *searched, ks=recalls, ids=rows, gallery_ids=others)
    recall = {f"recall@{k}": 100 * found[f"recall_at_{k}"] for k in recalls}
    return recall | {"map@r": 100 * found["mean_average_precision_at_r"]}
