"""The rows that the benchmarks draw: how many pairs are active, their classes and their dtypes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.implementations import weighted_pairs
from benchmarks.problem import Problem
from benchmarks.rows import exponent, spectrum, unscaled


def share_above_the_margin(x, labels, bank, bank_labels):
    negative = labels[:, None] != bank_labels
    return float(((x @ bank.T > 0.5) & negative).sum() / negative.sum())


DENSITIES = [(64, 0.001), (512, 0.05)]  # others in `make test-all`: the rows take seconds


@pytest.mark.parametrize(
    "dim, density",
    [
        *DENSITIES,
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product([64, 128, 512], [0.001, 0.01, 0.05])
            if case not in DENSITIES
        ),
    ],
)
def test_density_is_what_was_asked_for(dim, density):
    """Over thousands of classes, each with one row: a batch has 16, and some have few neighbours."""
    scale = spectrum(dim, exponent(dim, Problem.classes, density, "cpu"), "cpu")
    (x, labels), (bank, bank_labels) = (unscaled(n, dim, Problem.classes, n, "cpu") for n in (3000, 8000))
    x, bank = (F.normalize(t * scale, dim=1) for t in (x, bank))
    assert share_above_the_margin(x, labels, bank, bank_labels) == pytest.approx(density, rel=0.2)


@pytest.mark.long
def test_rows_are_alike_in_all_directions_where_no_pair_is_to_be_active():
    problem = Problem(memory=4096, dim=128, density=0.0)
    assert share_above_the_margin(*problem.embeddings(256, seed=7), *problem.bank()) < 1e-5
    std = problem.bank()[0].std(0)
    assert std.max() < 1.2 * std.min()


def test_few_dimensions_cannot_have_less_than_rows_alike_in_all_directions():
    assert exponent(8, 100, 0.001, "cpu") == 0 < exponent(8, 100, 0.3, "cpu")


def test_all_rows_of_a_problem_are_of_the_same_classes():
    """Four a batch, whatever the seed; as unlike as any without a class in common."""
    problem = Problem(dim=64, classes=300, density=0.0)
    (x, labels), (y, others) = problem.embeddings(402, seed=1), problem.embeddings(400, seed=2)
    assert labels.unique_consecutive().numel() in (100, 101) and not labels.equal(others)
    s, positive = x @ y.T, labels[:, None] == others
    assert s[positive].mean() > 0.65 and abs(s[~positive].mean()) < 0.01
    assert all(torch.equal(a, b) for a, b in zip(problem.embeddings(402, seed=1), (x, labels), strict=True))


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float64, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_rows_have_the_dtype_of_the_problem(stored, computed):
    problem = Problem(memory=40, dim=16, classes=1, dtype=stored)  # without a negative, nothing to reach
    assert problem.bank()[0].dtype == stored and problem.embeddings(8, seed=1)[0].dtype == computed
    assert all(t.dtype == computed and t.isfinite().all() for t in problem.target())


@pytest.mark.long
@pytest.mark.parametrize(
    "drift, dim",
    [
        ("axbn", 64),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in itertools.product(["none", "axbn", "ema"], [64, 128])
            if case != ("axbn", 64)
        ),
    ],
)
def test_moving_the_memory_leaves_the_density(dim, drift):
    problem = Problem(memory=4096, dim=dim, drift=drift)
    active = weighted_pairs(problem) / problem.memory - 1 / problem.classes
    assert problem.density / 1.5 < active < 1.5 * problem.density
