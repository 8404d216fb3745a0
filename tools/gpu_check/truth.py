"""`memory_loss` on random shapes and options against the float64 reference, in every way a GPU has.

A hinge loss is discontinuous: a pair so close to a margin that rounding decides may count or not, and the gradient
jumps by that pair's whole share. The budgets count such pairs; in half of the cases the margins are so wide that every
pair is active, no pair is that close, and the budget is rounding alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Row
from xbn_ext import Contrastive, loss_way, ops, reference

from .run import Job

BATCHES = [1, 2, 63, 64, 65, 127, 200, 1024]
MEMORIES = [1, 15, 64, 65, 1000, 60007]
DIMS = [1, 7, 64, 100, 128, 257, 512, 768, 1024, 1500]
WAYS = ["simt", "tensor", "screen", "halves", "composite", "composite tf32", "composite float64"]
SWEEP_MAX_DIM = 1024
BANKS = ["", "", "float16", "bfloat16"]  # dtype of the bank; "": that of the anchors
TF32_UNIT = 2.0**-10  # of an operand whose lower bits are cut off


def cases(small: bool = False, n: int = 400, seed: int = 0) -> list[Row]:
    """Random combinations, the same for the same seed; `small`: sizes for a CPU."""
    draw = random.Random(seed)
    batches, memories, dims = BATCHES, MEMORIES, DIMS
    if small:
        batches, memories, dims = [1, 2, 63, 65], [1, 15, 64, 65, 300], [1, 7, 64, 100]
    result = []
    for i in range(n):
        row: Row = {"seed": i, "way": draw.choice(WAYS)}
        row |= {"B": draw.choice(batches), "M": draw.choice(memories), "D": draw.choice(dims)}
        if row["way"] in ("simt", "tensor", "screen", "halves") and row["D"] > SWEEP_MAX_DIM:
            row["way"] = "composite"
        row |= {
            "reduction": draw.choice(["mean", "avg_nonzero"]),
            "all_active": draw.random() < 0.5,
            "renormalize": draw.random() < 0.8,
            "count": draw.choice([None, None, 1.0, 0.6, 0.0]),  # share of the bank that is filled
            "pending": draw.random() < 0.5,
            "exclude": draw.random() < 0.5,
            "anchors": draw.random() < 0.5,
            "unaligned": draw.choice(["", "", "z", "bank", "z bank"]),
            "bank": draw.choice(BANKS),
        }
        result.append(row)
    return result


@dataclass
class Problem:
    """One call of memory_loss."""

    z: Tensor
    labels: Tensor
    bank: Tensor
    bank_labels: Tensor
    loss: Contrastive
    options: dict[str, Tensor | bool | None]

    @property
    def rows(self) -> Tensor:
        """The bank rows that exist, as they count, in float64."""
        rows = self.bank[: len(self.bank) if self.count is None else int(self.count)].double()
        scale, shift = self.options.get("scale"), self.options.get("shift")
        if isinstance(scale, Tensor) and isinstance(shift, Tensor):
            rows = rows * scale + shift
        return rows

    @property
    def count(self) -> Tensor | None:
        count = self.options.get("count")
        return count if isinstance(count, Tensor) else None

    def run(self, function: Callable[..., Tensor], z: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        value = function(z, self.labels, bank, self.bank_labels, self.loss, **self.options)
        (grad,) = torch.autograd.grad(value, z)
        return value.detach(), grad


def make(case: Row, device: str) -> Problem:
    """Anchors and bank rows around shared centres: positives and negatives lie on both sides of the margins."""
    B, M, D, classes = case["B"], case["M"], case["D"], 20
    dtype = torch.float64 if case["way"] == "composite float64" else torch.float32
    torch.manual_seed(case["seed"])
    random_like: dict[str, Any] = {"device": device, "dtype": torch.float64}
    centres = torch.randn(classes, D, **random_like)
    labels, bank_labels = (torch.randint(classes, (n,), device=device) for n in (B, M))
    z = F.normalize(centres[labels] + torch.randn(B, D, **random_like), dim=1)
    bank = (centres[bank_labels] + torch.randn(M, D, **random_like)) * (0.1 + torch.rand(M, 1, **random_like))
    options: dict[str, Tensor | bool | None] = {"renormalize": case["renormalize"]}
    if case["count"] is not None:
        options["count"] = torch.tensor(int(case["count"] * M), device=device)
    if case["pending"]:
        options["scale"] = 0.5 + torch.rand(D, **random_like)
        options["shift"] = 0.1 * torch.randn(D, **random_like)
    if case["exclude"]:
        options["exclude"] = torch.randint(-1, M, (B,), device=device)
    if case["anchors"]:
        options["anchors"] = torch.rand(B, device=device) < 0.6
    problem = Problem(
        _placed(z.to(dtype), "z" in case["unaligned"]), labels - 2,
        _placed(bank.to(getattr(torch, case["bank"] or str(dtype)[6:])), "bank" in case["unaligned"]), bank_labels - 2,
        Contrastive(0.9, 0.2, case["reduction"]), options,
    )  # fmt: skip
    if case["all_active"]:
        margin = 2 * _largest_row(problem)  # twice what any similarity can be
        problem.loss = Contrastive(margin, -margin, case["reduction"])
    return problem


def _largest_row(p: Problem) -> float:
    """The largest norm of a row as the loss sees it: a similarity is never larger."""
    rows = p.rows
    return 1.0 if p.options["renormalize"] or not rows.numel() else float(rows.norm(dim=1).max())


def _placed(x: Tensor, unaligned: bool) -> Tensor:
    """The same values at an address that no vector load can use, or at a good one."""
    if not unaligned:
        return x.clone()
    buffer = x.new_empty(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def poison(device: str) -> None:
    """Sees to it that the memory which the next calls get is full of NaN."""
    if device == "cpu":
        return
    torch.cuda.empty_cache()  # else a block that somebody else filled would be taken
    blocks = [torch.full((size,), torch.nan, device=device) for size in [1 << 18] * 16 + [1 << 27]]
    del blocks


@dataclass
class Budget:
    """How far value and gradient may be from the truth, in absolute numbers."""

    value: float
    grad: Tensor  # [B]
    grad_norm: float | None  # norm of the whole gradient's error; None: not asked for


def budget(p: Problem, value: Tensor, grad: Tensor, torch_value: Tensor, torch_grad: Tensor, tf32: bool) -> Budget:
    """From what PyTorch loses in the same dtype, and from the pairs that hang on rounding."""
    rows = p.rows
    s = reference.similarity(p.z.double(), rows, bool(p.options["renormalize"]))
    largest = _largest_row(p)
    eps = torch.finfo(p.z.dtype).eps
    width = (2 * TF32_UNIT if tf32 else 64 * eps) * largest
    pair = torch.ones_like(s, dtype=torch.bool)
    exclude, anchors = p.options.get("exclude"), p.options.get("anchors")
    if isinstance(exclude, Tensor):
        pair = exclude[:, None] != torch.arange(len(rows), device=s.device)
    if isinstance(anchors, Tensor):
        pair = pair & anchors[:, None]
    positive = p.labels[:, None] == p.bank_labels[None, : len(rows)]
    ranking = int(anchors.sum()) if isinstance(anchors, Tensor) else len(p.z)

    torch_error = 0.0 if tf32 else float((torch_value - value).abs())
    value_budget = 4 * torch_error + 64 * eps * float(value.abs())
    grad_budget = torch.zeros(len(p.z), dtype=torch.float64, device=s.device)
    flips, noise = 0, 0.0
    for kind, above in ((pair & positive, p.loss.pos_margin - s), (pair & ~positive, s - p.loss.neg_margin)):
        close = (kind & (above.abs() < width)).sum(1)
        active = (kind & (above > -width)).sum(1)
        ambiguous, counted = int(close.sum()), int((kind & (above > 0)).sum())
        flips += ambiguous
        pairs = ranking if p.loss.reduction == "mean" else counted
        share = 1 / max(pairs if p.loss.reduction == "mean" else pairs - ambiguous, 1)
        moves = 0 if p.loss.reduction == "mean" else ambiguous * share  # of the number that is divided by
        value_budget += share * width * int(active.sum()) + moves * float(value.abs())
        grad_budget += 2 * share * largest * close + 2 * moves * largest
        grad_budget += 2 * (TF32_UNIT if tf32 else eps) * share * largest * active  # every row is rounded
        noise += (share * largest) ** 2 * int(active.sum())
    scale = float(grad.abs().max()) if grad.numel() else 0.0
    if not tf32:
        torch_error = float((torch_grad - grad).abs().max()) if flips == 0 and grad.numel() else 0.0
        grad_budget += 4 * torch_error + (64 + len(rows) ** 0.5) * eps * scale
    # With TF32 the bound above, for the worst case, is wide; but errors of different rows do not add up.
    norm = 4 * TF32_UNIT * (float(grad.norm()) + noise**0.5) if tf32 and flips == 0 else None
    return Budget(value_budget, grad_budget, norm)


def check(case: Row, device: str) -> Row:
    """One case, twice: within budget, and the same bits both times. Errors are reported as shares of the budget."""
    tf32 = case["way"] == "composite tf32"
    p = make(case, device)
    value, grad = p.run(reference.memory_loss, p.z.double(), p.bank.double())
    torch_value, torch_grad = p.run(reference.memory_loss, p.z, p.bank.to(p.z.dtype))
    allowed = budget(p, value, grad, torch_value, torch_grad, tf32)
    runs = []
    with loss_way(case["way"].split()[0]):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            for _ in range(2):
                poison(device)
                runs.append(p.run(ops.memory_loss, p.z, p.bank))
        finally:
            torch.set_float32_matmul_precision("highest")
    ours, our_grad = runs[0]
    repeats = torch.equal(ours, runs[1][0]) and torch.equal(our_grad, runs[1][1])
    value_share = _share(float((ours - value).abs()), allowed.value)
    grad_share = max((_share(e, b) for e, b in zip(
        (our_grad - grad).abs().amax(1).tolist(), allowed.grad.tolist(), strict=True)), default=0.0)  # fmt: skip
    norm = float((our_grad.double() - grad).norm())
    norm_share = 0.0 if allowed.grad_norm is None else _share(norm, allowed.grad_norm)
    ok = repeats and max(value_share, grad_share, norm_share) <= 1
    return {"ok": ok, "same_bits": repeats, "value": value_share, "grad": grad_share, "norm": norm_share}


def _share(error: float, allowed: float) -> float:
    """Error over budget; a huge number for NaN."""
    if error == 0:
        return 0.0
    return round(error / allowed, 4) if error / max(allowed, 1e-300) < 1e9 else 1e9


def worker(job: Job) -> None:
    small = job.device == "cpu"
    job.each(cases(small, job.options.get("n", 400)), lambda **case: check(case, job.device))
