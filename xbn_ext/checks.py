"""What users may pass: raises and names the argument, before anything is written."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import collectives
from .dtypes import MEMORY_DTYPES, is_narrow


def listed(words: Sequence[str]) -> str:
    """`a, b or c`, for a message."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


MEMORY_DTYPE_NAMES = listed([str(dtype).removeprefix("torch.") for dtype in MEMORY_DTYPES])


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int, if it is an integer, not a bool, not below `least`, and int64 holds it."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value!r}")
    return number


def whole_from(least: int) -> Callable[[str, Any], int]:
    """`whole`, not below `least`."""
    return lambda name, value: whole(name, value, least)


def none_or_label(name: str, value: Any) -> int | None:
    """None, or an integer that int64 holds."""
    if value is None:
        return None
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be None or an integer that int64 holds, got {value!r}")
    return number


def finite(name: str, value: Any) -> float:
    """`value` as a float, if it is a real number and not a bool."""
    if isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a number, got a tensor: only a temperature, a bias or a boundary can be learned"
        )
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # an int or a fraction that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def moderate(name: str, value: Any) -> float:
    """`finite`, and within [-1e15, 1e15]: float32 holds its product with another one, and more."""
    number = finite(name, value)
    within(name, number, -1e15, 1e15)
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, not what counts as one of them: "false" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def positive(name: str, value: float) -> None:
    """Within [1e-30, 1e30]: float32 holds it and its reciprocal."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    within(name, value, 1e-30, 1e30)


def within(name: str, value: float, least: float, most: float) -> None:
    """Both included."""
    if not least <= value <= most:
        bounds = f"[{least:g}, {most:g}]".replace("+", "")
        raise ValueError(f"{name} must be within {bounds}, got {value}")


def finite_positive(name: str, value: Any) -> float:
    """`value` as a float that is `positive`."""
    number = finite(name, value)
    positive(name, number)
    return number


def one_of(*words: str) -> Callable[[str, Any], str]:
    """A check for one of these."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"{name} must be {listed([repr(word) for word in words])}, got {value!r}")
        return value

    return check


def some_weight(batch_weight: float, memory_weight: float) -> None:
    """One of the two at least is not 0."""
    if batch_weight == 0 and memory_weight == 0:
        raise ValueError("batch_weight and memory_weight are both 0: there is nothing to learn from")


def tensors(op: str, **values: Any) -> None:
    """As the kernels say it of None: for functions that look at a tensor before they call an op."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise RuntimeError(f"{op}: {name} must be a tensor, got {value if value is None else kind(value)}")


def embeddings(value: Any, columns: int, name: str = "embeddings") -> None:
    """A dense floating-point tensor `[B, columns]`."""
    if not is_dense(value) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind(value)}")
    if value.dim() != 2 or value.shape[1] != columns:
        raise ValueError(f"{name} must be [B, embedding_size={columns}], got {list(value.shape)}")


def rows(name: str, value: Any) -> None:
    """A dense floating-point tensor of two dimensions, the second of them not 0."""
    if not is_dense(value) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind(value)}")
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(f"{name} must be rows of one number or more, got a tensor of shape {list(value.shape)}")


def integers(name: str, value: Any, B: int, letter: str = "B") -> None:
    """A dense integer tensor `[B]`; `letter` is what B is called."""
    no_integer = not is_dense(value) or value.is_floating_point() or value.is_complex() or value.is_quantized
    if no_integer or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {kind(value)}")
    if value.shape != (B,):
        raise ValueError(f"{name} must be [{letter}={B}], got {list(value.shape)}")


def class_labels(value: Any, B: int, name: str = "labels", letter: str = "B") -> None:
    """Integers `[B]` that int64 holds: a uint64 one of 2^63 or more would be negative there, and may be another's."""
    integers(name, value, B, letter)
    in_int64(name, value)


def sample_ids(value: Any, B: int, name: str = "ids", letter: str = "B") -> None:
    """Integers `[B]` that int64 holds: a uint64 one of 2^63 or more would be negative there, which is no id."""
    integers(name, value, B, letter)
    in_int64(name, value, ", and clear the top bit first if they are hashes, since a negative id is no id")


def in_int64(name: str, value: Tensor, advice: str = "") -> None:
    """Not of the only dtype with integers that int64 does not hold, whatever they are: the host need not look."""
    if value.dtype == torch.uint64:
        raise TypeError(
            f"{name} must be of a dtype that int64 holds, got torch.uint64: pass {name}.to(torch.int64){advice}"
        )


def mask(name: str, value: Any, B: int) -> None:
    """A dense bool tensor `[B]`."""
    if not is_dense(value) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {kind(value)}")
    if value.shape != (B,):
        raise ValueError(f"{name} must be [B={B}], got {list(value.shape)}")


