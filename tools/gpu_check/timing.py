"""Part B: how long the kernels take, beside PyTorch and beside what the machine could do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from xbn_ext import Contrastive, CrossBatchMemory, backend, ops
from xbn_ext._backend import Backend
from xbn_ext.bench.torch_memory import MEASUREMENT_NOISE, PROCESS_NOISE, Compiled, Eager, TorchMemory

from .clock import Call, measure, peak_megabytes
from .report import threshold
from .run import Job, Row

SHAPES = [  # the last ones are left out where time is short
    (64, 60_000, 512), (64, 60_000, 128), (256, 60_000, 512), (1024, 60_000, 512), (64, 1_000_000, 512),
    (64, 200_000, 512), (4096, 60_000, 512), (1024, 200_000, 512), (64, 26_000, 512), (256, 1_000_000, 512),
    (4096, 60_000, 1024), (4096, 1_000_000, 512),
]  # fmt: skip
COMPILED = [(64, 60_000, 512), (64, 1_000_000, 512), (256, 60_000, 512), (1024, 60_000, 512)]
CROSSOVER = [(B, 60_000, 512) for B in (64, 128, 256, 512, 1024, 2048, 4096)]
SMALL = [(4, 70, 16), (8, 130, 33)]

CLASSES = 11_318
COLD_BYTES = 512e6  # banks of a sample together: ten times the second-level cache of an H100
BATCH_NEG_MARGIN = 0.5
POS_MARGIN = 0.9  # of a step
LOSS_WAYS = ["tensor", "simt", "composite", "composite tf32", "torch", "torch tf32"]
BACKENDS: list[Backend] = ["simt", "tensor", "composite"]
BANK_KERNELS = ["transform_", "standardize_", "track_", "enqueue_"]
STEP_WAYS = ["xbn_ext", "xbn_ext tensor", "xbn_ext deferred", "xbn_ext tf32", "eager", "eager-tuned",
             "eager-tuned tf32"]  # fmt: skip


def random_unit(rows: int, D: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows, and labels of four rows to a class as a P x K sampler gives."""
    generator = torch.Generator(device).manual_seed(seed)
    x = F.normalize(torch.randn(rows, D, generator=generator, device=device), dim=1)
    labels = torch.randint(CLASSES, ((rows + 3) // 4,), generator=generator, device=device)
    return x, labels.repeat_interleave(4)[:rows]


def loss_cases(shapes: Iterable[tuple[int, int, int]]) -> list[Row]:
    """Densities: share of the negatives that are active. Only the sweep's time depends on it."""
    rows = []
    for B, M, D in shapes:
        for way in LOSS_WAYS:
            for density in (0.0, 1e-3, 0.1) if way == "tensor" else (1e-3,):
                rows.append({"kernel": "loss", "B": B, "M": M, "D": D, "way": way, "density": density})
    return rows


def crossover_cases(shapes: Iterable[tuple[int, int, int]]) -> list[Row]:
    return [row | {"kernel": "crossover"} for row in loss_cases(shapes) if "torch" not in row["way"]
            and row["density"] == 1e-3]  # fmt: skip


def bank_cases(shapes: Iterable[tuple[int, int, int]]) -> list[Row]:
    rows, seen = [], set()
    for B, M, D in shapes:
        for kernel in BANK_KERNELS:
            size = (kernel, M, D) if kernel in ("transform_", "standardize_") else (kernel, B, D)
            if size in seen:
                continue
            seen.add(size)
            ways = ["xbn_ext"] if kernel == "standardize_" else ["xbn_ext", "torch"]
            rows += [{"kernel": kernel, "B": B, "M": M, "D": D, "way": way} for way in ways]
    return rows


def step_cases(shapes: Iterable[tuple[int, int, int]]) -> list[Row]:
    """TF32 changes only what goes through library products: the larger batches."""
    return [
        {"kernel": "step", "B": B, "M": M, "D": D, "way": way}
        for B, M, D in shapes
        for way in STEP_WAYS
        if way != "xbn_ext tf32" or threshold() <= B
    ]


def compile_cases(shapes: Iterable[tuple[int, int, int]]) -> list[Row]:
    ways = ["compile", "compile tf32"]
    return [{"kernel": "step", "B": B, "M": M, "D": D, "way": way} for B, M, D in shapes for way in ways]


CASES = {"loss": loss_cases, "crossover": crossover_cases, "bank": bank_cases, "step": step_cases,
         "compile": compile_cases}  # fmt: skip
SHAPES_OF = {"compile": COMPILED, "crossover": CROSSOVER}


def worker(job: Job) -> None:
    """Times the cases of the group that the job names."""
    group = job.options["group"]
    shapes = SMALL if job.device == "cpu" else SHAPES_OF.get(group, SHAPES)
    ceilings = job.options.get("ceilings") or {}
    seconds = 0.002 if job.device == "cpu" else 0.4
    job.each(CASES[group](shapes), lambda **case: time_case(case, job.device, ceilings, seconds))


def time_case(case: Row, device: str, ceilings: dict[str, float], seconds: float) -> Row:
    """A row: the time, what it means in bandwidth and arithmetic, and as a share of the ceiling that binds."""
    way = case["way"].split()[0]
    if way == "compile":
        torch.compiler.reset()  # it gives up on a function that it has compiled for eight shapes
    torch.set_float32_matmul_precision("high" if case["way"].endswith("tf32") else "highest")
    try:
        forced = [name for name in BACKENDS if name in case["way"].split()]
        with backend(forced[0] if forced else "auto"):
            copies = 1 if device == "cpu" else math.ceil(COLD_BYTES / (4 * case["M"] * case["D"]))
            calls = _prepare(case, device, copies)
            peak = peak_megabytes(calls[0], device)
            timing = measure(calls, device, seconds)
    except torch.OutOfMemoryError as error:
        if forced or way == "xbn_ext":
            raise
        return {"out of memory": str(error)[:200]}
    finally:
        torch.set_float32_matmul_precision("highest")
    megabytes, gflop, needed = work_of(case)
    seconds_each = timing.us * 1e-6
    row = {name: value for name, value in asdict(timing).items() if value != "" and value is not False} | {
        "peak_mb": peak,
        "gb_s": round(megabytes / 1e3 / seconds_each, 1),
        "tflop_s": round(gflop / 1e3 / seconds_each, 3),
    }
    if "copy" in ceilings and "fp32" in ceilings and "tf32" in ceilings:
        arithmetic = ceilings["tf32"] if case["way"].endswith("tf32") else ceilings["fp32"]
        if "tensor" in case["way"]:
            arithmetic = ceilings["tf32"] / 3  # products for one to the digits of float32
        by_memory, by_arithmetic = megabytes / 1e3 / ceilings["copy"], needed / 1e3 / arithmetic
        row["bound"] = "memory" if by_memory > by_arithmetic else "math"
        row["of_ceiling"] = round(100 * max(by_memory, by_arithmetic) / seconds_each, 1)
    return row


def work_of(case: Row) -> tuple[float, float, float]:
    """Megabytes that have to be moved, GFLOP of the dense products, GFLOP of them that cannot be skipped.

    The sweep skips a row in the gradient product unless one of 64 anchors has an active pair with it.
    """
    B, M, D, kernel = case["B"], case["M"], case["D"], case["kernel"]
    if kernel == "track_":
        return 4e-6 * B * D, 0, 0
    if kernel == "enqueue_":  # read, write, and read what leaves
        return 12e-6 * B * D, 0, 0
    if kernel == "standardize_":  # nothing to do: a look at the sums
        return 16e-6 * D, 0, 0
    if kernel == "transform_":
        return 8e-6 * M * D, 0, 0
    half = 2e-9 * B * M * D
    in_place = kernel == "step" and case["way"] != "xbn_ext deferred"
    needed = 2 * half
    if case["way"] in ("simt", "tensor"):
        active = case["density"] + 1 / CLASSES
        needed = half * (2 - (1 - min(active, 1.0)) ** min(B, 64))
    return 1e-6 * (M * (8 * D if in_place else 4 * D) + 8 * M + 12 * B * D), 2 * half, needed


def margin_of_density(z: Tensor, bank: Tensor, density: float) -> float:
    """The margin that leaves about this share of the negatives active."""
    if density == 0:
        return 2.0
    s = z[:64] @ F.normalize(bank[:16384], dim=1).T
    return float(torch.quantile(s.flatten(), 1 - density))


def _prepare(case: Row, device: str, copies: int) -> list[Call]:
    """The calls to be timed, each on a bank of its own."""
    B, M, D = case["B"], case["M"], case["D"]
    x, labels = random_unit(B, D, device, seed=1000)
    calls = []
    neg_margin = BATCH_NEG_MARGIN
    for copy in range(copies):
        bank, bank_labels = random_unit(M, D, device, seed=copy)
        if "density" in case and copy == 0:
            neg_margin = margin_of_density(x, bank, case["density"])
        calls.append(_call(case, x, labels, bank, bank_labels, neg_margin))
    return calls


def _call(case: Row, x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, neg_margin: float) -> Call:
    kernel, way, (M, D) = case["kernel"], case["way"], bank.shape
    if kernel in ("loss", "crossover"):
        loss, count = Contrastive(neg_margin=neg_margin), torch.tensor(M, device=bank.device)
        if way.startswith("torch"):
            tuned = TorchMemory(bank, bank_labels, loss)
            return lambda: tuned.rank(x, labels)

        def rank() -> object:
            z = x.detach().requires_grad_()  # a new leaf each time: autograd ties a leaf to the stream of its first use
            value = ops.memory_loss(z, labels, bank, bank_labels, loss, count=count)
            return torch.autograd.grad(value, z)

        return rank
    if kernel == "step":
        return _step(way, x, labels, bank, bank_labels, neg_margin)
    if way == "torch":
        memory = TorchMemory(bank, bank_labels, Contrastive(neg_margin=neg_margin))
        return {"transform_": memory.transform, "track_": lambda: memory.track(x),
                "enqueue_": lambda: memory.enqueue(x, labels)}[kernel]  # fmt: skip
    m = CrossBatchMemory(Contrastive(), D, M).to(bank.device)
    m.fill_from([(bank, bank_labels)])
    m.scale.fill_(1)
    return {
        "transform_": lambda: ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count),
        "standardize_": _standardized(m),
        "track_": lambda: ops.track_(m.target_mean, m.target_std, m.variance, m.scale, m.shift, x, None, m.sums,
                                     m.count, PROCESS_NOISE, MEASUREMENT_NOISE),
        "enqueue_": lambda: m._store(x, labels, None),
    }[kernel]  # fmt: skip


def _standardized(m: CrossBatchMemory) -> Call:
    """standardize_ where it is called at every step: after the first time, there is nothing to do."""
    return lambda: ops.standardize_(m.bank, m.sums, m.scale, m.shift, m.count)


def _step(way: str, x: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, neg_margin: float) -> Call:
    """Every step stores the same batch, so that the bank fills with copies of it. They are within the positive margin:
    else they would be active, a tile full of them in the block that has the newest rows, as in no training."""
    loss = Contrastive(POS_MARGIN, neg_margin)
    if way.startswith("xbn_ext"):
        criterion = CrossBatchMemory(
            loss, bank.shape[1], len(bank), process_noise=PROCESS_NOISE,
            measurement_noise=MEASUREMENT_NOISE, update="deferred" if "deferred" in way else "inplace",
        ).to(bank.device)  # fmt: skip
        criterion.fill_from([(bank, bank_labels)])

        def step() -> object:
            z = x.clone().requires_grad_()
            return torch.autograd.grad(criterion(z, labels), z)

        return step
    kind = {"eager": Eager, "eager-tuned": TorchMemory, "compile": Compiled}
    memory = kind[way.split()[0]](bank, bank_labels, loss)
    return lambda: memory.step(x, labels)
