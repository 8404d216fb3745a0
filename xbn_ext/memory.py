"""`CrossBatchMemory`: a loss over a ring of past embeddings that is kept current by moment matching."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .filter import Drift, make_filter
from .losses import PairLoss, at_temperature


class CrossBatchMemory(nn.Module):
    """Ranks each batch against itself and against a memory of past batches.

    Called as pytorch-metric-learning's `CrossBatchMemory` is: `loss = criterion(embeddings, labels)`. Each call in
    training mode (1) measures how the embeddings have drifted and moves the stored ones along, (2) computes
    `batch_weight * L(batch, batch) + memory_weight * L(batch, memory)`, (3) stores the batch. In `eval()` mode
    the memory is only read. `xbn_ext.reference.step` is the same in plain PyTorch.

    Args:
        loss: the pair loss L, one of `xbn_ext.losses`. A temperature that is an `nn.Parameter` becomes a parameter of
            this module.
        embedding_size: D.
        memory_size: M, rows of the ring.
        drift: how stored embeddings follow the network. `"none"`: not at all (plain XBM). `"xbn"`: each step they
            get the mean and standard deviation of the batch. `"axbn"`: those moments go through a Kalman filter
            first. `"ema"`: through a moving average.
        process_noise, measurement_noise: of the Kalman filter; only their ratio matters.
        ema_momentum: gain of `"ema"`.
        update: `"inplace"` rewrites the memory every step; `"deferred"` keeps one pending affine map for all rows
            and applies it while reading: the same numbers, and a pass over the memory only once in many steps, when
            the map has grown so far that rounding would tell. None: in place, but deferred for a 16-bit memory, which
            would not survive being rounded at every step.
        normalize_embeddings: L2-normalise the embeddings first.
        renormalize: L2-normalise memory rows as they are read (the stored rows keep their exact moments).
        batch_weight, memory_weight: weights of the two losses; 0 skips one.
        warmup_steps: for so many steps the memory fills up but does not count.
        enqueue: store the batch `"after"` the loss or `"before"`; before, a row is never paired with itself.
        bank_dtype: dtype of the stored rows: float32, float64, float16 or bfloat16. Batches never change it. Where
            drift is followed, the 16-bit ones store standardised values, so float16 keeps three more bits than
            bfloat16 and does not overflow.
        eps: lower bound of norms, and the standard deviation below which a dimension counts as dead.

    Rows with a NaN or an Inf are kept out of the moments and of the memory, without a host sync. The loss of
    their batch is NaN, as PyTorch's losses are, and so is their gradient: a gradient scaler skips the step.

    All state is tensors in `state_dict()`; `head`, `count` and the filter live on the device and nothing waits for
    them.

    Raises:
        ValueError, TypeError: naming the argument, here or when called, before anything is written.
    """

    temperature: nn.Parameter | None
    bank: Tensor
    bank_labels: Tensor
    bank_ids: Tensor
    bank_steps: Tensor
    sums: Tensor
    head: Tensor
    count: Tensor
    scale: Tensor
    shift: Tensor
    target_mean: Tensor
    target_std: Tensor
    variance: Tensor
    step: Tensor
    pairs: Tensor
    gaps: Tensor

    def __init__(
        self,
        loss: PairLoss,
        embedding_size: int,
        memory_size: int = 1024,
        *,
        drift: Drift = "axbn",
        process_noise: float = 1e-2,
        measurement_noise: float = 1.0,
        ema_momentum: float = 0.1,
        update: Literal["inplace", "deferred"] | None = None,
        normalize_embeddings: bool = True,
        renormalize: bool = True,
        batch_weight: float = 1.0,
        memory_weight: float = 1.0,
        warmup_steps: int = 0,
        enqueue: Literal["after", "before"] = "after",
        bank_dtype: torch.dtype = torch.float32,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss) or type(loss) is PairLoss:
            raise TypeError(f"loss must be an xbn_ext loss such as Contrastive(), got {type(loss).__name__}")
        embedding_size = _whole("embedding_size", embedding_size, 1)
        memory_size = _whole("memory_size", memory_size, 1)
        warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        for name, weight in (("batch_weight", batch_weight), ("memory_weight", memory_weight)):
            if not math.isfinite(weight):
                raise ValueError(f"{name} must be finite, got {weight}")
        if batch_weight == 0 and memory_weight == 0:
            raise ValueError("batch_weight and memory_weight are both 0: there is nothing to learn from")
        if bank_dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise ValueError(f"bank_dtype must be torch.float32, float64, float16 or bfloat16, got {bank_dtype}")
        narrow = bank_dtype.itemsize == 2
        if update is None:
            update = "deferred" if narrow else "inplace"
        if update not in ("inplace", "deferred"):
            raise ValueError(f"update must be 'inplace' or 'deferred', got {update!r}")
        if narrow and update == "inplace" and drift != "none":
            raise ValueError(
                f"update='inplace' would round a bank of {bank_dtype} at every step until it has drifted off: "
                "use update='deferred'"
            )
        if enqueue not in ("after", "before"):
            raise ValueError(f"enqueue must be 'after' or 'before', got {enqueue!r}")
        if not 1e-30 <= eps < math.inf:
            raise ValueError(f"eps must be positive (at least 1e-30) and finite, got {eps}")
        self.filter = make_filter(drift, process_noise, measurement_noise, ema_momentum)
        temperature = getattr(loss, "temperature", None)
        learned = temperature if isinstance(temperature, nn.Parameter) else None
        if isinstance(temperature, Tensor) and temperature.requires_grad and learned is None:
            raise ValueError("loss: its temperature must be an nn.Parameter to be learned")
        self.register_parameter("temperature", learned)
        self._loss = loss if learned is None else at_temperature(loss, 1.0)  # the module alone holds what is learned
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.drift = drift
        self.update = update
        self.normalize_embeddings = normalize_embeddings
        self.renormalize = renormalize
        self.batch_weight = batch_weight
        self.memory_weight = memory_weight
        self.warmup_steps = warmup_steps
        self.enqueue = enqueue
        self.eps = eps

        D, M, f64, i64 = embedding_size, memory_size, torch.float64, torch.int64
        self.register_buffer("bank", torch.zeros(M, D, dtype=bank_dtype))
        self.register_buffer("bank_labels", torch.zeros(M, dtype=i64))
        self.register_buffer("bank_ids", torch.zeros(M, dtype=i64))
        self.register_buffer("bank_steps", torch.zeros(M, dtype=i64))
        self.register_buffer("sums", torch.zeros(2, D, dtype=f64))
        self.register_buffer("head", torch.zeros((), dtype=i64))
        self.register_buffer("count", torch.zeros((), dtype=i64))
        self.register_buffer("scale", torch.ones(D, dtype=f64))
        self.register_buffer("shift", torch.zeros(D, dtype=f64))
        self.register_buffer("target_mean", torch.zeros(D, dtype=f64))
        self.register_buffer("target_std", torch.zeros(D, dtype=f64))
        self.register_buffer("variance", torch.full((), torch.inf, dtype=f64))
        self.register_buffer("step", torch.zeros((), dtype=i64))
        # What stats() says of the last step.
        self.register_buffer("pairs", torch.full((2,), torch.nan, dtype=f64), persistent=False)
        self.register_buffer("gaps", torch.full((2,), torch.nan, dtype=f64), persistent=False)

    @property
    def loss(self) -> PairLoss:
        """The pair loss. A learned temperature in it is this module's parameter, also where that has been replaced:
        by `load_state_dict(assign=True)`, `to_empty`, `torch.func.functional_call`."""
        return self._loss if self.temperature is None else at_temperature(self._loss, self.temperature)

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, enqueue_mask: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch; in training mode the memory moves on by one step.

        Args:
            embeddings: `[B, D]`, any floating dtype (16-bit ones are computed in float32), on the module's device.
            labels: `[B]` integers, any values.
            enqueue_mask: `[B]` bool. Rows marked True enter the memory and are not anchors; the others are
                anchors and stay out (pytorch-metric-learning's meaning). None: every row is and does both.
            ids: `[B]` integers that tell samples apart, such as the image's index in the data set. Rows of the same id
                are no pair: neither two views in the batch, nor a row and an older copy of its sample in the memory.
                A negative one is no id. None: no row has one.

        Returns:
            A scalar.
        """
        labels, ids = self._check(embeddings, labels, enqueue_mask, ids)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            if self.normalize_embeddings:
                z = F.normalize(z, dim=1, eps=self.eps)
            own_slots = None
            if self.training:
                self._follow_drift(z.detach(), enqueue_mask)
                if self.enqueue == "before":
                    own_slots = self._store(z.detach(), labels, enqueue_mask, ids)
            value = self._value(z, labels, enqueue_mask, ids, own_slots)
            if self.training:
                if self.enqueue == "after":
                    self._store(z.detach(), labels, enqueue_mask, ids)
                self.step += 1
        return value

    def _follow_drift(self, z: Tensor, mask: Tensor | None) -> None:
        if self.filter is None:  # nothing moves; the gap is measured all the same
            state = (self.target_mean, self.target_std, self.variance, self.scale, self.shift)
            mean, std, variance, scale, shift = (t.clone() for t in state)
            ops.track_(
                mean, std, variance, scale, shift, z, mask, self.sums, self.count, math.inf, 1.0, None,
                eps=self.eps, gaps=self.gaps,
            )  # fmt: skip
            self.gaps[1].copy_(self.gaps[0])
            return
        ops.track_(
            self.target_mean, self.target_std, self.variance, self.scale, self.shift, z, mask,
            self.sums, self.count, *self.filter, eps=self.eps, gaps=self.gaps,
        )  # fmt: skip
        if self.update == "inplace" and not self._moves_while_ranking():
            ops.transform_(self.bank, self.sums, self.scale, self.shift, self.count)
        elif self.update == "deferred":
            ops.standardize_(self.bank, self.sums, self.scale, self.shift, self.count, self.eps)

    def _moves_while_ranking(self) -> bool:
        """Whether the memory loss finds a map that it is to write into the bank."""
        moves = self.training and self.filter is not None and self.update == "inplace"
        return moves and self.enqueue == "after" and self.memory_weight != 0

    def _store(self, z: Tensor, labels: Tensor, mask: Tensor | None, ids: Tensor | None = None) -> Tensor:
        return ops.enqueue_(
            self.bank,
            self.bank_labels,
            self.sums,
            self.head,
            self.count,
            z,
            labels,
            mask,
            self.scale,
            self.shift,
            bank_ids=self.bank_ids,
            ids=ids,
            bank_steps=self.bank_steps,
            step=self.step,
        )

    def _value(
        self, z: Tensor, labels: Tensor, mask: Tensor | None, ids: Tensor | None, own_slots: Tensor | None
    ) -> Tensor:
        anchors = None if mask is None else ~mask
        exclude = own_slots
        if ids is not None:
            own_ids = -1 if own_slots is None else -2 - own_slots  # as enqueue_ has it; -1, none, if not stored
            exclude = torch.where(ids >= 0, ids, own_ids)
        values = []
        if self.batch_weight != 0:
            own = ops.batch_loss(
                z, labels, self.loss, ids=ids, anchors=anchors, renormalize=self.renormalize, eps=self.eps
            )
            values.append(_weighted(own, self.batch_weight))
        if self.memory_weight != 0:
            # No rows are visible while warming up: decided on the device, so nothing waits.
            ranked = torch.where(self.step < self.warmup_steps, 0, self.count) if self.warmup_steps else self.count
            options: dict[str, Any] = {
                "bank_ids": None if ids is None else self.bank_ids, "exclude": exclude, "anchors": anchors,
                "renormalize": self.renormalize, "eps": self.eps,
            }  # fmt: skip
            if self._moves_while_ranking():
                memory_value, pairs = ops.transform_memory_loss_(
                    self.bank, self.sums, self.scale, self.shift, self.count, z, labels, self.bank_labels, self.loss,
                    ranked=ranked, **options,
                )  # fmt: skip
            else:
                memory_value, pairs = ops.memory_loss_and_pairs(
                    z, labels, self.bank, self.bank_labels, self.loss, count=ranked, scale=self.scale, shift=self.shift,
                    **options,
                )  # fmt: skip
            values.append(_weighted(memory_value, self.memory_weight))
            if self.training:
                self.pairs.copy_(pairs)
        return sum(values[1:], values[0]) if values else z.new_zeros(())

    @torch.no_grad()
    def stats(self) -> dict[str, Tensor]:
        """How the memory does, as scalars on its device: nothing waits for them until they are read.

        * `fill`: share of the memory that is filled.
        * `age`: steps since the stored rows were stored, on average; 1 is the last step.
        * `positives`, `negatives`: rows of the memory per anchor that had a weight in the last training step: not
          within their margin, mined, in a triplet that cost something.
        * `gap_before`, `gap_after`: how far the memory's moments were from those of the last batch before and after
          they were moved, `sqrt(|mean - mean|² + |std - std|²)`. Part of it is the noise of a batch.
        * `gain`: of the filter, how much of what the last batch measured it took over.

        What there is none of is NaN: before the first step, `age` of no rows, pairs without a memory loss, gain with
        `drift="none"`.
        """
        ages = torch.where(self._filled(), self.step - self.bank_steps, 0)
        positives, negatives = self.pairs.unbind()
        gap_before, gap_after = self.gaps.unbind()
        noise = math.nan if self.filter is None else self.filter.measurement_noise
        gain = self.variance / noise  # what an update leaves of the variance is gain * noise
        return {
            "fill": self.count / self.memory_size,
            "age": ages.sum() / self.count,
            "positives": positives.clone(),
            "negatives": negatives.clone(),
            "gap_before": gap_before.clone(),
            "gap_after": gap_after.clone(),
            "gain": torch.where(gain.isinf(), torch.nan, gain),
        }

    def _filled(self) -> Tensor:
        return torch.arange(self.memory_size, device=self.count.device) < self.count

    @property
    def embedding_memory(self) -> Tensor:
        """`[count, D]` the stored rows as they stand now, in slot order, in the bank's dtype or, of a 16-bit one, in
        float32 (a copy)."""
        rows = self.bank[: int(self.count)]
        return (rows.double() * self.scale + self.shift).to(torch.promote_types(self.bank.dtype, torch.float32))

    @property
    def label_memory(self) -> Tensor:
        """`[count]` labels of `embedding_memory` (a copy)."""
        return self.bank_labels[: int(self.count)].clone()

    @property
    def id_memory(self) -> Tensor:
        """`[count]` sample ids of `embedding_memory`, -1 for none (a copy)."""
        return self.bank_ids[: int(self.count)].clamp(min=-1)

    @property
    def age_memory(self) -> Tensor:
        """`[count]` how many steps ago the rows of `embedding_memory` were stored; 1 is the last step."""
        return self.step - self.bank_steps[: int(self.count)]

    @property
    def target_moments(self) -> tuple[Tensor, Tensor]:
        """`(mean [D], std [D])` that the memory is kept at (copies); zeros before the first batch."""
        return self.target_mean.clone(), self.target_std.clone()

    @torch.no_grad()
    def reset_queue(self) -> None:
        """Empties the memory and forgets the drift and the warm-up: the state of a new module."""
        for t in (
            self.bank, self.bank_labels, self.bank_ids, self.bank_steps, self.sums, self.head, self.count, self.shift,
            self.target_mean, self.target_std, self.step,
        ):  # fmt: skip
            t.zero_()
        self.scale.fill_(1)
        self.variance.fill_(torch.inf)
        self.pairs.fill_(torch.nan)
        self.gaps.fill_(torch.nan)

    @torch.no_grad()
    def fill_from(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Replaces the memory with embeddings of the present network.

        `batches` yields `(embeddings [B, D], labels [B])`, or with `ids [B]` for a third. The moments of what was
        stored become the target of the filter, taken as exact. Warm-up goes on where it was. If anything raises, the
        memory stays as it was: it is filled in a copy first, which takes the memory's size once more while it lasts.
        """
        filled = copy.deepcopy(self)
        filled.reset_queue()
        filled.step.copy_(self.step)
        for embeddings, labels, *rest in batches:
            labels, ids = self._check(embeddings, labels, None, *rest)
            z = embeddings.to(torch.promote_types(self.bank.dtype, torch.float32))
            if self.normalize_embeddings:
                z = F.normalize(z, dim=1, eps=self.eps)
            if filled.bank.dtype.itemsize == 2 and filled.count == 0:  # 16 bits are for standardised values
                mean, std, _ = ops.moments(z)
                filled.shift.copy_(mean)
                filled.scale.copy_(torch.where(std < self.eps, 1.0, std))
            filled._store(z, labels, None, ids)
        if int(filled.count) >= 2:
            mean, std, _ = ops.moments(filled.embedding_memory)
            filled.target_mean.copy_(mean)
            filled.target_std.copy_(std)
            filled.variance.zero_()
        self.load_state_dict(filled.state_dict())

    def _check(
        self, embeddings: Tensor, labels: Tensor, enqueue_mask: Tensor | None, ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Raises on bad input, naming the argument; returns labels and ids as int64."""
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise TypeError(f"embeddings must be a floating-point tensor, got {_kind(embeddings)}")
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings must be [B, embedding_size={self.embedding_size}], got {list(embeddings.shape)}"
            )
        B = embeddings.shape[0]
        for name, whole in (("labels", labels), ("ids", ids)):
            if name == "ids" and whole is None:
                continue
            if not isinstance(whole, Tensor) or whole.is_floating_point() or whole.is_complex():
                raise TypeError(f"{name} must be an integer tensor, got {_kind(whole)}")
            if whole.dtype == torch.bool:
                raise TypeError(f"{name} must be an integer tensor, got torch.bool")
            if whole.shape != (B,):
                raise ValueError(f"{name} must be [B={B}], got {list(whole.shape)}")
        if enqueue_mask is not None:
            if not isinstance(enqueue_mask, Tensor) or enqueue_mask.dtype != torch.bool:
                raise TypeError(f"enqueue_mask must be a bool tensor, got {_kind(enqueue_mask)}")
            if enqueue_mask.shape != (B,):
                raise ValueError(f"enqueue_mask must be [B={B}], got {list(enqueue_mask.shape)}")
        on_device = {"embeddings": embeddings, "labels": labels, "enqueue_mask": enqueue_mask, "ids": ids}
        for name, t in on_device.items():
            if t is not None and t.device != self.bank.device:
                raise ValueError(f"{name} is on {t.device}, the memory on {self.bank.device}: move one of them")
        return labels.long(), None if ids is None else ids.long()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CrossBatchMemory:
        """Moves the state between devices but keeps its dtypes: `.half()` must not round statistics or bank."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Takes all of a memory's state or, if a tensor is missing or of another shape, nothing of it."""
        buffers = (name for name, _ in self.named_buffers(recurse=False) if name not in ("pairs", "gaps"))
        names = [*buffers, *(name for name, _ in self.named_parameters(recurse=False))]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        wrong = [name for name in names if prefix + name in state_dict
                 and state_dict[prefix + name].shape != getattr(self, name).shape]  # fmt: skip
        bank = state_dict.get(prefix + "bank", self.bank)
        if torch.promote_types(bank.dtype, self.bank.dtype) != self.bank.dtype:
            errors.append(f"{prefix}bank is {bank.dtype} and would be rounded to {self.bank.dtype}; nothing was loaded")
            return
        if absent or wrong:
            missing.extend(absent)
            errors.extend(
                f"{name} must be {list(getattr(self, name).shape)} for embedding_size={self.embedding_size} and "
                f"memory_size={self.memory_size}, got {list(state_dict[prefix + name].shape)}; nothing was loaded"
                for name in wrong
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """What `print(criterion)` shows."""
        return (
            f"{self.loss}, embedding_size={self.embedding_size}, memory_size={self.memory_size}, "
            f"drift={self.drift!r}, update={self.update!r}, enqueue={self.enqueue!r}, bank_dtype={self.bank.dtype}"
        )


def _weighted(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1 else weight * value  # an operation less where a small step is many of them


def _whole(name: str, value: Any, least: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        whole = least - 1
    if whole < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return whole


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
