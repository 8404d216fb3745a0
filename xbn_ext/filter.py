"""The drift models: each is the same scalar filter on the moments of the embeddings, with another gain."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from . import checks

Drift = Literal["none", "xbn", "axbn", "ema"]


class Filter(NamedTuple):
    """Arguments of `ops.track_`."""

    process_noise: float | None
    """None: it is estimated."""
    measurement_noise: float
    fixed_gain: float | None


def make_filter(
    drift: Drift, process_noise: float | None, measurement_noise: float, ema_momentum: float
) -> Filter | None:
    """The filter of a drift model; None for `"none"`, which leaves the bank alone.

    `"xbn"`: the moments of the last batch are the truth (infinite process noise). `"axbn"`: Kalman filter;
    without a process noise one that adapts.
    `"ema"`: exponential moving average with a constant gain, the control for it.

    Raises:
        ValueError: unknown drift model, or a noise or momentum out of range.
    """
    if drift not in ("none", "xbn", "axbn", "ema"):
        raise ValueError(f"drift must be 'none', 'xbn', 'axbn' or 'ema', got {drift!r}")
    if process_noise is not None:
        process_noise = checks.finite("process_noise", process_noise)
    measurement_noise = checks.finite("measurement_noise", measurement_noise)
    ema_momentum = checks.finite("ema_momentum", ema_momentum)
    if process_noise is not None and process_noise < 0:
        raise ValueError(f"process_noise must not be negative, got {process_noise}")
    if measurement_noise <= 0:
        raise ValueError(f"measurement_noise must be positive, got {measurement_noise}")
    if not 0 < ema_momentum <= 1:
        raise ValueError(f"ema_momentum must be within (0, 1], got {ema_momentum}")
    if drift == "xbn":
        return Filter(math.inf, measurement_noise, None)
    if drift == "axbn":  # only the ratio of the noises matters: of one that is estimated, that to 1 is
        return Filter(process_noise, 1.0 if process_noise is None else measurement_noise, None)
    if drift == "ema":
        return Filter(0.0, measurement_noise, ema_momentum)
    return None
