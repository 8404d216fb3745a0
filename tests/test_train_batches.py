"""What the images of a step look like to the network."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from train.augment import EvaluationBatches, TrainingBatches, evaluation_view, to_tensor, training_view
from train.data import Part, Pixels
from train.vision import transforms
from xbn_ext import ClassBalancedSampler

LABELS = np.repeat(np.arange(12), [2, 3, 4, 5, 6, 7, 8, 4, 4, 4, 4, 4]).astype(np.int64)


def part(size: tuple[int, int] = (40, 30)) -> Part:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(LABELS), *size, 3), dtype=np.uint8)
    return Part(list(images), LABELS, tuple(map(str, range(12))), ("",) * len(LABELS))


def batches(seed: int = 0, own: slice = slice(None)) -> TrainingBatches:
    sampler = ClassBalancedSampler(LABELS, 16, 4, seed=seed)
    return TrainingBatches(part(), sampler, training_view(24, mirror=True), seed, own)


def test_a_training_batch_is_a_pure_function_of_seed_and_step() -> None:
    torch.manual_seed(1)
    images, labels = batches()[7]
    assert images.shape == (16, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.shape == (16,) and labels.dtype == torch.int64
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, again_labels = batches()[7]
    assert torch.equal(images, again) and torch.equal(labels, again_labels)
    assert torch.equal(state, torch.get_rng_state()), "and leaves torch's generator alone"
    assert not torch.equal(images, batches(seed=1)[7][0])


def test_each_image_of_a_batch_gets_a_view_of_its_own() -> None:
    same = Part([part().images[0]] * len(LABELS), LABELS, tuple(map(str, range(12))), ("",) * len(LABELS))
    images, _ = TrainingBatches(same, ClassBalancedSampler(LABELS, 16, 4), training_view(24, mirror=True), 0)[0]
    assert len({image.numpy().tobytes() for image in images}) == 16


@pytest.mark.parametrize("cuts", [(0, 8, 16), (0, 6, 11, 16), (0, 1, 16)])
def test_parts_of_a_batch_are_the_parts_of_the_whole_and_read_nothing_else(cuts: tuple[int, ...]) -> None:
    whole, labels = batches()[3]
    for first, last in pairwise(cuts):
        own = batches(own=slice(first, last))
        read: list[int] = []
        own.part = replace(own.part, images=Noted(own.part.images, read))
        images, own_labels = own[3]
        assert torch.equal(images, whole[first:last]) and torch.equal(own_labels, labels[first:last])
        assert read == own.sampler.batch(3)[first:last]


class Noted(list):
    """Images that note which of them are asked for."""

    def __init__(self, images: list[Pixels], read: list[int]) -> None:
        super().__init__(images)
        self.read = read

    def __getitem__(self, index: int) -> Pixels:
        self.read.append(index)
        return super().__getitem__(index)


def test_workers_prepare_the_same_batches_in_the_same_order() -> None:
    alone = list(batches().prepared(3, 7, workers=0, pin=False))
    helped = list(batches().prepared(3, 7, workers=2, pin=False))
    assert len(alone) == len(helped) == 4
    for (images, labels, seconds), (others, other_labels, other_seconds) in zip(alone, helped, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert seconds > 0 and other_seconds > 0


def test_the_evaluation_view_is_the_middle_of_the_scaled_image() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    seen = evaluation_view(32)(to_tensor(pixels))
    assert seen.shape == (3, 32, 32)
    assert (seen[:, :, 2:30] == 200).all()
    square = part((24, 24)).images[0]
    assert torch.equal(evaluation_view(24)(to_tensor(square)), to_tensor(square)), "untouched if of the right size"


@pytest.mark.parametrize("kind", ["mild", "photo"])
@pytest.mark.parametrize(("height", "width"), [(3, 48), (3, 49), (3, 50), (3, 2001), (2002, 2), (1, 60_000)])
def test_of_a_strip_only_the_middle_is_scaled(height: int, width: int, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = to_tensor(pixels)
    scaled = []
    view = evaluation_view(24, kind)
    view.transforms[1].register_forward_hook(lambda module, inputs, output: scaled.append(output.numel()))
    seen = view(image)
    assert scaled[0] <= 3 * 28 * 28 * 17
    if max(height, width) < 10_000:
        whole = transforms.Compose(view.transforms[1:])(image)
        assert (seen.int() - whole.int()).abs().max() <= 40, "a part of a pixel away at most"
        assert (seen.int() - whole.int()).abs().float().mean() < 4


def test_views_of_photographs() -> None:
    """Trained on parts of any size, mirrored only where that is right; tested on 7/8 of the middle."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, :64, 0] = 200
    torch.manual_seed(0)
    seen = torch.stack([training_view(16, False, "photo")(to_tensor(pixels)) for _ in range(200)])[:, 0].float()
    red = (seen > 100).float().mean((1, 2))
    assert seen.shape == (200, 16, 16) and red.min() == 0 and red.max() == 1, "far from the whole image"
    assert (seen[:, :, 0] >= seen[:, :, -1]).all(), "left stays left"
    mirrored = torch.stack([training_view(16, True, "photo")(to_tensor(pixels)) for _ in range(50)])[:, 0].float()
    assert (mirrored[:, :, 0] < mirrored[:, :, -1] - 100).any()
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    tested = evaluation_view(56, "photo")(to_tensor(gradient))
    assert tested.shape == (3, 56, 56) and tested[0, :, 0].tolist() == list(range(4, 60))


def test_evaluation_batches_cover_all_images_in_order() -> None:
    data = part((24, 24))
    data = Part(list(data.images) * 8, np.tile(LABELS, 8), data.classes, ("",) * len(LABELS) * 8)
    chunks = list(EvaluationBatches(data, evaluation_view(24)).batches())
    assert [len(chunk) for chunk in chunks] == [256, 8 * len(LABELS) - 256]
    assert torch.equal(torch.cat(chunks), torch.stack([to_tensor(image) for image in data.images]))
