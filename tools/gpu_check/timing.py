"""How long the kernels and the whole step take, as shares of what the machine could do; and the same in PyTorch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clock import Call, timer
from benchmarks.comparisons import COMPARISONS
from benchmarks.implementations import rewrites_bank
from benchmarks.memory import peak_on_cuda
from benchmarks.problem import Problem
from benchmarks.roofline import Machine, bound_of, shares, tf32_products, work_of
from benchmarks.table import Row
from benchmarks.torch_memory import MEASUREMENT_NOISE, PROCESS_NOISE, Compiled, Eager, TorchMemory, differentiated
from xbn_ext import Contrastive, CrossBatchMemory, loss_way, ops
from xbn_ext.options import WAYS

from .run import Job

Shape = tuple[int, int, int]  # B, M, D

SHAPES: list[Shape] = [
    (64, 60_000, 512), (64, 1_000_000, 512), (64, 60_000, 128), (256, 60_000, 512), (1024, 60_000, 512),
]  # fmt: skip
SMALL: list[Shape] = [(4, 70, 16), (8, 130, 32)]

TRAINED = Problem.density  # share of the negatives that are active
DENSITIES = (0.0, 1e-3, TRAINED)
POS_MARGIN = 0.9
FUSED = ("simt", "tensor", "screen")
OTHER_LOSSES = ["supcon", "ntxent", "multi_similarity", "triplet"]
SETTLING = 30  # steps, until the filter has brought the memory to where it stays


def worker(job: Job) -> None:
    """Times the cases of the groups that the job names."""
    small = job.device == "cpu"
    shapes, seconds = (SMALL, 0.002) if small else (SHAPES, 0.2)
    ways = job.options.get("ways") or [way for way in WAYS if way != "auto"]
    cases = [case for group in job.options["groups"] for case in GROUPS[group](shapes, ways)]
    machine = job.options.get("ceilings") or {}
    job.each(cases, lambda **case: time_case(case, job.device, machine, seconds))


# --- What is timed --------------------------------------------------------------------------------------------------


def case_of(kernel: str, shape: Shape, way: str, **more: Any) -> Row:
    return {"kernel": kernel, **dict(zip("BMD", shape, strict=True)), "way": way, **more}


def loss_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    """memory_loss and its gradient. How many pairs are active makes a difference to some ways: all densities of two
    shapes. Ordinary arithmetic is slow and known: one shape. Library products need a large batch. Halves are for losses
    in which every pair weighs."""
    rows = []
    for shape in shapes:
        all_densities = shape in shapes[:2]
        for way in ways:
            if way in ("simt", "halves") and shape != shapes[0]:
                continue
            if way == "composite":
                if shape[0] >= 256 or shape in SMALL:
                    rows += [case_of("loss", shape, f"composite{tf32}", density=TRAINED) for tf32 in ("", " tf32")]
                continue
            rows += [case_of("loss", shape, way, density=x) for x in DENSITIES if all_densities or x == TRAINED]
    for name in OTHER_LOSSES:
        rows += [case_of(name, shapes[0], way) for way in ways if way in ("simt", "tensor", "halves")]
    rows += [case_of("supcon", shape, way) for shape in shapes[1:4] for way in ways if way in ("tensor", "halves")]
    rows += [case_of("loss", shapes[0], f"{way} float16", density=TRAINED) for way in ways if way != "simt"]
    return rows


def bank_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    """Passes over the bank; and over the batch, a small and a large one."""
    of_bank = [("transform_", shape) for shape in shapes[:3]] + [("standardize_", shapes[0])]
    names = ("normalize", "track_", "enqueue_", "batch_loss")
    of_batch = [(name, shape) for name in names for shape in (shapes[0], shapes[-1])]
    return [case_of(kernel, shape, "xbn_ext") for kernel, shape in of_bank + of_batch]


def step_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    """Every way in place; and what it would be if the memory were not written."""
    rows = []
    for shape in shapes:
        wanted = [way for way in ("auto", *ways) if way not in ("simt", "halves", "composite")]
        for way in wanted:
            densities = DENSITIES if shape == shapes[0] else (TRAINED,)
            rows += [case_of("step", shape, way, density=x) for x in densities]
            rows.append(case_of("step", shape, f"{way} deferred", density=TRAINED))
            if shape == shapes[0]:
                rows.append(case_of("step", shape, f"{way} deferred float16", density=TRAINED))
        if shape[0] >= 512:
            rows.append(case_of("step", shape, "auto tf32", density=TRAINED))
    return rows


def launch_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    """Which kernels a step is made of."""
    wanted = [way for way in ("auto", *ways) if way not in ("simt", "composite")]
    return [case_of("launches", shapes[0], way, density=TRAINED) for way in (*wanted, f"{wanted[-1]} deferred")]


def rule_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    """What the rules of `auto` rest on: small memories, and more active pairs than a trained run has."""
    fused = [way for way in ways if way in FUSED]
    small = [(64, M, D) for M in (256, 1024, 4096, 16_384) for D in (128, 512)] if shapes is SHAPES else shapes[:1]
    rows = [case_of("loss", shape, way, density=TRAINED) for shape in small for way in fused]
    dense = [way for way in fused if way != "simt"]
    rows += [case_of("loss", shapes[0], way, density=x) for x in (0.03, 0.1) for way in dense]
    return rows + [case_of("loss", (4096, *shapes[-1][1:]), way, density=TRAINED)
                   for way in ways if way in ("screen", "composite") and shapes is SHAPES]  # fmt: skip


def torch_loss_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    return [case_of("loss", shape, way, density=TRAINED) for shape in shapes for way in ("torch", "torch tf32")]


def torch_step_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    ways = ["eager", "eager-tuned", "eager-tuned tf32"]
    return [case_of("step", shape, way, density=TRAINED) for shape in shapes for way in ways]


def compile_cases(shapes: list[Shape], ways: list[str]) -> list[Row]:
    return [case_of("step", shape, way, density=TRAINED) for shape in shapes for way in ("compile", "compile tf32")]


GROUPS: dict[str, Callable[[list[Shape], list[str]], list[Row]]] = {
    "loss": loss_cases, "rules": rule_cases, "bank": bank_cases, "step": step_cases, "launches": launch_cases,
    "loss of torch": torch_loss_cases, "step of torch": torch_step_cases, "compile": compile_cases,
}  # fmt: skip


# --- How ------------------------------------------------------------------------------------------------------------


def time_case(case: Row, device: str, machine: Machine, seconds: float) -> Row:
    """A row: the time, what it means in bandwidth and arithmetic, and as a share of the roof."""
    words = case["way"].split()
    if words[0] == "compile":
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
    forced = words[0] if words[0] in WAYS else "auto"
    problem = problem_of(case, device)
    try:
        with tf32_products("tf32" in words), loss_way(forced):  # type: ignore[arg-type]
            if case["kernel"] == "launches":
                return launches(calls_of(case | {"kernel": "step"}, device, 1)[0], device)
            calls = calls_of(case, device, problem.cold_copies)
            peak = None if device == "cpu" else peak_on_cuda(calls[0])
            clock = timer(calls, device)
            timing = clock.timing(clock.run_for(seconds))
    except torch.OutOfMemoryError as error:
        if "eager" not in words[0] and words[0] not in ("torch", "compile"):
            raise
        return {"out of memory": str(error)[:200]}
    row = {name: value for name, value in asdict(timing).items() if value != "" and value is not False}
    work = work_of(problem, rewrites_bank(case["way"], problem), pairs_of(case))
    measured = machine.keys() >= {"read", "copy", "float32"}
    bound = bound_of(work, machine, problem, case["way"]) if measured else None
    return row | {"peak_mb": peak} | shares(work, bound, timing)


def problem_of(case: Row, device: str) -> Problem:
    other = case["kernel"] in OTHER_LOSSES
    return Problem(
        "loss" if other else case["kernel"].rstrip("_"), case["B"], case["M"], case["D"],
        loss=case["kernel"] if other else "contrastive",
        dtype=torch.float16 if "float16" in case["way"] else torch.float32, device=device,
    )  # fmt: skip


def pairs_of(case: Row) -> float:
    """How many pairs of an anchor have a weight: what the margin was made for."""
    if case["kernel"] == "triplet":
        return 2
    if case["kernel"] == "batch_loss":
        return float(TRAINED * case["B"])
    density = case.get("density", 1.0) + 1 / Problem.classes
    return float(case["M"] * min(1.0, density))


def margin_of_density(z: Tensor, bank: Tensor, density: float) -> float:
    """The margin that leaves about this share of the negatives active."""
    if density == 0:
        return 2.0
    s = z[:64] @ F.normalize(bank[:16384], dim=1).T
    return float(torch.quantile(s.flatten(), 1 - density))


def calls_of(case: Row, device: str, copies: int) -> list[Call]:
    """The calls to be timed, each on a bank of its own."""
    problem = problem_of(case, device)
    x, labels = problem.embeddings(case["B"], seed=1000)
    make = _step if case["kernel"] == "step" else _call
    return [make(case, x, labels, *problem.embeddings(case["M"], seed=copy)) for copy in range(copies)]


def _call(case: Row, x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Call:
    kernel, way, (M, D) = case["kernel"], case["way"], bank.shape
    if kernel == "batch_loss":
        loss = Contrastive(POS_MARGIN, margin_of_density(x, x, TRAINED))
        return lambda: differentiated(lambda z: ops.batch_loss(z, labels, loss), x)
    if kernel == "loss" or kernel in OTHER_LOSSES:
        margin = margin_of_density(x, bank, case.get("density", 0.0))
        pair_loss = Contrastive(POS_MARGIN, margin) if kernel == "loss" else COMPARISONS[kernel].loss
        if way.startswith("torch"):
            tuned = TorchMemory(bank, bank_labels, pair_loss)
            return lambda: tuned.rank(x, labels)
        stored, count = bank.half() if "float16" in way else bank, torch.tensor(M, device=bank.device)
        return lambda: differentiated(
            lambda z: ops.memory_loss(z, labels, stored, bank_labels, pair_loss, count=count), x
        )
    m = CrossBatchMemory(Contrastive(), D, M).to(bank.device)
    m.fill_from([(bank, bank_labels)])
    m.scale.fill_(1)
    calls: dict[str, Call] = {
        "normalize": lambda: ops.normalize(x),
        "transform_": lambda: ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count),
        "standardize_": lambda: ops.standardize_(m.bank, m.sums, m.scale, m.shift, m.count),  # nothing to do
        "track_": lambda: ops.track_(m.target_mean, m.target_std, m.variance, m.scale, m.shift, x, None, m.sums,
                                     m.count, PROCESS_NOISE, MEASUREMENT_NOISE),
        "enqueue_": lambda: ops.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, x, labels, None, m.scale,
                                         m.shift, bank_ids=m.bank_ids, bank_steps=m.bank_steps, step=m.step),
    }  # fmt: skip
    return calls[kernel]


def _step(case: Row, x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor) -> Call:
    """A training step. Every one stores the same batch, at the same place: else the memory would fill with copies of
    it, as in no training. The margin is that of the memory as the filter leaves it."""
    way, (M, D) = case["way"], bank.shape
    update: Literal["inplace", "deferred"] = "deferred" if "deferred" in way else "inplace"
    kind = {"eager": Eager, "eager-tuned": TorchMemory, "compile": Compiled}.get(way.split()[0])
    if kind is not None:
        plain = kind(bank, bank_labels, Contrastive(POS_MARGIN, margin_of_density(x, bank, case["density"])))

        def step_of_torch() -> object:
            plain.head.zero_()
            return plain.step(x, labels)

        return step_of_torch

    def memory(neg_margin: float) -> CrossBatchMemory:
        loss = Contrastive(POS_MARGIN, neg_margin)
        return CrossBatchMemory(
            loss, D, M, process_noise=PROCESS_NOISE, measurement_noise=MEASUREMENT_NOISE, update=update,
            memory_dtype=problem_of(case, str(bank.device)).dtype,
        ).to(bank.device)  # fmt: skip

    def step() -> object:
        criterion.head.zero_()
        return differentiated(lambda z: criterion(z, labels), x)

    criterion = memory(2.0)
    criterion.fill_from([(bank, bank_labels)])
    for _ in range(SETTLING):
        step()
    state, criterion = criterion.state_dict(), memory(margin_of_density(x, criterion.embedding_memory, case["density"]))
    criterion.load_state_dict(state)
    return step


def launches(call: Call, device: str) -> Row:
    """The kernels of a call and how long each took, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    if device == "cpu":
        call()
        return {"launches": 0, "kernels": []}
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    us: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profiled.events() or []:
        if event.device_type.name == "CUDA":
            name = short_name(event.name)
            us[name] += event.device_time / 5
            count[name] += 1
    return {
        "launches": sum(count.values()) / 5,
        "us": round(sum(us.values()), 1),
        "kernels": [[name, count[name] / 5, round(value, 2)] for name, value in us.most_common(40)],
    }


def short_name(kernel: str) -> str:
    """A kernel's name without its namespaces and most of its template's arguments."""
    found = re.search(r"(\w+_kernel\w*(?:<[\w, ]{0,12})?)", kernel)
    return (found[1] if found else kernel)[:60]
