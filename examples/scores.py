"""Recall@1, the score of all examples."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def recall(queries: Tensor, gallery: Tensor, right: Tensor) -> float:
    """How often the row of the gallery [G, D] most similar to a query [Q, D] is the right one, `right` [Q]; in %."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    return 100 * (similarity.argmax(1) == right).float().mean().item()
