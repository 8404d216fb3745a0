"""`CrossBatchMemory`: a loss over a ring of past embeddings that is kept current by moment matching. Its step is one
op, `ops/step.py`, or put together from several, `composed.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import checks, composed, ops, shared_step
from ._autograd import check_not_transformed
from .distributed import Batch, Ranks
from .dtypes import compute_dtype, is_narrow
from .filling import fill
from .filter import Drift, make_filter
from .losses import AnyLoss, OwnLoss, check_unit_rows
from .losses.learned import has_sides, learned_offset
from .losses.with_loss import WithLoss
from .memory_options import CHOSEN_ONCE, OF_LOSS, OPTIONS
from .ops.custom import try_out
from .shards import Shards
from .state import MemoryState
from .unlabelled import OF_A_STEP, apart

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class CrossBatchMemory(WithLoss, MemoryState):
    """Ranks each batch against itself and against a memory of past batches.

    The call is that of pytorch-metric-learning's `CrossBatchMemory`, `loss = criterion(embeddings, labels)`. In
    training mode each call (1) measures how the embeddings have drifted and moves the stored ones along, (2) computes
    `batch_weight * L(batch, batch) + memory_weight * L(batch, memory)`, (3) stores the batch. In `eval()` mode
    the memory is only read. `xbn_ext.reference.step` is the same in plain PyTorch.

    Examples:
        >>> criterion = CrossBatchMemory(Contrastive(neg_margin=0.5), embedding_size=128, memory_size=8192)
        >>> loss = criterion(network(images), labels)
        >>> loss.backward()

    Args:
        loss: the pair loss L, one of `xbn_ext.losses`, a `CustomLoss`, `SelectPairs` or `InChunks`. A temperature that
            is an `nn.Parameter` becomes a parameter of this module, as do those of the others.
        embedding_size: D.
        memory_size: M, rows of the ring.
        drift: how stored embeddings follow the network. `"none"`: not at all (plain XBM). `"xbn"`: each step they
            get the mean and standard deviation of the batch. `"axbn"`: of those moments after a Kalman filter.
            `"ema"`: after a moving average.
        process_noise: q of the Kalman filter. None: it is estimated, so that the filter takes over most of what a batch
            measures while moments run, and a tenth as they settle (`xbn_ext.reference.adapted_gain`). A number: only
            q / r matters. At a ratio of 1 it soon takes over 0.62; at 0.01 a tenth, about ten steps behind.
        measurement_noise: r of the Kalman filter; beside an estimated q it does nothing.
        ema_momentum: gain of `"ema"`.
        update: `"inplace"` rewrites the memory every step; `"deferred"` keeps one pending affine map for all rows
            and applies it while reading: the same numbers, and a pass over the memory only once in many steps, when
            the map has grown so far that rounding would show. None: in place; deferred for a 16-bit memory, which
            would not survive being rounded at every step.
        normalize_embeddings: L2-normalise the embeddings first. A loss of distances needs this and the next.
        renormalize: L2-normalise what anchors are compared with: rows of the batch, and of the memory as they are read.
        batch_weight: weight of the loss of the batch against itself; 0 skips it.
        memory_weight: weight of the loss of the batch against the memory; 0 skips it.
        center_gradient: takes off the gradient of the loss against the memory what turns all anchors the same way, as a
            stale memory does: `g_i - mean(g_j - (g_j·z_j) z_j)`, z of unit length. The loss itself stays as it is.
        warmup_steps: number of steps in which the memory fills up but is not in the loss.
        enqueue: store the batch `"after"` the loss or `"before"` it; even then no row is paired with itself.
        no_class: the label of rows that are of no class, such as distractors: each is a negative of all other rows,
            also of those with this label. Those of classes must then not be below -2^62, where each of these rows gets
            a label of its own. None: every label is a class.
        memory_dtype: dtype of the stored rows: float32, float64, float16 or bfloat16. Batches never change it. Where
            drift is followed, the 16-bit ones store standardised values, so float16 keeps three more bits than
            bfloat16 and does not overflow, except after [jumps](limits.md).
        eps: lower bound of norms, and the standard deviation below which a dimension counts as dead; in units of the
            embeddings.
        process_group: the processes that train together, each with a part of the batch: a ProcessGroup or a DeviceMesh
            of one dimension. Loss and memory are those of the whole batch, rank 0's part first; see
            [many processes](distributed.md). They make and call the module at the same time. None: this one alone. A
            mesh of two dimensions has replicas of the memory and, in the second, its shards.
        shards: how many ranks hold the memory between them, each a block of `ceil(M / shards)` rows. It divides the
            number of ranks. 1: each has all of it.
        batch_size: with a process_group, rows of each part; needed under `torch.compile`, and on a GPU no host waits
            for another. None: they may differ, and be 0.
        bank_dtype: the old name of `memory_dtype`; warns.

    Rows with a NaN or an Inf are kept out of the moments and of the memory, without a host sync. The loss of their
    batch is NaN, as PyTorch's losses are, so is their gradient; gradient scalers skip the step.

    All state is tensors in `state_dict()`; `head`, `count` and the filter live on the device and nothing waits for
    them. Moved to a device without float64, such as MPS, the module stays on the CPU with its parameters, and is called
    with tensors of that device all the same.

    Raises:
        ValueError, TypeError: naming the argument, here, when set or when called, before anything is written.
        AttributeError: one of `loss`, `embedding_size`, `memory_size`, `drift`, `process_noise`, `measurement_noise`,
            `ema_momentum`, `filter`, `memory_dtype`, `process_group`, `shards` and `batch_size` is set, or a
            temperature that is learned to None: they are chosen once.
    """

    temperature: nn.Parameter | None
    bias: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        loss: AnyLoss,
        embedding_size: int,
        memory_size: int = 1024,
        *,
        drift: Drift = "axbn",
        process_noise: float | None = None,
        measurement_noise: float = 1.0,
        ema_momentum: float = 0.1,
        update: Literal["inplace", "deferred"] | None = None,
        normalize_embeddings: bool = True,
        renormalize: bool = True,
        batch_weight: float = 1.0,
        memory_weight: float = 1.0,
        center_gradient: bool = False,
        warmup_steps: int = 0,
        enqueue: Literal["after", "before"] = "after",
        no_class: int | None = None,
        memory_dtype: torch.dtype = torch.float32,
        eps: float = 1e-6,
        process_group: ProcessGroup | DeviceMesh | None = None,
        shards: int = 1,
        batch_size: int | None = None,
        bank_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bank_dtype is not None:
            warnings.warn("bank_dtype is called memory_dtype", DeprecationWarning, stacklevel=2)
            memory_dtype = bank_dtype
        self._hold(loss)
        embedding_size = checks.whole("embedding_size", embedding_size, 1)
        memory_size = checks.whole("memory_size", memory_size, 1)
        self.warmup_steps = warmup_steps
        self.normalize_embeddings = normalize_embeddings
        self.renormalize = renormalize
        self.batch_weight = batch_weight
        self.memory_weight = memory_weight
        self.center_gradient = center_gradient
        self.eps = eps
        checks.some_weight(self.batch_weight, self.memory_weight)
        check_unit_rows(loss, normalize_embeddings=self.normalize_embeddings, renormalize=self.renormalize)
        checks.memory_dtype(memory_dtype)
        self.update = update if update is not None else "deferred" if is_narrow(memory_dtype) else "inplace"
        checks.rounding(self.update, memory_dtype, drift)
        self.enqueue = enqueue
        self.no_class = no_class
        self.filter = make_filter(drift, process_noise, measurement_noise, ema_momentum)
        self.embedding_size = embedding_size
        self._drift = drift
        shards = checks.shards(shards, process_group)
        batch_size = checks.rows_of_a_part(batch_size, process_group)
        self._ranks: Ranks | None = None
        if process_group is not None:
            once = {
                "loss": self._in_numbers(), "embedding_size": embedding_size, "memory_size": memory_size,
                "drift": drift, "filter": self.filter, "memory_dtype": memory_dtype,
            }  # fmt: skip
            once |= self._is_learned() | self._options()
            self._ranks = Ranks(process_group, shards, batch_size, once)
        of_ranks = Shards() if self._ranks is None else self._ranks.shards
        if of_ranks.size > 1 and isinstance(loss, OwnLoss):
            raise ValueError(
                f"loss: {type(loss).__name__} needs shards=1: its sums cannot be added up over parts of a memory"
            )
        self._register_memory(memory_size, embedding_size, memory_dtype, of_ranks)
        if self._stands_for is not None:  # what is learned may have been made there, too
            self.to(self._stands_for)

    def __setattr__(self, name: str, value: Any) -> None:
        """Options may be set at any time. A bad one raises here: a step would find it with the memory half moved, or
        not at all. What is chosen once cannot be set: the memory would not be of that size, or follow that drift."""
        if name in CHOSEN_ONCE and "bank" in self.__dict__:
            raise AttributeError(f"{name} is chosen once and cannot be set: make another CrossBatchMemory")
        check = OPTIONS.get(name)
        if check is not None:
            value = check(name, value)
        if name == "update" and "bank" in self.__dict__:
            checks.rounding(value, self.bank.dtype, self.drift)
        if name in ("normalize_embeddings", "renormalize"):
            check_unit_rows(self._own_loss or self._loss, **{name: value})
        super().__setattr__(name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def drift(self) -> Drift:
        """How stored embeddings follow the network; chosen once."""
        return self._drift

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that share the memory; chosen once."""
        return None if self._ranks is None else self._ranks.group

    @property
    def shards(self) -> int:
        """How many of them hold the memory between them; chosen once."""
        return self._shards.size

    @property
    def batch_size(self) -> int | None:
        """Rows of each process's part of a batch, or None; chosen once."""
        return None if self._ranks is None else self._ranks.batch_size

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch; in training mode the memory moves on by one step.

        Args:
            embeddings: `[B, D]`, any floating dtype (16-bit ones are computed in float32), on the module's device.
            labels: `[B]` integers, any values, but not uint64; with `no_class`, from -2^62 on (not checked: the host
                would wait for it).
            indices_tuple: must be None; it is here for the argument order of pytorch-metric-learning.
            enqueue_mask: `[B]` bool. Rows marked True enter the memory and are not anchors; the others are
                anchors and stay out (pytorch-metric-learning's meaning). None: every row is an anchor and is stored.
            ids: `[B]` integers that identify samples, such as the image's index in the data set. Rows of the same id
                are not paired: neither two views in the batch, nor a row and an older copy of its sample in the memory.
                A negative number is no id. None: no row has an id.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: an argument is not as above, naming it.
            RuntimeError: called while a backward pass runs, as activation checkpointing does to compute the loss a
                second time; or with forward-mode derivatives or under `torch.func`, except with the library's losses
                in evaluation without grad and without a process_group.
        """

        def check() -> Batch:
            checks.some_weight(self.batch_weight, self.memory_weight)  # set since, one after the other
            batch = self._check(embeddings, labels, indices_tuple, enqueue_mask, ids)
            learns = self._check_step(self.step, batch.embeddings, others=batch[1:4])
            if self._ranks is not None and not (self.training or learns):
                check_not_transformed("where it has a process_group", *batch[:4])
            return batch._replace(learns=learns)

        ranks = self._ranks
        batch = check() if ranks is None else ranks.gather(check, self.step, self.training, self._options)
        if self.no_class is not None:
            batch = batch._replace(labels=apart(batch.labels, self.no_class, self.step * OF_A_STEP))
        x, y, mask, sample, *_ = batch
        x = x.to(compute_dtype(x.dtype))
        of_loss: Any = {name: getattr(self, name) for name in OF_LOSS}
        of_step: Any = {}
        if self.training:
            of_step = {"filter": self.filter, "update": self.update, "enqueue": self.enqueue}
        loss, batch = self.loss, batch._replace(embeddings=x)
        if isinstance(loss, OwnLoss):
            batch = self._apart(batch)
            losses = composed.losses_by_ops(self, batch, loss, **of_loss)
        elif ranks is not None and shared_step.is_worth_it(ranks, batch, self.bank, loss, self.batch_weight):
            losses = shared_step.losses_of(ranks, self, batch, loss, **of_loss)
        elif learned_offset(loss) is not None or (self.center_gradient and has_sides(loss)):
            batch = self._apart(batch)
            losses = composed.losses_by_ops(self, batch, loss, **of_loss)
        else:
            in_one = ops.step_ if self.training else ops.loss_of
            return self._given_back(in_one(self, x, y, loss, enqueue_mask=mask, ids=sample, **of_loss, **of_step))
        in_parts = composed.step_ if self.training else composed.loss_of
        of_step |= {"normalize_embeddings": self.normalize_embeddings, "eps": self.eps}
        return self._given_back(in_parts(self, batch, losses, **of_step))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """`reset_queue()`, and a learned temperature, bias or boundary gets its first value; its default, if made on
        the meta device. A loss of your own needs its own `reset_parameters`. Launchers call both after `to_empty()`."""
        self._begin_to_learn()
        self.reset_queue()  # last: a parametrization without a right_inverse has raised

    @torch.no_grad()
    def fill_from(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Replaces the memory with embeddings of the present network.

        `batches` yields `(embeddings [B, D], labels [B])`, with `ids [B]` as an optional third. The moments of what was
        stored become the target of the filter, taken as exact. Warm-up continues where it was. If anything raises, the
        memory stays as it was: a copy is filled first, which for a while takes as much memory again (three times as
        much if that is of 16 bits and follows a drift).

        Of several processes each brings batches of its own, all of them until the last has no more: first the first of
        each is stored, in the order of ranks, then the second.
        """
        if self.bank.is_meta:
            raise RuntimeError("fill_from: the memory is on the meta device, which holds no values")

        def checked() -> Iterator[Batch]:  # begins, and so fails, in the first round; and ends for good
            if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
                raise TypeError(f"batches must be iterable, got {checks.kind(batches)}")
            for batch in batches:
                checks.two_or_three(batch)
                embeddings, labels, *rest = batch
                yield self._check(embeddings, labels, None, None, *rest)

        given = checked()
        if self._ranks is not None:
            nothing = Batch(self.target_mean.expand(0, -1), self.bank_labels[:0])
            given = self._ranks.rounds(given, nothing, self.step)
        fill(self, given, self.filter is not None, self.normalize_embeddings, self.eps, self.no_class)

    def _check(self, embeddings: Any, labels: Any, indices_tuple: Any, enqueue_mask: Any, ids: Any = None) -> Batch:
        """Raises on bad input, naming the argument; labels and ids become int64, and all is where the memory is."""
        device, D, called_on = self.bank.device, self.embedding_size, self._stands_for
        checks.batch(embeddings, labels, indices_tuple, enqueue_mask, ids, D, called_on or device)
        if called_on is not None:
            embeddings, labels = embeddings.to(device), labels.to(device)
            enqueue_mask, ids = (None if t is None else t.to(device) for t in (enqueue_mask, ids))
        labels, ids = labels.to(torch.int64), None if ids is None else ids.to(torch.int64)
        self._check_state()
        self._check_loss(device)
        if self._own_loss is not None:
            try_out(self._own_loss, embeddings, apart(labels, self.no_class, 0))
        return Batch(embeddings, labels, enqueue_mask, ids)

    def _apart(self, batch: Batch) -> Batch:
        """The batch, copied before a step in parts writes: it may be rows, labels or ids of the memory."""
        if not self.training:
            return batch
        x, y, _, ids, *_ = batch
        x = x if self.normalize_embeddings else x.clone()
        return batch._replace(embeddings=x, labels=y.clone(), ids=None if ids is None else ids.clone())

    def extra_repr(self) -> str:
        """What `print(criterion)` shows."""
        ranks = "" if self._ranks is None else f", rank {self._ranks.rank} of {self._ranks.size}"
        ranks += "" if self.shards == 1 else f", shards={self.shards}"
        return (
            f"{self._name_of_loss()}, embedding_size={self.embedding_size}, memory_size={self.memory_size}, "
            f"drift={self.drift!r}, update={self.update!r}, enqueue={self.enqueue!r}, "
            f"memory_dtype={self.bank.dtype}{ranks}"
        )
