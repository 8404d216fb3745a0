"""What the benchmarks compare with computes the same, and where it is faster that is said."""

from dataclasses import replace

import pytest
import torch
from benchmark_cases import QUICK
from loss_cases import problem as loss_problem
from loss_cases import run

from benchmarks import torch_memory
from benchmarks.chunked import can_be_chunked, chunked_loss
from benchmarks.clock import Timing
from benchmarks.comparisons import COMPARISONS, OURS, THEIRS
from benchmarks.crossover import crossover
from benchmarks.dense import dense_loss
from benchmarks.implementations import make, why_not
from benchmarks.problem import Problem
from xbn_ext import reference
from xbn_ext.testing import error


@pytest.mark.parametrize("loss", COMPARISONS)
def test_dense_and_chunked_baselines_are_the_loss(loss):
    loss = COMPARISONS[loss].loss
    z, labels, bank, bank_labels = loss_problem(23, 331, 17, classes=12)
    labels[0] = 99  # an anchor without positives
    value, grad = run(lambda z: reference.memory_loss(z, labels, bank, bank_labels, loss), z)
    results = [run(lambda z: dense_loss(loss, (z @ bank.T).div_(bank.norm(dim=1)), labels[:, None] == bank_labels), z)]
    if can_be_chunked(loss):
        results += [chunked_loss(loss, z, labels, bank, bank_labels, rows=rows) for rows in (50, 1000)]
    for result, result_grad in results:
        assert value > 0 and error(result, value) < 1e-12 and error(result_grad, grad) < 1e-12


def test_loss_of_all_triplets_has_no_chunks():
    loss = COMPARISONS["triplet_all"].loss
    z, labels, bank, bank_labels = loss_problem(4, 9, 3)
    assert not can_be_chunked(loss)
    with pytest.raises(TypeError, match="no chunks for Triplet"):
        chunked_loss(loss, z, labels, bank, bank_labels)


@pytest.mark.singly
@pytest.mark.parametrize("drift", ["none", "xbn", "axbn", "ema"])
def test_steps_stay_together(drift):
    """Not only the first one, which every row's error is of."""
    problem = Problem(batch=20, memory=300, dim=24, classes=9, drift=drift, dtype=torch.float64)
    names = [name for name in QUICK if why_not(name, problem) is None and name != THEIRS]
    assert len(names) >= 4
    calls = {name: make(name, problem) for name in names}
    for seed in range(20):
        x, labels = problem.embeddings(problem.batch, seed)
        losses = {name: call(x, labels)[0] for name, call in calls.items()}
        for name, loss in losses.items():
            assert error(loss, losses[OURS]) < 1e-10, (name, seed)


@pytest.mark.parametrize("loss", ["contrastive", "circle"])
def test_compiled_is_tuned(loss, monkeypatch):
    """Without the time to compile."""
    for name in ("moments", "transform", "loss"):
        monkeypatch.setattr(f"benchmarks.torch_memory._compiled_{name}", getattr(torch_memory, f"_{name}"))
    problem = Problem(batch=20, memory=300, dim=24, classes=9, loss=loss, dtype=torch.float64)
    x, labels = problem.embeddings(problem.batch, seed=2)
    kinds = torch_memory.Compiled, torch_memory.TorchMemory
    a, b = (kind(*problem.bank(), problem.pair_loss, target=problem.target()) for kind in kinds)
    for results in (
        zip(a.moments(x), b.moments(x), strict=True),
        zip(a.rank(x, labels), b.rank(x, labels), strict=True),
        zip(a.step(x, labels), b.step(x, labels), strict=True),
        [(a.bank, b.bank)],
    ):
        assert all(error(one, other) < 1e-12 for one, other in results)


def test_crossover_names_the_largest_size_at_which_a_baseline_is_faster(monkeypatch):
    def timed(names, problem, rounds, copies):
        return {name: Timing(*[100.0 if name == OURS else problem.memory] * 3) for name in names}

    monkeypatch.setattr("benchmarks.crossover.timed", timed)
    problem = Problem(batch=16, memory=5000, dim=8)
    assert "up to M = 64 (eager-tuned 64.000 ms" in crossover(problem, [OURS, "eager-tuned"], 1)
    assert "xbn_ext is faster than eager-tuned at M = 128, 512, 2048" in crossover(
        replace(problem, batch=128), [OURS, "eager-tuned"], 1
    )
    assert crossover(replace(problem, kernel="moments"), [OURS, "eager-tuned"], 1) == ""
