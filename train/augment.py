"""From stored pixels to network input: random views for training, one fixed view for evaluation.

Both give uint8, [3, size, size]; the model itself normalises. Each image of a batch gets parameters of its own.
Features that stand in place of images (train/features.py) pass unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xbn_ext import ClassBalancedSampler

from . import loading
from .data import Part, Pixels
from .streams import Stream, torch_seeds
from .timm_models import BILINEAR
from .vision import transforms as T

WHITE = 255
EVALUATION_BATCH = 256
LONGEST = 16
"""Times the short side: of a longer image only the middle is scaled."""
View = Callable[[Tensor], Tensor]
"""uint8 [3, height, width] -> uint8 [3, size, size]; or features float32 [F] -> the same"""


def training_view(size: int, mirror: bool, kind: str = "mild", interpolation: str = BILINEAR) -> View:
    """A random view; ``kind`` says of what, ``interpolation`` how it is scaled.

    mild, for drawings: most of the image, slightly turned, moved and sheared, in slightly other light.
    photo: a part of 20 % to all of the image, up to a third longer than wide or the other way round.
    none: what an evaluation sees, not even mirrored.
    """
    if kind == "none":
        return evaluation_view(size, interpolation=interpolation)
    how = T.InterpolationMode(interpolation)
    if kind == "photo":
        steps = [T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=how, antialias=True)]
    else:
        bilinear = T.InterpolationMode.BILINEAR
        steps = [
            T.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1.1), interpolation=how, antialias=True),
            T.RandomAffine(5, (0.03, 0.03), (0.92, 1.05), shear=3, interpolation=bilinear, fill=WHITE),
            T.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1),
        ]
    view: View = T.Compose([T.RandomHorizontalFlip(), *steps] if mirror else steps)
    return view


def evaluation_view(size: int, kind: str = "mild", interpolation: str = BILINEAR) -> View:
    """The middle of the image, as large as its short side (photo: as 7/8 of it), scaled to ``size``."""
    scale = T.Resize(short_side(size, kind), T.InterpolationMode(interpolation), antialias=True)
    view: View = T.Compose([without_ends, scale, T.CenterCrop(size)])
    return view


def short_side(size: int, kind: str) -> int:
    """To how many pixels an evaluation scales the short side of an image, and then shows the middle."""
    return round(size * 8 / 7) if kind == "photo" else size


def without_ends(image: Tensor) -> Tensor:
    """The middle of a strip, uint8 [3, height, width]: scaled as a whole, one of 1 x 60,000 would take gigabytes."""
    for side, other in ((1, 2), (2, 1)):
        beyond = (image.shape[side] - LONGEST * image.shape[other]) // 2
        if beyond > 0:
            image = image.narrow(side, beyond, image.shape[side] - 2 * beyond)
    return image


def to_tensor(pixels: Pixels | NDArray[np.float32]) -> Tensor:
    """uint8 [height, width, 3] -> uint8 [3, height, width]; features [F] -> the same. No copy where none is needed."""
    if pixels.ndim == 1:
        return torch.from_numpy(pixels)
    return torch.from_numpy(np.require(pixels, requirements=("W", "C"))).permute(2, 0, 1)


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """The batch of each step: ``batches[step]`` is (images uint8 [B, 3, size, size], labels int64 [B]).

    Where features stand in place of images, they are float32 [B, F]. An image's view is a function of the seed, the
    step and its place in the batch: the same, whichever process prepares it.
    """

    def __init__(
        self, part: Part, sampler: ClassBalancedSampler, view: View, seed: int, own: slice = slice(None)
    ) -> None:
        """``own`` says which images of each batch are wanted; the others are not read."""
        self.part, self.sampler, self.view, self.seed, self.own = part, sampler, view, seed, own

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        batch = self.sampler.batch(step)
        seeds = torch_seeds(self.seed, Stream.AUGMENTATION, step, len(batch))[self.own]
        where = batch[self.own]
        with torch.random.fork_rng(devices=[]):
            images = torch.stack([self._view(i, seed) for i, seed in zip(where, seeds, strict=True)])
        return images, torch.from_numpy(self.part.labels[where])

    def _view(self, image: int, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)  # what the transforms draw from
        return self.view(to_tensor(self.part.images[image]))

    def prepared(self, first: int, last: int, *, workers: int, pin: bool) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The batches ``first`` .. ``last - 1`` in order, prepared ahead by ``workers`` processes, with the seconds
        that each took."""
        loader = DataLoader(
            _Timed(self), None, sampler=range(first, last), num_workers=workers, pin_memory=pin,
            generator=_own_generator(), worker_init_fn=loading.begin,
        )  # fmt: skip
        return loading.batches(loader)


class _Timed(Dataset[tuple[Tensor, Tensor, float]]):
    """Batches with the seconds that each took to prepare, in whichever process."""

    def __init__(self, batches: TrainingBatches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, float]:
        began = time.perf_counter()
        return *self.batches[number], time.perf_counter() - began


class EvaluationBatches(Dataset[Tensor]):
    """The images of one part in order, in chunks: uint8 [<= EVALUATION_BATCH, 3, size, size], or features [., F]."""

    def __init__(self, part: Part, view: View) -> None:
        self.part, self.view = part, view

    def __len__(self) -> int:
        return -(-len(self.part.images) // EVALUATION_BATCH)

    def rows(self, chunks: slice) -> slice:
        """The images of some chunks."""
        first, last = (min(chunk * EVALUATION_BATCH, len(self.part.images)) for chunk in (chunks.start, chunks.stop))
        return slice(first, last)

    def __getitem__(self, chunk: int) -> Tensor:
        rows = self.rows(slice(chunk, chunk + 1))
        return torch.stack([self.view(to_tensor(self.part.images[i])) for i in range(rows.start, rows.stop)])

    def batches(self, workers: int = 0, chunks: slice = slice(None)) -> Iterator[Tensor]:
        """Some chunks, in order, or all."""
        wanted = range(len(self))[chunks]
        loader = DataLoader(
            self, None, sampler=wanted, num_workers=workers, generator=_own_generator(), worker_init_fn=loading.begin
        )
        return loading.batches(loader)


def _own_generator() -> torch.Generator:
    """For loaders, which would otherwise draw a number from the global generator when they start."""
    return torch.Generator()
