"""`DCLW`: a loss with a mean over the positives of all anchors inside, which no kernel's sums have. What runs it is
`plain/dclw.py`."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .custom import OwnLoss


class DCLW(OwnLoss):
    """Weighted decoupled contrastive loss with labels (Yeh et al. 2021, arXiv 2110.06848): `DCL`, with less weight on
    positives that are similar already.

    A positive pair costs `log sum_n e^(s_n / temperature) - w s / temperature`, `n` running over the anchor's
    negatives. Its weight is `w = 2 - e^(s / sigma) / E`, E being the mean of `e^(s / sigma)` over the positive pairs of
    all anchors that have negatives; it is taken for a constant in the gradient. Averaged over these pairs.

    Computed in PyTorch, a chunk of the memory at a time.

    Examples:
        >>> criterion = CrossBatchMemory(DCLW(), embedding_size=128, memory_size=8192)

    Args:
        temperature: positive.
        sigma: positive; the smaller, the more do weights differ.

    Raises:
        ValueError: one of them is not a positive number.
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5) -> None:
        super().__init__()
        self.temperature, self.sigma = temperature, sigma
        self.check()

    def check(self) -> None:
        """Raises ValueError for a temperature or a sigma that is not a positive number."""
        for name in ("temperature", "sigma"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                raise ValueError(f"{name} must be a number, got a tensor: in DCL a temperature may be learned")
            setattr(self, name, checks.finite_positive(name, value))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"temperature={self.temperature:g}, sigma={self.sigma:g}"
