"""Who takes part in a comparison. A name and a problem give a call: of a batch `x [B, D]` and `labels [B]`.

kernel      returns
moments     mean [D], std [D] of the batch
transform   bank [M, D], moved to given moments
enqueue     bank [M, D], bank_labels [M], with the batch stored
loss        loss [], dLoss/dx [B, D] of the batch against the bank
step        the same of a training step: moments, transform, loss, enqueue
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from xbn_ext import ops, plain, reference
from xbn_ext._way import loss_way
from xbn_ext.dtypes import is_narrow
from xbn_ext.filter import make_filter
from xbn_ext.losses import AnyLoss
from xbn_ext.memory import CrossBatchMemory
from xbn_ext.options import Way

from .chunked import can_be_chunked
from .clock import Timing, interleaved, timer
from .comparisons import COMPARISONS, OURS, THEIRS, theirs_installed
from .custom_losses import custom, in_chunks, related
from .problem import Problem
from .roofline import tf32_products
from .torch_memory import (
    EMA_MOMENTUM,
    EPS,
    MEASUREMENT_NOISE,
    PROCESS_NOISE,
    Chunked,
    Compiled,
    Eager,
    TorchMemory,
    differentiated,
)

Call = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

DEFERRED = f"{OURS} deferred"
PLAIN = f"{OURS} plain"
CUSTOM = f"{OURS} custom"
RELATED = f"{OURS} related"
IN_CHUNKS = f"{OURS} in chunks"
ALL_PAIRS = f"{OURS} all pairs"
# Those that a CPU computes pair by pair, at least in one of their passes.
PAIR_BY_PAIR = (
    "contrastive", "contrastive_avg", "margin", "mined", "ntxent", "triplet", "triplet_all", "triplet_soft",
)  # fmt: skip
TF32 = " tf32"
BASELINES: dict[str, type[TorchMemory]] = {
    "eager-tuned": TorchMemory,
    "compile": Compiled,
    "chunked": Chunked,
    "eager": Eager,
}
WAYS: list[Way] = ["screen", "halves", "tensor", "simt", "composite"]
ON_CUDA = [*(f"{OURS} {way}" for way in WAYS), f"{OURS} composite{TF32}", *(name + TF32 for name in BASELINES)]
ROUNDS = 21  # whose pairs with a weight are counted
NAMES = [OURS, DEFERRED, PLAIN, CUSTOM, RELATED, IN_CHUNKS, ALL_PAIRS, *BASELINES, THEIRS, *ON_CUDA]


def make(name: str, problem: Problem) -> Call:
    """The call of one implementation, with a memory of its own.

    "xbn_ext plain" is what xbn_ext does without the compiled library; "xbn_ext custom" has the loss as a `CustomLoss`
    that a user would write, "xbn_ext related" in a `SelectPairs` with a relation, "xbn_ext in chunks" that of
    pytorch-metric-learning as an `InChunks`; "xbn_ext all pairs", on a CPU, is without the screen that finds the pairs
    which may have a weight. On CUDA, a name that ends in " tf32" lets library products round to TF32, any other does
    not.
    """
    family = name.removesuffix(TF32)
    if family == THEIRS:
        call = _theirs(problem)
    elif family in BASELINES:
        call = _of_torch(BASELINES[family], problem)
    else:
        loss = _loss_of(name, problem)
        assert loss is not None
        call = _ours_in_step(family, problem, loss) if problem.kernel == "step" else _ours(problem, loss)
    if name == PLAIN:
        call = partial(_without_kernels, call)
    if name == ALL_PAIRS:
        call = partial(_without_screen, call)
    return call if problem.device == "cpu" else partial(_on_cuda, name, call)


def _loss_of(name: str, problem: Problem) -> AnyLoss | None:
    if name == IN_CHUNKS:
        return in_chunks(problem.loss)
    if name == RELATED:
        return related(problem.pair_loss)
    return custom(problem.pair_loss) if name == CUSTOM else problem.pair_loss


def timed(names: list[str], problem: Problem, rounds: int, copies: int) -> dict[str, Timing]:
    """Times implementations in turn, each on so many memories of its own, with a new batch each round."""
    batch = problem.embeddings(problem.batch, seed=2)

    def renew(round: int) -> None:
        for old, new in zip(batch, problem.round(round), strict=True):
            old.copy_(new)

    timers = {}
    for name in names:
        calls = [partial(make(name, problem), *batch) for _ in range(copies)]
        timers[name] = timer(calls, problem.device)
        if timers[name].is_broken:
            raise RuntimeError(f"leave out {name}: it cannot be captured in a CUDA graph: {timers[name].why_no_graph}")
    return interleaved(timers, rounds, renew)


def why_not(name: str, problem: Problem) -> str | None:
    """Why an implementation takes no part in a comparison; None if it does."""
    ranks = problem.kernel in ("loss", "step")
    if name in ON_CUDA and problem.device == "cpu":
        return "for CUDA"
    if name in ON_CUDA and not ranks:
        return "has no product"
    if name == ALL_PAIRS and problem.device != "cpu":
        return "for a CPU"
    if name == ALL_PAIRS and not (ranks and problem.loss in PAIR_BY_PAIR):
        return "has no screen to leave out"
    if name == CUSTOM and not (ranks and custom(problem.pair_loss)):
        return "has no such loss"
    if name == RELATED and not ranks:
        return "has no pairs"
    if name in (THEIRS, IN_CHUNKS) and ranks:
        if COMPARISONS[problem.loss].name is None:
            return "has no such loss"
        if not theirs_installed():
            return "is not installed"
    if name == IN_CHUNKS and not (ranks and in_chunks(problem.loss)):
        return "has no such loss"
    if name == DEFERRED and problem.kernel != "step":
        return "is a way to take a step"
    if name == DEFERRED and problem.drift == "none":
        return "there is no drift to follow"
    in_place = name in (OURS, PLAIN, CUSTOM, RELATED, IN_CHUNKS, ALL_PAIRS)
    if in_place and problem.kernel == "step" and problem.drift != "none" and is_narrow(problem.dtype):
        return "a 16-bit bank is deferred"
    way = name.removeprefix(OURS).strip()
    if way in ("screen", "halves", "tensor", "simt") and (
        problem.dtype != torch.float32 or problem.dim > 1024 or problem.loss == "triplet_all"
    ):
        return "takes float32, D <= 1024 and not all triplets"
    if way in ("screen", "halves", "tensor") and problem.dim % 4:
        return "takes a multiple of four as D"
    if way == "screen" and not problem.pair_loss.takes_screen:
        return "takes contrastive and margin losses"
    if name.removesuffix(TF32) == "chunked" and not ranks:
        return "has no chunks"
    if name.removesuffix(TF32) == "chunked" and not can_be_chunked(problem.pair_loss):
        return f"cannot go through {problem.loss} in chunks"
    if name == "compile" and problem.kernel == "enqueue":
        return "has nothing to fuse"
    if name == THEIRS and not ranks:
        return "has no such part"
    if name == THEIRS and is_narrow(problem.dtype):
        return "has no 16-bit bank"
    return None


def rewrites_bank(name: str, problem: Problem) -> bool:
    """Whether a call writes the whole bank."""
    moves = problem.kernel == "step" and problem.drift != "none" and "deferred" not in name.split() and name != THEIRS
    return moves or problem.kernel == "transform"


def weighted_pairs(problem: Problem) -> float:
    """How many pairs of an anchor with the bank have a weight, on average over the first timed rounds; 0 where nothing
    ranks. One batch has few classes: in some twice as many as in others."""
    if problem.kernel not in ("loss", "step"):
        return 0.0
    m, drift = filled(problem), make_filter(problem.drift, PROCESS_NOISE, MEASUREMENT_NOISE, EMA_MOMENTUM)
    total = 0.0
    for round in range(ROUNDS):
        x, labels = problem.round(round)
        if problem.kernel == "step" and drift is not None:
            ops.track_(m.target_mean, m.target_std, m.variance, m.scale, m.shift, x, None, m.sums, m.count, *drift, EPS)
        _, pairs = ops.memory_loss_and_pairs(
            x, labels, m.bank, m.bank_labels, problem.pair_loss, count=m.count, scale=m.scale, shift=m.shift
        )
        total += float(pairs.sum())
    return total / ROUNDS


def filled(problem: Problem, dtype: torch.dtype | None = None) -> reference.Memory:
    """The state before the first step, on the problem's device, the bank in its dtype or another. For "transform", the
    map that moves the bank to the target is pending."""
    memory = reference.Memory.empty(problem.memory, problem.dim, dtype or problem.dtype)
    for name, t in vars(memory).items():
        setattr(memory, name, t.to(problem.device))
    bank, bank_labels = problem.bank()
    memory.bank.copy_(bank)
    memory.bank_labels.copy_(bank_labels)
    memory.count.fill_(problem.memory)
    memory.sums.copy_(reference.sums_of(memory.bank))
    mean, std = problem.target()
    memory.target_mean.copy_(mean)
    memory.target_std.copy_(std)
    memory.variance.zero_()
    if problem.kernel == "transform":
        moments = reference.bank_moments(memory.sums, memory.count)
        scale, shift = reference.match_moments(*moments, memory.target_mean, memory.target_std, EPS)
        memory.scale.copy_(scale)
        memory.shift.copy_(shift)
    return memory


def _ours(problem: Problem, pair_loss: AnyLoss) -> Call:
    m = filled(problem)

    def moments(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return ops.moments(x)[:2]

    def transform(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        ops.transform_(m.bank, m.sums, m.scale, m.shift, m.count)  # from the second time on by 1 and 0
        return (m.bank,)

    def enqueue(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        ops.enqueue_(m.bank, m.bank_labels, m.sums, m.head, m.count, x, labels, None, m.scale, m.shift)
        return m.bank, m.bank_labels

    def loss(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return differentiated(lambda z: ops.memory_loss(z, labels, m.bank, m.bank_labels, pair_loss, count=m.count), x)

    return {"moments": moments, "transform": transform, "enqueue": enqueue, "loss": loss}[problem.kernel]


def _ours_in_step(name: str, problem: Problem, pair_loss: AnyLoss) -> Call:
    criterion = CrossBatchMemory(
        pair_loss,
        problem.dim,
        problem.memory,
        drift=problem.drift,
        process_noise=PROCESS_NOISE,
        measurement_noise=MEASUREMENT_NOISE,
        ema_momentum=EMA_MOMENTUM,
        update="deferred" if name == DEFERRED else None,
        memory_dtype=problem.dtype,
    ).to(problem.device)
    criterion.fill_from([problem.stored()])
    mean, std = problem.target()
    criterion.target_mean.copy_(mean)
    criterion.target_std.copy_(std)
    return lambda x, labels: differentiated(lambda z: criterion(z, labels), x)


def _of_torch(kind: type[TorchMemory], problem: Problem) -> Call:
    memory = kind(*problem.bank(), problem.pair_loss, problem.drift, problem.target())

    def transform(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        memory.transform()
        return (memory.bank,)

    def enqueue(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        memory.enqueue(x, labels)
        return memory.bank, memory.labels

    calls: dict[str, Call] = {
        "moments": lambda x, labels: memory.moments(x),
        "transform": transform,
        "enqueue": enqueue,
        "loss": memory.rank,
        "step": memory.step,
    }
    return calls[problem.kernel]


def _theirs(problem: Problem) -> Call:
    """A step of pytorch-metric-learning's memory moves nothing and measures nothing: it stores the batch and then ranks
    it, against the memory alone."""
    comparison = COMPARISONS[problem.loss]
    bank, bank_labels = problem.bank()
    loss, miner = comparison.their_parts()
    kind = import_module("pytorch_metric_learning.losses").CrossBatchMemory
    criterion = kind(loss, embedding_size=problem.dim, memory_size=problem.memory, miner=miner)
    criterion.embedding_memory, criterion.label_memory, criterion.has_been_filled = bank, bank_labels, True
    against_bank = comparison.theirs()

    def value(z: Tensor, labels: Tensor) -> Tensor:
        if problem.kernel == "loss":
            return against_bank(z, labels, bank, bank_labels)
        return criterion(z, labels) / comparison.divisor(len(z))  # type: ignore[no-any-return]

    return lambda x, labels: differentiated(lambda z: value(z, labels), x)


def _without_kernels(call: Call, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    with ops.over(plain):
        return call(x, labels)


def _without_screen(call: Call, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    with loss_way("simt"):
        return call(x, labels)


def _on_cuda(name: str, call: Call, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    words = name.removeprefix(OURS).split()
    with tf32_products("tf32" in words), loss_way(next((way for way in WAYS if way in words), "auto")):
        return call(x, labels)
