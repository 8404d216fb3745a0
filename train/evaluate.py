"""How good are embeddings? Every test image queries all the others; its class decides which neighbours are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RECALLS = (1, 10, 100)
Scores = dict[str, float]
"""Percentages: ``recall@1``, ``recall@10``, ``recall@100``, ``map@r``."""


Network = Callable[[Tensor], Sequence[Tensor]]
"""Images uint8 [B, 3, H, W] to one or more outputs [B, *]."""


def embed(network: Network, batches: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Each output of the network over all batches, [N, *], float32 on the CPU."""
    with torch.inference_mode():
        outputs = [[out.float().cpu() for out in network(images.to(device))] for images in batches]
    return [torch.cat(column) for column in zip(*outputs, strict=True)]


def neighbours(embeddings: Tensor, count: int) -> NDArray[np.int64]:
    """The ``count`` rows most similar (cosine) to each row of [N, D], best first, the row itself left out: [N, count].

    A row is left out by its number, not by its similarity: a copy of it under another number stays.
    """
    if not bool(embeddings.isfinite().all()):
        raise ValueError("the network gives embeddings that are not finite")
    rows = torch.nn.functional.normalize(embeddings.float(), dim=1).numpy()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index: faiss.Index = faiss.IndexFlatIP(rows.shape[1])
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(rows)
    _, found = index.search(rows, count + 1)
    other = found != np.arange(len(rows))[:, None]
    other[other.all(1), -1] = False  # copies of the row have pushed it off the list: drop the last instead
    nearest: NDArray[np.int64] = found[other].reshape(len(rows), count)
    return nearest


def score(found: NDArray[np.int64], labels: NDArray[np.int64]) -> Scores:
    """Scores of neighbour lists [N, count], which must reach as far as the largest class has other members.

    Recall@k: the part of queries with a right one among the first k. MAP@R (Musgrave et al., arXiv 2003.08505): with R
    the number of right ones there are, the mean of precision@i over those i <= R that are right, wrong ones counting 0.
    """
    right = labels[found] == labels[:, None]
    wanted = np.bincount(labels)[labels] - 1
    if (wanted < 1).any() or wanted.max() > found.shape[1]:
        raise ValueError(f"classes must have 2 .. {found.shape[1] + 1} images here")
    rank = np.arange(1, found.shape[1] + 1)
    precision = np.cumsum(right, axis=1) / rank
    average = (precision * right * (rank <= wanted[:, None])).sum(1) / wanted
    scores = {f"recall@{k}": 100 * float(right[:, :k].any(1).mean()) for k in RECALLS}
    return scores | {"map@r": 100 * float(average.mean())}


def evaluate(embeddings: Tensor, labels: NDArray[np.int64]) -> tuple[Scores, NDArray[np.int64]]:
    """Scores of embeddings [N, D] with labels [N], and the neighbour lists behind them."""
    far_enough = max(*RECALLS, int(np.bincount(labels).max()) - 1)
    found = neighbours(embeddings, min(far_enough, len(labels) - 1))
    return score(found, labels), found
