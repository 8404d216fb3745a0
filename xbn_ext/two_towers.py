"""`TwoTowers`: two networks that embed two sides of the same things, each with a memory. The anchors of one side are
ranked against the rows of the other: those of its memory and those of the batch, which have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import checks, composed, ops
from ._autograd import needs_grad, with_gradient, without_autocast
from ._devices import has_float64
from .composed import Losses
from .distributed import Batch
from .dtypes import compute_dtype
from .filter import Drift
from .losses import PairLoss
from .losses.learned import fold_temperature, learned_of, learns_temperature, with_offset, with_temperature
from .losses.with_loss import WithLoss
from .memory import CrossBatchMemory
from .memory_options import CHOSEN_ONCE, OPTIONS
from .ops.loss_of_memory import averages
from .ops.step import ranked_rows
from .options import LossOptions
from .plain.loss_of_batch import other_samples
from .reference.loss import nan_unless_finite
from .reference.parts import weigh
from .reference.programs import program
from .state import on_cpu
from .stateful import Loaded, keeping_dtypes
from .unlabelled import OF_A_STEP, apart

OF_EACH_MEMORY = ("update", "warmup_steps", "eps")


class Together(NamedTuple):
    """A `load_state_dict` of both memories, which are in step: if one refuses its state, so does the other. They
    take it when the second has looked at its own: a post hook of the first sees what was there before."""

    errors: list[str]
    """By which it is known."""
    sides: list[tuple[MemoryOfTower, Loaded]]
    """Those that have looked at theirs."""

    def decide(self) -> None:
        """When both have."""
        for (memory, loaded), (_, others) in zip(self.sides, self.sides[::-1], strict=True):
            is_sound = loaded.parts and not loaded.faults
            if is_sound and (others.faults or not others.parts):
                name, other = loaded.prefix.removesuffix("."), others.prefix.removesuffix(".")
                fault = f"{name}: the state of {other} is {'at fault' if others.faults else 'missing'}"
                loaded = loaded._replace(faults=[fault])
            CrossBatchMemory._decide(memory, loaded)


class MemoryOfTower(CrossBatchMemory):
    """The memory of one side. What `TwoTowers` does with it depends on few of its options; the others cannot be set."""

    _together: Together | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS and name not in OF_EACH_MEMORY and "bank" in self.__dict__:
            raise AttributeError(f"{name} cannot be set: TwoTowers reads {', '.join(OF_EACH_MEMORY)} only")
        super().__setattr__(name, value)

    def _decide(self, loaded: Loaded) -> None:
        together, self._together = self._together, None
        if together is None or together.errors is not loaded.errors:  # loaded by itself
            super()._decide(loaded)
            return
        together.sides.append((self, loaded))
        if len(together.sides) == 2:
            together.decide()

    def forward(self, *_: object, **__: object) -> NoReturn:
        """Raises RuntimeError: it would move and store alone."""
        raise RuntimeError("a memory of TwoTowers is not called itself: call the TwoTowers")


class TwoTowers(WithLoss):
    """Ranks two sides of a batch, such as pictures and their texts, against each other and against a memory of either.

    Each first embedding is an anchor among all second ones, of the batch and of past batches, and the reverse; the loss
    is the mean of the two. A softmax or a log-sum-exp is over batch and memory together. So it is CLIP's loss (arXiv
    2103.00020, with `SupCon`), or SigLIP's, with more negatives. Embeddings of the batch get their gradient both as
    anchors and as what is ranked; rows of the memory have none. In training mode each call moves either memory along
    with its own side, as `CrossBatchMemory` does, and then stores the batch.

    Examples:
        >>> temperature = torch.nn.Parameter(torch.tensor(0.07))
        >>> criterion = TwoTowers(SupCon(temperature), embedding_size=128, memory_size=8192)
        >>> loss = criterion(of_images(images), of_texts(texts), ids=numbers)

    Args:
        loss: a pair loss of `xbn_ext`, except all triplets. What it learns is a parameter of this module.
        embedding_size: D, of both sides.
        memory_size: M, rows of each memory.

    The others are those of `CrossBatchMemory`, for both memories. Embeddings and rows are normalised.

    Attributes:
        first, second: the memories, two `CrossBatchMemory`, with `stats()`, `fill_from` and what else these have; pairs
            in `stats()` are those with the batch, too. Their options `update`, `warmup_steps` and `eps` may be set at
            any time. They are not called themselves.

    Raises:
        TypeError: the loss is one of one's own.
        ValueError: it is that of all triplets; or an argument is not as `CrossBatchMemory` takes it.
        AttributeError: an option is set here, or one of a memory that does nothing there.
    """

    def __init__(
        self,
        loss: PairLoss,
        embedding_size: int,
        memory_size: int = 1024,
        *,
        drift: Drift = "axbn",
        process_noise: float | None = None,
        measurement_noise: float = 1.0,
        ema_momentum: float = 0.1,
        update: Literal["inplace", "deferred"] | None = None,
        warmup_steps: int = 0,
        memory_dtype: torch.dtype = torch.float32,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss):
            raise TypeError(f"loss must be a pair loss of xbn_ext such as SupCon(), got {type(loss).__name__}")
        if not loss.passes:
            raise ValueError("loss: of all triplets there are no sums that could be added up over batch and memory")
        self._hold(loss)

        def memory() -> MemoryOfTower:
            return MemoryOfTower(
                self._in_numbers(), embedding_size, memory_size, drift=drift, process_noise=process_noise,
                measurement_noise=measurement_noise, ema_momentum=ema_momentum, update=update,
                warmup_steps=warmup_steps, memory_dtype=memory_dtype, eps=eps,
            )  # fmt: skip

        self.first, self.second = memory(), memory()
        if self.first._stands_for is not None:  # what is learned may have been made there, too
            self.to(self.first._stands_for)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_EACH_MEMORY:
            raise AttributeError(f"{name} is an option of each memory: set it on first and second")
        if name != "loss" and name in (*OPTIONS, *CHOSEN_ONCE):
            raise AttributeError(f"{name} cannot be set: make another TwoTowers")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TwoTowers:
        for memory in (self.first, self.second) if recurse else ():
            memory._apply(fn)
        # Where the memories stay on the CPU, so does what is learned.
        stays = not has_float64(fn(torch.empty(0, device=self.first.bank.device)).device)
        super()._apply(on_cpu if stays else keeping_dtypes(fn), recurse=False)
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        *_, errors = given
        self.first._together = self.second._together = Together(errors, [])

    def forward(
        self, first: Tensor, second: Tensor, labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch; in training mode the memories move on by one step.

        Args:
            first, second: `[B, D]`, any floating dtype, row i of both of the same thing.
            labels: `[B]` integers; rows of equal ones are positives. None: each thing is a class of its own.
            ids: `[B]` integers that identify things. A row is not ranked against an older copy of its thing in the
                memory, nor against another row of it in the batch. A negative number is no id. None: no row has an id.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: an argument is not as above, naming it.
            RuntimeError: called while a backward pass runs, under `torch.func` or with forward-mode derivatives.
        """
        checks.embeddings(first, self.first.embedding_size, "first")
        checks.embeddings(second, self.second.embedding_size, "second")
        if len(second) != len(first):
            raise ValueError(f"second must have a row for each of first, {len(first)}, got {len(second)}")
        device = self.first._stands_for or self.first.bank.device
        checks.on_device(device, first=first, second=second)
        numbers = torch.arange(len(first), device=device)
        sides = [
            memory._apart(memory._check(x, numbers if labels is None else labels, None, None, ids))
            for memory, x in ((self.first, first), (self.second, second))
        ]
        self._check_loss(self.first.bank.device)
        self._check_step(self.first.step, first, second, others=(labels, ids))
        if labels is None:
            steps = torch.maximum(self.first.step, self.second.step)
            apart_from_all = apart(torch.zeros_like(sides[0].labels), 0, steps * OF_A_STEP)
            sides = [batch._replace(labels=apart_from_all) for batch in sides]
        wide = torch.promote_types(*(compute_dtype(batch.embeddings.dtype) for batch in sides))
        with without_autocast(self.first.bank.device.type):
            z = [ops.normalize(batch.embeddings.to(wide), self.first.eps) for batch in sides]
        values = [
            self._ranked(memory, batch._replace(embeddings=own), other)
            for memory, batch, own, other in zip((self.first, self.second), sides, z, z[::-1], strict=True)
        ]
        return self.first._given_back((values[0] + values[1]) / 2)

    def _ranked(self, memory: CrossBatchMemory, batch: Batch, anchors: Tensor) -> Tensor:
        """The loss of the anchors of the other side; in training mode a step of this memory. Both are normalised."""
        loss = self.loss
        assert isinstance(loss, PairLoss)
        losses: Losses = partial(_loss_and_pairs, memory, batch, loss, anchors)
        if not self.training:
            return composed.loss_of(memory, batch, losses, normalize_embeddings=False, eps=memory.eps)
        return composed.step_(
            memory, batch, losses, filter=memory.filter, update=memory.update, enqueue="after",
            normalize_embeddings=False, eps=memory.eps,
        )  # fmt: skip

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Empties both memories, and gives what is learned its first value again."""
        self._begin_to_learn()
        for memory in (self.first, self.second):
            memory.reset_queue()

    def extra_repr(self) -> str:
        """What `print(criterion)` shows."""
        return self._name_of_loss()


def _loss_and_pairs(
    memory: CrossBatchMemory, batch: Batch, loss: PairLoss, z: Tensor, rows: Tensor, slots: Tensor | None,
    pairs: Tensor | None,
) -> Tensor:  # fmt: skip
    """The loss of anchors `z [B, D]` against a memory as it lies and the rows `[B, D]` that will enter it. These are
    two parts, and their sums are settled together. Writes `pairs`."""
    folded, scaled = fold_temperature(loss, z)
    sides = torch.cat((scaled, rows))
    need_grad, (anchors, keys) = needs_grad(sides) or learns_temperature(loss), sides.detach().tensor_split(2)
    given: LossOptions = {"scale": memory.scale, "shift": memory.shift, "eps": memory.eps}
    given["count"] = ranked_rows(memory, memory.warmup_steps)
    if batch.ids is not None:
        given |= {"bank_ids": memory.bank_ids, "exclude": torch.where(batch.ids >= 0, batch.ids, -1)}
    totals, of_memory, factor, by_s = _pass_by_pass(memory, batch, folded, anchors, keys, need_grad, given)
    value, average, counted = averages(totals, z.dtype)
    if pairs is not None:
        pairs.copy_(counted)
    if need_grad:
        factor = (factor * average[: loss.groups, None]).to(z.dtype)[..., None]  # [2 parts, 2 slots, B, 1]
        by_s = torch.where(factor[1] == 0, 0, factor[1] * by_s).sum(0)
        by_anchors = torch.where(factor[0] == 0, 0, factor[0] * of_memory).sum(0) + by_s @ keys
        by_anchors = torch.where(anchors.isfinite().all(1, keepdim=True), by_anchors, torch.nan)
        value = with_gradient(value, sides, torch.cat((by_anchors, by_s.T @ anchors)), *learned_of(loss))
        value = with_temperature(value, loss, by_anchors, anchors, sides, *learned_of(loss))
    return with_offset(value, loss, counted, sides)


def _pass_by_pass(
    memory: CrossBatchMemory, batch: Batch, loss: PairLoss, anchors: Tensor, keys: Tensor, need_grad: bool,
    given: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Totals `[7]` of the anchors; for each slot the gradient by way of the memory `[2, B, D]`; what this and the next
    are to be multiplied by, besides the averages, `[2 parts, 2, B]`; and the weights of pairs in the batch
    `[2, B, B]`."""
    B, labels, ids = len(anchors), batch.labels, batch.ids
    s, positive = nan_unless_finite(anchors) @ keys.T, labels[:, None] == labels
    pair = other_samples(labels, ids) | torch.eye(B, dtype=torch.bool, device=labels.device)  # and its own key
    parts = anchors.new_zeros(2, 2, B, 4, dtype=torch.float64)
    of_memory = torch.zeros_like(anchors, memory_format=torch.contiguous_format).repeat(2, 1, 1)
    weights = torch.zeros_like(s, memory_format=torch.contiguous_format).repeat(2, 1, 1)
    for_pass: Tensor | None = None
    loss = loss.with_parameters(loss.parameters)  # in numbers
    for number, slots in enumerate(program(loss)):
        sums, grads = ops.memory_sums(
            anchors, labels, memory.bank, memory.bank_labels, loss, number=number, given=for_pass, need_grad=need_grad,
            **given,
        )  # fmt: skip
        of_anchor = anchors.new_zeros(B) if for_pass is None else for_pass.to(anchors.dtype)
        for k, slot in slots.items():
            parts[0, k] = sums[k]
            parts[1, k], weights[k] = weigh(slot, s, positive, pair, of_anchor, memory.memory_size)
            if need_grad:
                of_memory[k] = grads[k]
        for_pass, scale, totals = ops.settle_sums(parts, loss, number + 1)
    return totals, of_memory, scale, weights
