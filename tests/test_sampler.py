"""Which images make up a batch."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from xbn_ext import ClassBalancedSampler
from xbn_ext.sampler import dealt

LABELS = np.repeat(np.arange(12), [2, 3, 4, 5, 6, 7, 8, 4, 4, 4, 4, 4]).astype(np.int64)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), step=st.integers(0, 10**6), classes=st.integers(1, 12), per_class=st.integers(1, 6))
def test_a_batch_has_p_classes_with_k_images_each(seed, step, classes, per_class):
    labels = np.random.default_rng(seed).permutation(LABELS)
    batch = np.array(ClassBalancedSampler(labels, classes * per_class, per_class, seed=seed).batch(step))
    drawn, counts = np.unique(labels[batch], return_counts=True)
    assert len(drawn) == classes and (counts == per_class).all()
    assert (labels[batch].reshape(classes, per_class) == labels[batch][::per_class, None]).all(), "class after class"
    for label in drawn:
        images, times = np.unique(batch[labels[batch] == label], return_counts=True)
        size = np.bincount(LABELS)[label]
        assert len(images) == min(size, per_class), "an image comes twice only where there are too few"
        assert times.max() == -(-per_class // size), "and then as seldom as possible"


def test_batches_depend_on_seed_and_step_alone():
    one, other = (ClassBalancedSampler(LABELS, 16, 4, seed=3) for _ in range(2))
    for step in (5, 0, 5, 2):
        one.batch(step)
    assert [one.batch(step) for step in range(5)] == [other.batch(step) for step in range(5)]
    assert one.batch(0) != one.batch(1)
    assert one.batch(0) != ClassBalancedSampler(LABELS, 16, 4, seed=4).batch(0)


def test_batches_are_those_of_recorded_runs():
    """The study's runs and checkpoints are of these: they name a seed and a step."""
    sampler = ClassBalancedSampler(LABELS, 6, 3, seed=7)
    assert sampler.batch(0) == [46, 43, 45, 53, 51, 52]
    assert sampler.batch(1) == [42, 41, 40, 1, 0, 0]
    assert sampler.batch(1000) == [3, 2, 4, 49, 48, 50]


@pytest.mark.parametrize(
    "labels",
    [LABELS.tolist(), torch.from_numpy(LABELS), torch.from_numpy(LABELS).to(torch.uint8), LABELS * 10**15 - 7],
    ids=["list", "tensor", "uint8", "far apart"],
)
def test_labels_are_told_apart_whatever_holds_them(labels):
    assert ClassBalancedSampler(labels, 16, 4).batch(3) == ClassBalancedSampler(LABELS, 16, 4).batch(3)


def test_every_class_is_drawn_about_as_often():
    sampler = ClassBalancedSampler(LABELS, 8, 2)
    drawn = np.bincount(np.concatenate([LABELS[sampler.batch(step)] for step in range(600)]), minlength=12)
    assert drawn.sum() == 600 * 8
    assert drawn.min() > 0.8 * 400 and drawn.max() < 1.2 * 400


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_has_all_batches_in_order(workers):
    images = torch.arange(len(LABELS))
    loader = DataLoader(images, batch_sampler=ClassBalancedSampler(LABELS, 8, 4, num_batches=5), num_workers=workers)
    assert len(loader) == 5
    seen = [batch.tolist() for _ in range(2) for batch in loader]
    sampler = ClassBalancedSampler(LABELS, 8, 4)
    assert seen == [sampler.batch(step) for step in range(10)], "the second iteration goes on"


def test_an_iteration_has_as_many_images_as_there_are():
    assert len(list(ClassBalancedSampler(LABELS, 16, 4))) == len(ClassBalancedSampler(LABELS, 16, 4)) == 55 // 16
    assert len(ClassBalancedSampler([1, 2], 8, 4)) == 1


