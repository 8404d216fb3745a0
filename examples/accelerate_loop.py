"""A training loop with Accelerate, and a checkpoint from which it resumes exactly.

The network is prepared. The criterion is moved to the device by hand. Each process has a memory of its own and saves
it to a file of its own: what `register_for_checkpointing` is given is written by the main process only, and loaded by
all of them.

    python -m examples.accelerate_loop
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
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
    criterion = xbn_ext.CrossBatchMemory(xbn_ext.SupCon(), pictures.EMBEDDING_SIZE, memory_size=1024)
    criterion.to(accelerator.device)
    network, optimizer, loader = accelerator.prepare(
        network,
        torch.optim.Adam(network.parameters(), lr=1e-3),
        DataLoader(TensorDataset(images, labels), batch_sampler=order),
    )
    memory = Path(folder, f"memory_{accelerator.process_index}.pt")
    first = 0
    if resume:
        accelerator.load_state(folder)
        criterion.load_state_dict(torch.load(memory))
        first = STOP
        loader = accelerator.skip_first_batches(loader, first)
    for step, (pixels, which) in enumerate(loader, first):
        loss = criterion(network(pixels), which)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step + 1 == STOP:
            accelerator.save_state(folder)
            torch.save(criterion.state_dict(), memory)
    return accelerator.unwrap_model(network), criterion


def main(seed: int = 0) -> tuple[float, float, bool]:
    """Recall@1 of unseen emoji before and after, and whether a resumed run has the same memory."""
    data = pictures.load()
    torch.manual_seed(seed)
    before = pictures.recall(pictures.embedder(), data.test)
    with tempfile.TemporaryDirectory() as folder:
        network, criterion = train(data, folder, seed, resume=False)
        _, resumed = train(data, folder, seed + 1, resume=True)  # another seed: everything comes from the checkpoint

    after = pictures.recall(network, data.test)
    same = torch.equal(criterion.embedding_memory, resumed.embedding_memory)
    print(f"{int(criterion.count)} embeddings in the memory; the same bits in a resumed run: {same}")
    print(f"Recall@1 of unseen emoji: {before:.1f} % before, {after:.1f} % after")
    return before, after, same


if __name__ == "__main__":
    main()
