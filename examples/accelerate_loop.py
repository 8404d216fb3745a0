"""A training loop with Accelerate, and a checkpoint from which it resumes exactly.

The network is prepared. The criterion is moved to the device by hand, and is in the checkpoint by
`register_for_checkpointing`. Several processes (`accelerate launch --num-processes 2 -m examples.accelerate_loop`) have
one memory, that of the process group, so the main process's copy is everyone's.

    python -m examples.accelerate_loop
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import xbn_ext
from train.data import Dataset

from . import pictures

STEPS, STOP = 120, 60


def train(data: Dataset, folder: str, seed: int, resume: bool) -> tuple[nn.Module, xbn_ext.CrossBatchMemory]:
    """Train for `STEPS`, with a checkpoint after `STOP` of them; or from that checkpoint on."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)  # without the argument: on the GPU if there is one
    images, labels = pictures.tensors(data.train)
    order = [batch.tolist() for batch in pictures.batches(labels, range(STEPS))]
    network = pictures.embedder()
    criterion = xbn_ext.CrossBatchMemory(
        xbn_ext.SupCon(), pictures.EMBEDDING_SIZE, memory_size=1024, process_group=torch.distributed.group.WORLD
    )
    accelerator.register_for_checkpointing(criterion.to(accelerator.device))
    network, optimizer, loader = accelerator.prepare(
        network,
        torch.optim.Adam(network.parameters(), lr=1e-3),
        DataLoader(TensorDataset(images, labels), batch_sampler=order),
    )
    first = 0
    if resume:
        accelerator.load_state(folder)
        first = STOP
        loader = accelerator.skip_first_batches(loader, first)
    for step, (pixels, which) in enumerate(loader, first):
        loss = criterion(network(pixels), which)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step + 1 == STOP:
            accelerator.save_state(folder)
    return accelerator.unwrap_model(network), criterion


def main(seed: int = 0) -> tuple[float, float, bool]:
    """Recall@1 of unseen emoji before and after, and whether a resumed run has the same memory."""
    data = pictures.load()
    torch.manual_seed(seed)
    before = pictures.recall(pictures.embedder(), data.test)
    processes = PartialState(cpu=True)
    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])  # the main process's
        network, criterion = train(data, folder, seed, resume=False)
        _, resumed = train(data, folder, seed + 1, resume=True)  # another seed: everything comes from the checkpoint
        processes.wait_for_everyone()

    after = pictures.recall(network, data.test)
    same = torch.equal(criterion.embedding_memory, resumed.embedding_memory)
    processes.print(f"{int(criterion.count)} embeddings in the memory; the same bits in a resumed run: {same}")
    processes.print(f"Recall@1 of unseen emoji: {before:.1f} % before, {after:.1f} % after")
    return before, after, same


if __name__ == "__main__":
    main()
