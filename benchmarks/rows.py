"""Rows as a trained network gives them, made: class centres and spread with a power-law spectrum, rotated.

    row = rotation @ (l * (centre[label] + 0.6 N)),  l_k = k^(-exponent / 2),  centres and N standard normal

The exponent is found by bisection, so that a wanted share of the negatives has a similarity above the margin. All rows
of a problem have the same rotation, spectrum and centres, whatever their seed. They are float32 and not normalised.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext.losses import Contrastive

from .recorded import Recorded

MARGIN = Contrastive().neg_margin
SPREAD = 0.6  # of a class, relative to that of the centres
STEEPEST = 16.0  # exponent: rows on a line: half of the negatives are above any margin
WORLD = 1 << 30  # seeds from here on are of what all rows of a problem have in common; a CPU takes 32 bits of one
CENTRES = 256  # made at a time


class Source(Protocol):
    """Where rows `[n, D]` and labels `[n]` come from. A seed gives the same ones again."""

    def batch(self, n: int, seed: int) -> tuple[Tensor, Tensor]: ...

    def memory(self, n: int, seed: int) -> tuple[Tensor, Tensor]: ...


@lru_cache(maxsize=4)
def source(dim: int, classes: int, density: float, file: str | None, device: str) -> Source:
    """Rows of the file, or else made ones."""
    if file is None:
        return Made(dim, classes, exponent(dim, classes, density, device), device)
    recorded = Recorded(file, device)
    if recorded.rows.shape[1] != dim:
        raise ValueError(f"{file} has rows of {recorded.rows.shape[1]} numbers, not {dim}")
    return recorded


class Made:
    """Four rows a class, one after the other, as a PxK sampler gives."""

    def __init__(self, dim: int, classes: int, exponent: float, device: str) -> None:
        self.classes, self.device = classes, device
        self.spectrum = spectrum(dim, exponent, device)
        self.rotation = torch.linalg.qr(torch.randn(dim, dim, generator=seeded(WORLD, device), device=device))[0]

    def batch(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        rows, labels = unscaled(n, len(self.spectrum), self.classes, seed, self.device, of_a_class=4)
        return rows.mul_(self.spectrum) @ self.rotation.T, labels

    memory = batch


@lru_cache
def exponent(dim: int, classes: int, density: float, device: str) -> float:
    """Of the spectrum that leaves this share of the negatives above the margin; 0, all directions alike, at least: few
    dimensions cannot have fewer."""
    if density == 0:
        return 0.0
    a, a_labels = unscaled(1024, dim, classes, WORLD - 1, device)
    b, b_labels = unscaled(2048, dim, classes, WORLD - 2, device)
    negative = a_labels[:, None] != b_labels

    def share(exponent: float) -> float:
        scale = spectrum(dim, exponent, device)
        s = F.normalize(a * scale, dim=1) @ F.normalize(b * scale, dim=1).T
        return float(((s > MARGIN) & negative).count_nonzero() / negative.count_nonzero())

    low, high = 0.0, STEEPEST
    for _ in range(13):
        middle = (low + high) / 2
        if share(middle) < density:
            low = middle
        else:
            high = middle
    return low


def spectrum(dim: int, exponent: float, device: str) -> Tensor:
    """Standard deviations `[D]`."""
    deviations = torch.arange(1, dim + 1, dtype=torch.float64).pow(-exponent / 2)
    return deviations.mul(dim**0.5 / float(deviations.norm())).to(device, torch.float32)


def unscaled(n: int, dim: int, classes: int, seed: int, device: str, of_a_class: int = 1) -> tuple[Tensor, Tensor]:
    """Centre and spread of n rows, with the spectrum of 1, and their labels."""
    generator = seeded(seed, device)
    labels = torch.randint(classes, (-(-n // of_a_class),), generator=generator, device=device)
    labels = labels.repeat_interleave(of_a_class)[:n]
    rows = torch.randn(n, dim, generator=generator, device=device).mul_(SPREAD)
    for first in (labels // CENTRES).unique().tolist():  # only those that are needed, none kept
        centres = torch.randn(CENTRES, dim, generator=seeded(WORLD + 1 + first, device), device=device)
        (here,) = torch.where(labels // CENTRES == first)
        rows.index_add_(0, here, centres[labels[here] % CENTRES])
    return rows, labels


def seeded(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
