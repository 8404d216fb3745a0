"""What a loss of a batch against a memory may be told: its options, once for the ops, their twins in
`xbn_ext.reference`, and `CrossBatchMemory`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

from torch import Tensor

Way = Literal["auto", "simt", "tensor", "screen", "halves", "composite"]  # what they are: `xbn_ext.loss_way`
WAYS: tuple[Way, ...] = get_args(Way)
WAYS_FOR_TESTS = (*WAYS, "pairs")  # as "screen", however many pairs that leaves


class PairOptions(TypedDict, total=False):
    """Which pairs there are, and what their similarity is. All may be left out.

    Attributes:
        bank_ids: `[M]` int64 ids of the rows; None (the default): a row's id is its number.
        exclude: `[B]` int64, the bank row that an anchor must not be paired with; with `bank_ids`, all rows of this
            id. -1 and the smallest int64 mean none, as None does for all anchors (the default).
        anchors: `[B]` bool, the rows of z that rank; None (the default): all.
        renormalize: False takes `s_ij = z_i · r_j`; True (the default) divides it by the row's norm.
        eps: lower bound of a row's norm; 1e-6 by default.
    """

    bank_ids: Tensor | None
    exclude: Tensor | None
    anchors: Tensor | None
    renormalize: bool
    eps: float


class LossOptions(PairOptions, total=False):
    """Those of a loss against a bank as it lies: which rows there are and what they stand for, too.

    Attributes:
        count: int64 scalar on the same device: only the first `count` rows of the bank exist; None (the default): all.
        scale: `[D]` a bank row u stands for `scale * u + shift`; None (the default): for itself.
        shift: `[D]`, None exactly when scale is.
    """

    count: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


# What is left out is None, except for these.
NOT_NONE = {"renormalize": True, "eps": 1e-6}
PAIR_DEFAULTS: dict[str, Any] = dict.fromkeys(sorted(PairOptions.__optional_keys__)) | NOT_NONE
LOSS_DEFAULTS: dict[str, Any] = dict.fromkeys(sorted(LossOptions.__optional_keys__)) | NOT_NONE


def complete(function: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what was left out. Raises TypeError, as Python does, for one that the function does not have."""
    for name in options:
        if name not in defaults:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {**defaults, **options}
