"""A LightningModule that owns its criterion: Lightning's checkpoints have the memory, and training resumes exactly.

In Lightning's validation loop the module is in evaluation mode, where the memory is only read. Several processes have
one memory, so the checkpoint, which is of rank 0, has that of all.

    python -m examples.lightning_module
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import xbn_ext

from . import pictures

STEPS = 60  # of an epoch


class Retrieval(lightning.LightningModule):
    """A network and the memory that it is trained against."""

    def __init__(self, memory_size: int = 1024) -> None:
        super().__init__()
        self.network = pictures.embedder()
        self.memory_size = memory_size

    def configure_model(self) -> None:  # the process group is there only now; Lightning may call this again
        if not hasattr(self, "criterion"):
            loss, size, group = xbn_ext.MultiSimilarity(), pictures.EMBEDDING_SIZE, torch.distributed.group.WORLD
            self.criterion = xbn_ext.CrossBatchMemory(loss, size, self.memory_size, process_group=group)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)  # a learned temperature would be among the parameters


def fit(module: Retrieval, loader: DataLoader, epochs: int, folder: str, resume: Path | None = None) -> None:
    """Train for so many epochs in all, with a checkpoint after each."""
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[checkpoints], **quiet)
    trainer.fit(module, loader, ckpt_path=resume)


def main(seed: int = 0) -> tuple[float, float, Retrieval, Retrieval]:
    """Recall@1 of unseen emoji before and after two epochs, the module, and one that was stopped and resumed."""
    lightning.seed_everything(seed, verbose=False)
    data = pictures.load()
    images, labels = pictures.tensors(data.train)
    order = [batch.tolist() for batch in pictures.batches(labels, range(STEPS))]  # the same in each epoch
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=order)
    module, resumed = Retrieval(), Retrieval()
    before = pictures.recall(module.network, data.test)
    with tempfile.TemporaryDirectory() as folder:
        fit(module, loader, 2, folder)
        fit(resumed, loader, 2, folder, resume=Path(folder, "epoch=0.ckpt"))

    after = pictures.recall(module.network, data.test)
    same = torch.equal(module.criterion.embedding_memory, resumed.criterion.embedding_memory)
    print(f"{int(module.criterion.count)} embeddings in the memory; the same bits in a resumed run: {same}")
    print(f"Recall@1 of unseen emoji: {before:.1f} % before, {after:.1f} % after")
    return before, after, module, resumed


if __name__ == "__main__":
    main()