def on_device(device: torch.device, **tensors: Tensor | None) -> None:
    """The tensors are where the memory is."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}, the memory on {device}: move one of them")


def batch(
    embeddings_: Any, labels: Any, indices_tuple: Any, enqueue_mask: Any, ids: Any, columns: int, device: torch.device
) -> None:
    """What a `CrossBatchMemory` is called with: tensors of one batch, on a device."""
    embeddings(embeddings_, columns)
    B = embeddings_.shape[0]
    class_labels(labels, B)
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple must be None: pairs are never listed here. To mine, choose Triplet(mining=...) or "
            "MultiSimilarity(mining=...); to choose anchors and stored rows, pass enqueue_mask= or ids="
        )
    if enqueue_mask is not None:
        mask("enqueue_mask", enqueue_mask, B)
    if ids is not None:
        sample_ids(ids, B)
    on_device(device, embeddings=embeddings_, labels=labels, enqueue_mask=enqueue_mask, ids=ids)


def search(embeddings: Any, labels: Any, gallery: Any, gallery_labels: Any, ids: Any, gallery_ids: Any) -> None:
    """What `evaluate` is called with: queries, and a gallery or None."""
    given = {"embeddings": embeddings, "labels": labels, "gallery": gallery, "gallery_labels": gallery_labels}
    for name, value in (given | {"ids": ids, "gallery_ids": gallery_ids}).items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} is on the meta device, which holds no values")
    rows("embeddings", embeddings)
    class_labels(labels, len(embeddings), "labels", "Q")
    if ids is not None:
        sample_ids(ids, len(embeddings), "ids", "Q")
    if gallery is None:
        for name, value in (("gallery_labels", gallery_labels), ("gallery_ids", gallery_ids)):
            if value is not None:
                raise ValueError(f"{name} must be None without a gallery")
        return
    rows("gallery", gallery)
    if gallery.shape[1] != embeddings.shape[1]:
        raise ValueError(f"gallery must be [G, D={embeddings.shape[1]}] as embeddings, got {list(gallery.shape)}")
    if gallery.device != embeddings.device:
        raise ValueError(f"gallery is on {gallery.device}, embeddings on {embeddings.device}: move one of them")
    class_labels(gallery_labels, len(gallery), "gallery_labels", "G")
    if (ids is None) != (gallery_ids is None):
        raise ValueError("ids and gallery_ids go together: pass both, or none of them")
    if gallery_ids is not None:
        sample_ids(gallery_ids, len(gallery), "gallery_ids", "G")


def two_or_three(batch: Any) -> None:
    """What `fill_from` is given of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        got = f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise ValueError(f"batches must yield (embeddings, labels) or (embeddings, labels, ids), got a {got}")


def shards(value: Any, process_group: Any) -> int:
    """At least 1; more, or a mesh that says so, of several processes."""
    shards = whole("shards", value, 1)
    if process_group is not None:
        shards = collectives.shards_of(process_group, shards)
    elif shards > 1:
        raise ValueError("shards needs a process_group: one process has all of its memory")
    return shards


def rows_of_a_part(batch_size: Any, process_group: Any) -> int | None:
    """At least 1, or None; of a batch that has parts."""
    if batch_size is None:
        return None
    if process_group is None:
        raise ValueError("batch_size needs a process_group: a batch of one process has as many rows as it has")
    return whole("batch_size", batch_size, 1)


def memory_dtype(dtype: Any) -> None:
    """One of those that rows may be stored in."""
    if dtype not in MEMORY_DTYPES:
        raise ValueError(f"memory_dtype must be torch.{MEMORY_DTYPE_NAMES}, got {dtype}")


def rounding(update: str, memory_dtype: torch.dtype, drift: str) -> None:
    """A memory that is rewritten at every step is not narrow."""
    if is_narrow(memory_dtype) and update == "inplace" and drift != "none":
        raise ValueError(
            f"update='inplace' would round a memory of {memory_dtype} at every step until it has drifted off: "
            "use update='deferred'"
        )


def is_dense(value: Any) -> bool:
    """A tensor, and neither a sparse nor a nested nor a distributed one."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and not hasattr(value, "device_mesh")  # of a DTensor, whose class is not imported for this
    )


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors do."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def kind(value: Any) -> str:
    """What a message calls the type of a value."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if is_dense(value):
        return str(value.dtype)
    if hasattr(value, "device_mesh"):
        return f"{value.dtype} in a {type(value).__name__}, not its to_local()"
    return f"{value.dtype}, {'nested' if value.is_nested else value.layout}"
