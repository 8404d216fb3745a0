"""What each op accepts, where it is not compiled: `csrc/glue/contract.h` in Python. The messages are the same, except
that a dtype is called torch.float16 here and Half there.

Every op of `plain.py` calls these first, so that nothing is written on bad input. Only shapes, dtypes, devices and
layouts are looked at, and on a CPU the values of counters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .chunked import reads
from .losses import Circle, Contrastive, MultiSimilarity, NTXent, PairLoss, SupCon, Triplet

BANK_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PARAMETERS = {
    "contrastive": 2, "contrastive_mean": 2, "supcon": 1, "ntxent": 1, "multi_similarity": 4, "circle": 2,
    "triplet_hardest": 1, "triplet_all": 1,
}  # fmt: skip


def check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


class Contract:
    """Checks the tensors of one call of one op, all on the device of the first."""

    def __init__(self, op: str, first: Tensor) -> None:
        self.op, self.device = op, first.device

    def shape(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        """`sizes` as numbers, None for any; `words` name them."""
        same = t.dim() == len(sizes) and all(want in (None, got) for want, got in zip(sizes, t.shape, strict=True))
        described = f" ({', '.join('any' if size is None else str(size) for size in sizes)})" if sizes else ""
        check(same, f"{self.op}: {name} must be {words}{described}, got {list(t.shape)}")
        check(t.device == self.device, f"{self.op}: {name} is on another device than the other arguments")

    def dtype(self, name: str, t: Tensor, expected: torch.dtype, word: str) -> None:
        check(t.dtype == expected, f"{self.op}: {name} must be {word}, got {t.dtype}")

    def floating(self, name: str, t: Tensor) -> None:
        ok = t.dtype in (torch.float32, torch.float64)
        check(ok, f"{self.op}: {name} must be float32 or float64, got {t.dtype}")

    def contiguous(self, name: str, t: Tensor) -> None:
        check(t.is_contiguous(), f"{self.op}: {name} must be contiguous")

    def columns(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        self.shape(name, t, words, sizes)
        check(t.shape[1] > 0, f"{self.op}: {name} must have at least one column")

    def matrix(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        """Embeddings."""
        self.floating(name, t)
        self.columns(name, t, words, sizes)

    def bank(self, name: str, t: Tensor, D: int | None = None) -> None:
        ok = t.dtype in BANK_DTYPES
        check(ok, f"{self.op}: {name} must be float32, float64, float16 or bfloat16, got {t.dtype}")
        self.columns(name, t, "[M, D]", (None, D))
        self.contiguous(name, t)

    def labels(self, name: str, t: Tensor, words: str, n: int) -> None:
        self.shape(name, t, words, (n,))
        self.dtype(name, t, torch.int64, "int64")

    def rows_mask(self, name: str, t: Tensor | None, B: int) -> None:
        if t is not None:
            self.shape(name, t, "[B]", (B,))
            self.dtype(name, t, torch.bool, "bool")

    def statistic(self, name: str, t: Tensor, words: str, sizes: Sequence[int | None]) -> None:
        self.shape(name, t, words, sizes)
        self.dtype(name, t, torch.float64, "float64")
        self.contiguous(name, t)

    def counter(self, name: str, t: Tensor) -> None:
        self.shape(name, t, "a scalar", ())
        self.dtype(name, t, torch.int64, "int64")

    def value(self, name: str, t: Tensor, last: int) -> None:
        """Of a counter, within [0, last]: looked at where that costs no wait."""
        if reads(t.device):
            got = int(t)
            check(0 <= got <= last, f"{self.op}: {name} must be within [0, {last}], got {got}")

    def eps(self, eps: float) -> None:
        ok = eps >= 1e-30 and math.isfinite(eps)
        check(ok, f"{self.op}: eps must be positive (at least 1e-30) and finite, got {eps:g}")


def apart(op: str, written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """What an op writes shares no memory with what it reads, nor with anything else that it writes. All are dense."""

    def memory(tensors: Mapping[str, Tensor | None]) -> list[tuple[str, int, int]]:
        return [
            (name, t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for name, t in tensors.items()
            if t is not None and t.numel() > 0
        ]

    others = memory(read)
    for name, begin, end in memory(written):
        for other, its_begin, its_end in others:
            ok = end <= its_begin or its_end <= begin
            first, second = (name, other) if other in written and other not in read else (other, name)
            check(ok, f"{op}: {first} must not share memory with {second}")
        others.append((name, begin, end))


def check_normalize(x: Tensor, eps: float) -> None:
    c = Contract("normalize", x)
    c.matrix("x", x, "[B, D]", (None, None))
    c.eps(eps)


def check_normalize_backward(grad_z: Tensor, z: Tensor, norm: Tensor, eps: float) -> None:
    c = Contract("normalize_backward", z)
    c.matrix("z", z, "[B, D]", (None, None))
    c.shape("grad_z", grad_z, "[B, D]", z.shape)
    c.dtype("grad_z", grad_z, z.dtype, "of the dtype of z")
    c.statistic("norm", norm, "[B]", (z.shape[0],))
    c.eps(eps)


def check_moments(x: Tensor, mask: Tensor | None) -> None:
    c = Contract("moments", x)
    c.matrix("x", x, "[B, D]", (None, None))
    c.rows_mask("mask", mask, x.shape[0])


def check_track(
    target_mean: Tensor, target_std: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, x: Tensor,
    mask: Tensor | None, sums: Tensor, count: Tensor, process_noise: float, measurement_noise: float,
    fixed_gain: float | None, eps: float, stats: Tensor | None,
) -> None:  # fmt: skip
    c = Contract("track_", x)
    c.matrix("x", x, "[B, D]", (None, None))
    D = x.shape[1]
    c.rows_mask("mask", mask, x.shape[0])
    c.statistic("target_mean", target_mean, "[D]", (D,))
    c.statistic("target_std", target_std, "[D]", (D,))
    c.statistic("variance", variance, "a scalar", ())
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.counter("count", count)
    if stats is not None:
        c.statistic("stats", stats, "[3]", (3,))
    check(process_noise >= 0, f"track_: process_noise must not be negative, got {process_noise:g}")
    ok = measurement_noise > 0 and math.isfinite(measurement_noise)
    check(ok, f"track_: measurement_noise must be positive and finite, got {measurement_noise:g}")
    check(fixed_gain is None or 0 <= fixed_gain <= 1, "track_: fixed_gain must be within [0, 1]")
    c.eps(eps)


def check_transform(
    bank: Tensor, sums: Tensor, scale: Tensor, shift: Tensor, count: Tensor, op: str = "transform_"
) -> Contract:
    c = Contract(op, bank)
    c.bank("bank", bank)
    D = bank.shape[1]
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    c.counter("count", count)
    return c


def check_enqueue(
    bank: Tensor, bank_labels: Tensor, sums: Tensor, head: Tensor, count: Tensor, z: Tensor, labels: Tensor,
    mask: Tensor | None, scale: Tensor, shift: Tensor, bank_ids: Tensor | None, ids: Tensor | None,
    bank_steps: Tensor | None, step: Tensor | None,
) -> Contract:  # fmt: skip
    c = Contract("enqueue_", bank)
    c.bank("bank", bank)
    M, D = bank.shape
    check(M > 0, "enqueue_: bank must have at least one row")
    c.labels("bank_labels", bank_labels, "[M]", M)
    c.contiguous("bank_labels", bank_labels)
    c.statistic("sums", sums, "[2, D]", (2, D))
    c.counter("head", head)
    c.counter("count", count)
    c.matrix("z", z, "[B, D]", (None, D))
    B = z.shape[0]
    c.labels("labels", labels, "[B]", B)
    c.rows_mask("mask", mask, B)
    c.statistic("scale", scale, "[D]", (D,))
    c.statistic("shift", shift, "[D]", (D,))
    for name, t in (("bank_ids", bank_ids), ("bank_steps", bank_steps)):
        if t is not None:
            c.labels(name, t, "[M]", M)
            c.contiguous(name, t)
    check(bank_ids is not None or ids is None, "enqueue_: ids need bank_ids to be stored in")
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    check((bank_steps is None) == (step is None), "enqueue_: bank_steps and step go together")
    if step is not None:
        c.counter("step", step)
    return c


def check_memory_loss(
    z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, count: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, bank_ids: Tensor | None, exclude: Tensor | None, anchors: Tensor | None, eps: float,
    op: str = "memory_loss",
) -> Contract:  # fmt: skip
    c = Contract(op, z)
    c.matrix("z", z, "[B, D]", (None, None))
    B, D = z.shape
    c.labels("labels", labels, "[B]", B)
    c.bank("bank", bank, D)
    M = bank.shape[0]
    c.labels("bank_labels", bank_labels, "[M]", M)
    if count is not None:
        c.counter("count", count)
    check((scale is None) == (shift is None), f"{op}: scale and shift go together")
    if scale is not None:
        c.statistic("scale", scale, "[D]", (D,))
    if shift is not None:
        c.statistic("shift", shift, "[D]", (D,))
    check(exclude is not None or bank_ids is None, f"{op}: bank_ids are for exclude, which is missing")
    if bank_ids is not None:
        c.labels("bank_ids", bank_ids, "[M]", M)
    if exclude is not None:
        c.labels("exclude", exclude, "[B]", B)
    c.rows_mask("anchors", anchors, B)
    c.eps(eps)
    return c


def check_batch_loss(dots: Tensor, labels: Tensor, ids: Tensor | None, anchors: Tensor | None, eps: float) -> None:
    c = Contract("batch_loss", dots)
    c.floating("dots", dots)
    B = labels.shape[0] if labels.dim() == 1 else dots.shape[0] if dots.dim() > 0 else 0
    c.shape("dots", dots, "[B, B]", (B, B))
    c.labels("labels", labels, "[B]", B)
    if ids is not None:
        c.labels("ids", ids, "[B]", B)
    c.rows_mask("anchors", anchors, B)
    c.eps(eps)


def parse_loss(op: str, name: str, parameters: Sequence[float]) -> PairLoss:
    """The loss by its `kind` and its `parameters`."""
    check(name in PARAMETERS, f"{op}: unknown loss '{name}'")
    takes = PARAMETERS[name]
    check(len(parameters) == takes, f"{op}: {name} takes {takes} parameters, got {len(parameters)}")
    check(all(map(math.isfinite, parameters)), f"{op}: the parameters of {name} must be finite")
    a, b, c, mining = [*parameters, 0.0, 0.0, 0.0][:4]

    def in_range(*values: float) -> bool:  # float32 holds it and its reciprocal
        return all(1e-30 <= x <= 1e30 for x in values)

    if name in ("supcon", "ntxent"):
        check(in_range(a), f"{op}: the temperature of {name} must be within [1e-30, 1e30], got {a:g}")
        return SupCon(a) if name == "supcon" else NTXent(a)
    if name == "multi_similarity":
        check(in_range(a), f"{op}: the alpha of {name} must be within [1e-30, 1e30], got {a:g}")
        check(in_range(b), f"{op}: the beta of {name} must be within [1e-30, 1e30], got {b:g}")
        return MultiSimilarity(a, b, c, None if mining < 0 else mining)
    if name == "circle":
        check(in_range(b), f"{op}: the gamma of {name} must be within [1e-30, 1e30], got {b:g}")
        return Circle(a, b)
    if name.startswith("triplet"):
        return Triplet(a, "all" if name == "triplet_all" else "hardest")
    return Contrastive(a, b, "mean" if name == "contrastive_mean" else "avg_nonzero")
