"""The roofline: the work of a call, the speed of the machine, and which of them binds."""

from dataclasses import replace

import pytest
import torch
from benchmark_cases import MACHINE

from benchmarks import roofline
from benchmarks.comparisons import OURS
from benchmarks.implementations import ROUNDS, weighted_pairs
from benchmarks.problem import Problem
from benchmarks.roofline import Bound, Work, bound_of, measure_machine, work_of
from xbn_ext import build_info


def test_work_of_known_cases():
    problem = Problem(batch=2, memory=100, dim=8)
    loss = Work(flop=2 * 2 * 8 * (100 + 3), bytes=4 * 800 + 8 * 100 + 2 * 4 * 16 + 8 * 2)
    assert work_of(replace(problem, kernel="loss"), False, 3) == loss
    deferred = Work(loss.flop + 2 * 2 * 2 * 8, loss.bytes + 4 * 16 + 8 * 2)
    assert work_of(problem, False, 3) == deferred
    assert work_of(problem, True, 3) == Work(deferred.flop + 2 * 800, deferred.bytes + 4 * 800, True)
    assert work_of(replace(problem, kernel="transform", dtype=torch.float16), True, 0) == Work(1600, 2 * 2 * 800, True)
    assert work_of(replace(problem, kernel="moments"), False, 0) == Work(48, 64)
    assert work_of(replace(problem, kernel="normalize"), False, 0) == Work(48, 128, True)
    assert work_of(replace(problem, kernel="batch_loss"), False, 1) == Work(2 * 2 * 8 * 3, 2 * 64 + 8 * 2)
    assert work_of(replace(problem, kernel="enqueue"), False, 0) == Work(0, 2 * 4 * 16 + 2 * 8 * 2, True)


def test_bound_is_of_what_binds():
    problem = Problem()
    assert bound_of(Work(1e9, 1e6), MACHINE, problem, OURS) == Bound(10.0, "FMA")
    assert bound_of(Work(1e9, 1e6), MACHINE, replace(problem, dtype=torch.float64), OURS) == Bound(20.0, "FMA")
    assert bound_of(Work(1e9, 1e6), MACHINE, problem, "eager tf32") == Bound(1.25, "tensor")
    assert bound_of(Work(3e9, 1e6), MACHINE, problem, "tensor deferred") == Bound(11.25, "tensor")
    assert bound_of(Work(1e9, 1e9), MACHINE, problem, OURS) == Bound(50.0, "memory")
    assert bound_of(Work(1e9, 1e9, True), MACHINE, problem, OURS) == Bound(62.5, "memory")


def test_weighted_pairs_are_those_that_cost_something():
    problem = Problem(kernel="loss", batch=20, memory=300, dim=4, classes=9)
    bank, bank_labels = problem.bank()
    active = 0.0
    for x, labels in map(problem.round, range(ROUNDS)):
        s, positive = x @ bank.T, labels[:, None] == bank_labels
        active += float(torch.where(positive, s < 1, s > 0.5).sum()) / 20 / ROUNDS
    assert weighted_pairs(problem) == pytest.approx(active, rel=0.01) and 0 < active < 300
    assert weighted_pairs(replace(problem, loss="supcon")) == 300
    assert weighted_pairs(replace(problem, kernel="moments")) == 0


def test_machine_is_measured(monkeypatch):
    monkeypatch.setitem(roofline.BUFFER_BYTES, "cpu", 1 << 20)
    machine = measure_machine("cpu", threads=1)
    assert machine.keys() == {"read", "copy", "float32", "float64"} and all(value > 0 for value in machine.values())


@pytest.mark.parametrize("float64", [False, True])
def test_peak_fma_counts_its_operations(float64):
    """The accumulators of one round are 6 x 4 vectors where there are 32 registers, else 6 x 2."""
    flop, result = torch.ops.xbn_ext._peak_fma(3, 10, float64)
    isa = build_info()["cpu_isa"].removesuffix("_vnni")
    per_round = {"avx512": 6 * 4 * 64, "avx2": 6 * 2 * 32, "baseline": 6 * 2 * 16, "neon": 6 * 4 * 16}[isa]
    assert flop == 3 * 10 * 2 * per_round / (8 if float64 else 4)
    assert result == 1


@pytest.mark.parametrize(("threads", "rounds", "name"), [(0, 1, "threads"), (1, 0, "rounds")])
def test_peak_fma_refuses(threads, rounds, name):
    with pytest.raises(RuntimeError, match=f"_peak_fma: {name} must be at least 1, got 0"):
        torch.ops.xbn_ext._peak_fma(threads, rounds, False)