def test_it_goes_on_where_it_was():
    def sampler(**options):
        return ClassBalancedSampler(LABELS, 8, 4, num_batches=5, **options)

    stopped = sampler(seed=1)
    iterator = iter(stopped)
    before = [next(iterator) for _ in range(3)]
    resumed = sampler()
    resumed.load_state_dict(stopped.state_dict())
    by_hand = sampler(seed=1)
    by_hand.step = 3
    assert before + list(resumed) == list(sampler(seed=1))
    assert list(by_hand) == [sampler(seed=1).batch(step) for step in (3, 4)], "the rest of the iteration"
    assert resumed.step == by_hand.step == 5 and len(list(resumed)) == 5, "and then a whole one"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_have_the_batch_of_one_process_between_them(ranks):
    samplers = [ClassBalancedSampler(LABELS, 8, 4, seed=2, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    parts = [sampler.batch(6) for sampler in samplers]
    assert [image for part in parts for image in part] == ClassBalancedSampler(LABELS, 8, 4, seed=2).batch(6)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(0, 100), st.integers(1, 12))
def test_things_are_dealt_out_evenly(count, among):
    parts = [range(count)[part] for part in dealt(count, among)]
    assert [thing for part in parts for thing in part] == list(range(count))
    sizes = list(map(len, parts))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_arrays_of_all_layouts():
    expected = ClassBalancedSampler(LABELS.tolist(), 8, 4).batch(3)
    read_only = np.array(LABELS)
    read_only.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for labels in (read_only, LABELS.astype(">i2"), np.array(LABELS[::-1])[::-1], LABELS.astype(np.uint64)):
            assert ClassBalancedSampler(labels, 8, 4).batch(3) == expected


class Column:
    """As a Series of pandas: a position in brackets is looked up in its index."""

    def __init__(self, index):
        self.of_index = dict(zip(index, LABELS, strict=True))

    def __len__(self):
        return len(self.of_index)

    def __getitem__(self, at):
        return self.of_index[at]

    def __array__(self, dtype=None, copy=None):
        return np.array(list(self.of_index.values()), dtype)


@pytest.mark.parametrize("index", [range(len(LABELS))[::-1], range(100, 100 + len(LABELS))])
def test_a_column_is_read_by_its_rows(index):
    assert ClassBalancedSampler(Column(index), 8, 4).batch(3) == ClassBalancedSampler(LABELS, 8, 4).batch(3)


def test_torch_has_another_default_device():
    expected = ClassBalancedSampler(LABELS, 8, 4).batch(3)
    with torch.device("meta"):
        assert ClassBalancedSampler(LABELS, 8, 4).batch(3) == expected
        assert ClassBalancedSampler(LABELS.tolist(), 8, 4).batch(3) == expected


@pytest.mark.parametrize("batch_size", [52, 64])
def test_more_classes_than_there_are(batch_size):
    with pytest.raises(
        ValueError,
        match=rf"^batch_size {batch_size} with samples_per_class 4 needs 1[36] .* are 12: choose batch_size 48 or less",
    ):
        ClassBalancedSampler(LABELS, batch_size, 4)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"labels": LABELS + 0.5}, TypeError, "labels must be an integer tensor, got torch.float64"),
        ({"labels": LABELS > 3}, TypeError, "labels must be an integer tensor, got torch.bool"),
        ({"labels": ["cat", "dog"]}, TypeError, "labels must be integers"),
        ({"labels": np.ma.masked_equal(LABELS, 3)}, TypeError, "labels must not be masked"),
        ({"labels": LABELS[:, None]}, ValueError, r"labels must be \[N=55\], got \[55, 1\]"),
        ({"labels": []}, ValueError, "labels are empty"),
        ({"labels": torch.zeros(9, dtype=torch.int64, device="meta")}, ValueError, "labels are on the meta device"),
        ({"labels": LABELS[:0]}, ValueError, "labels are empty"),
        ({"batch_size": 15}, ValueError, "batch_size 15 with samples_per_class 4 needs 3.75"),
        ({"batch_size": 16.0}, ValueError, "batch_size must be an integer >= 1"),
        ({"samples_per_class": 0}, ValueError, "samples_per_class must be an integer >= 1"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"num_batches": 0}, ValueError, "num_batches must be an integer >= 1"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be an integer >= 1"),
        ({"rank": -1}, ValueError, "rank must be an integer >= 0"),
        ({"rank": 2, "num_replicas": 2}, ValueError, "rank must be below num_replicas, .* got rank 2 of 2"),
        ({"num_replicas": 17}, ValueError, r"at most batch_size \(16\), got rank 0 of 17"),
    ],
)
def test_bad_arguments(changed, error, words):
    with pytest.raises(error, match=words):
        ClassBalancedSampler(**{"labels": LABELS, "batch_size": 16, "samples_per_class": 4} | changed)


def test_bad_steps():
    sampler = ClassBalancedSampler(LABELS, 16, 4)
    for step in (-1, 0.5):
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            sampler.batch(step)
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            sampler.load_state_dict({"seed": 3, "step": step})
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            sampler.step = step
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            sampler.seed = step
    assert sampler.state_dict() == {"seed": 0, "step": 0}, "and nothing has changed"


def test_a_step_that_is_set_is_a_number_of_its_own():
    sampler, counter = ClassBalancedSampler(LABELS, 8, 2), torch.tensor(3)
    for number in (counter, np.int64(3)):
        sampler.step = number
        next(iter(sampler))
        assert type(sampler.state_dict()["step"]) is int and sampler.step == 4
    assert counter == 3
