"""MoCo (He et al. 2020, arXiv 1911.05722): learn from pictures without labels.

Two distorted views of a picture are a positive pair; all other pictures are negatives. One view, the query, is embedded
by the network that learns. The other, the key, is embedded by a copy that follows slowly, the momentum encoder. The
memory is MoCo's queue: it holds the keys of past batches, and only keys enter it.

    python -m examples.moco
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import xbn_ext

from . import pictures

STEPS, BATCH = 200, 64
QUEUE = 512  # fewer than there are pictures, so a picture's old key has mostly left when the picture comes again
MOMENTUM, TEMPERATURE = 0.99, 0.2


def found(network: nn.Module, images: Tensor, views: Tensor) -> float:
    """How often the picture nearest to a view is the one that it was made of (Recall@1), in per cent."""
    queries, gallery = pictures.embed(network, views), pictures.embed(network, images)
    which = torch.arange(len(images))
    return 100 * xbn_ext.evaluate(queries, which, gallery, which)["precision_at_1"]


def main(seed: int = 0) -> tuple[float, float]:
    """Recall@1 of pictures that were not trained on, before and after."""
    torch.manual_seed(seed)
    data = pictures.load()
    images, _ = pictures.tensors(data.train)  # the labels are not used
    unseen, _ = pictures.tensors(data.test)
    views = pictures.distorted(unseen)
    network = pictures.embedder()
    momentum_encoder = copy.deepcopy(network).requires_grad_(False)
    criterion = xbn_ext.CrossBatchMemory(
        xbn_ext.NTXent(TEMPERATURE),
        pictures.EMBEDDING_SIZE,
        QUEUE,
        drift="none",  # the momentum encoder already keeps the keys from going stale
        batch_weight=0,  # queries are compared with keys, not with each other
        enqueue="before",  # a query finds its own key in the memory
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    is_key = torch.arange(2 * BATCH) >= BATCH  # keys are stored and are not anchors; queries are the reverse
    before = found(network, unseen, views)

    epochs = -(-STEPS * BATCH // len(images))
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    for step in range(STEPS):
        which = order[step * BATCH : (step + 1) * BATCH]  # each picture is a class of its own
        queries = network(pictures.distorted(images[which]))
        with torch.no_grad():
            for slow, fast in zip(momentum_encoder.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, 1 - MOMENTUM)
            keys = momentum_encoder(pictures.distorted(images[which]))
        loss = criterion(torch.cat([queries, keys]), which.repeat(2), enqueue_mask=is_key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    after = found(network, unseen, views)
    print(f"{int(criterion.count)} keys in the queue, loss {loss.item():.2f}")
    print(f"Recall@1 of unseen pictures by a distorted view: {before:.1f} % before, {after:.1f} % after")
    return before, after


if __name__ == "__main__":
    main()
