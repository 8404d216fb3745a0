"""One memory for many processes: each has a part of every batch, and all train what one process would train.

The network is in DistributedDataParallel, the criterion knows the process group. A process by itself has none, and
`torch.distributed.group.WORLD` is None there.

    torchrun --nproc-per-node 2 -m examples.many_processes
    python -m examples.many_processes
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import xbn_ext

from . import pictures

STEPS = 120


def embedder() -> nn.Module:
    """The network of the other examples, each picture normalised by itself: batch normalisation would take each
    process's part of a batch for the batch. On GPUs there is `nn.SyncBatchNorm`."""
    network = pictures.embedder()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, nn.InstanceNorm2d(module.num_features, affine=True))
    return network


def train(network: nn.Module) -> tuple[list[float], xbn_ext.CrossBatchMemory]:
    """Train for `STEPS`; returns the loss of each, which is the same in all processes."""
    images, labels = pictures.tensors(pictures.load().train)
    criterion = xbn_ext.CrossBatchMemory(
        xbn_ext.SupCon(), pictures.EMBEDDING_SIZE, memory_size=1024, process_group=dist.group.WORLD
    )
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = DistributedDataParallel(network) if processes > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for batch in pictures.batches(labels, range(STEPS)):
        own = batch.tensor_split(processes)[rank]  # in the order of ranks; the parts need not be of one size
        loss = criterion(wrapped(images[own]), labels[own], ids=own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, criterion


def main(seed: int = 0) -> tuple[float, float, list[float]]:
    """Recall@1 of unseen emoji before and after, and the losses."""
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")  # without an argument: NCCL for GPUs, gloo for the hosts
    data = pictures.load()
    torch.manual_seed(seed)  # the same first weights in all processes
    network = embedder()
    before = pictures.recall(network, data.test)
    losses, criterion = train(network)
    after = pictures.recall(network, data.test)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(criterion.state_dict(), os.devnull)  # of one process: all have the same
        print(f"{int(criterion.count)} embeddings in the memory; losses {losses[0]:.4f} … {losses[-1]:.4f}")
        print(f"Recall@1 of unseen emoji: {before:.1f} % before, {after:.1f} % after")
    if dist.is_initialized():
        dist.destroy_process_group()
    return before, after, losses


if __name__ == "__main__":
    main()
