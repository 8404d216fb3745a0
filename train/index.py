"""Nearest neighbours by cosine similarity, a chunk of queries at a time: no matrix of all similarities ever exists."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Positions = NDArray[np.int64]
"""[N], rows of the embeddings."""
CHUNK = 4096
"""Rows that are normalised, added or searched at a time."""


class Index:
    """An exact index of the gallery, asked for the neighbours of queries."""

    def __init__(self, embeddings: Tensor, queries: Positions | None = None, gallery: Positions | None = None) -> None:
        """Normalise and index the gallery.

        Args:
            embeddings: [N, D], floating point, any length.
            queries: positions of the rows to be asked for; None together with ``gallery``.
            gallery: positions of the rows to be found; None: every row queries all the others.

        Raises:
            ValueError: a row of the gallery is not finite (one of a query: when it is asked for).
        """
        if (queries is None) != (gallery is None):
            raise ValueError("queries and gallery go together")
        self.embeddings = embeddings
        every = np.arange(len(embeddings), dtype=np.int64)
        self.queries: Positions = every if queries is None else queries
        self.gallery: Positions = every if gallery is None else gallery
        self.leaves_one_out = bool(np.isin(self.queries, self.gallery).any())
        self.reach = max(0, len(self.gallery) - self.leaves_one_out)
        """How long a list is at most: all of the gallery, less the query itself where one is in it."""
        self._flat: faiss.Index = faiss.IndexFlatIP(embeddings.shape[1])
        faiss.omp_set_num_threads(torch.get_num_threads())
        for first in range(0, len(self.gallery), CHUNK):
            self._flat.add(self._rows(self.gallery[first : first + CHUNK]))

    def _rows(self, where: Positions) -> NDArray[np.float32]:
        rows = self.embeddings[torch.from_numpy(where)].float()
        if not bool(rows.isfinite().all()):
            raise ValueError("the network gives embeddings that are not finite")
        normalised: NDArray[np.float32] = torch.nn.functional.normalize(rows, dim=1).numpy()
        return normalised

    def __call__(self, where: Positions, count: int) -> NDArray[np.int64]:
        """The gallery rows most similar to the queries ``where`` [n], best first: positions [n, min(count, reach)].

        A query that is in the gallery is left out by its number, not by its similarity: a copy of it under another
        number stays.
        """
        wanted = min(count, self.reach) + self.leaves_one_out
        _, found = self._flat.search(self._rows(where), wanted)
        nearest: NDArray[np.int64] = self.gallery[found]
        if self.leaves_one_out:
            other = nearest != where[:, None]
            other[other.all(1), -1] = False  # it is not on the list: drop the last instead
            nearest = nearest[other].reshape(len(where), wanted - 1)
        return nearest
