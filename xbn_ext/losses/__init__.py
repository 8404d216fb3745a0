"""Pair losses over cosine similarities: what the pairs of an anchor cost. The formulas are in `reference/losses.py`
(PyTorch) and `csrc/math/losses.h` (kernels). Parameters and values are those of pytorch-metric-learning with
`CosineSimilarity`, where it has the loss; so are the defaults, except for margins, which there are meant for Euclidean
distances, and for `Contrastive`'s reduction. `Contrastive` and `Triplet` have those margins with
`distance="euclidean"`.

An anchor's *positives* are the other rows of its class, its *negatives* all rows of other classes; `s` is the
similarity of a pair.
"""

from . import exponents, margins
from .custom import AnyLoss, CustomLoss, OwnLoss
from .exponents import *  # noqa: F403
from .in_chunks import InChunks
from .kinds import KINDS, LOSSES, check_loss
from .label_sets import LabelSets
from .margins import *  # noqa: F403
from .margins import DISTANCES, Distance, LossOfDistances, Reduction, TripletMining
from .pair_loss import LossWithTemperature, PairLoss
from .select_pairs import SelectPairs
from .smooth_ap import SmoothAP
from .with_loss import check_unit_rows

__all__ = [
    "DISTANCES",
    "KINDS",
    "LOSSES",
    "AnyLoss",
    "CustomLoss",
    "Distance",
    "InChunks",
    "LabelSets",
    "LossOfDistances",
    "LossWithTemperature",
    "OwnLoss",
    "PairLoss",
    "Reduction",
    "SelectPairs",
    "SmoothAP",
    "TripletMining",
    "check_loss",
    "check_unit_rows",
]
__all__ += exponents.__all__
__all__ += margins.__all__
