"""Draws weights.png: how strongly each loss pulls at a pair, by the pair's similarity. `python docs/draw_weights.py`"""

from pathlib import Path

import matplotlib
import torch

from xbn_ext import Circle, Contrastive, MultiSimilarity, NTXent, SupCon, Triplet
from xbn_ext.reference.losses import pair_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = [Contrastive(), SupCon(), NTXent(), MultiSimilarity(), Circle(), Triplet(margin=0.2)]
OTHER = {True: 0.3, False: 0.6}  # the similarity of the anchor's other pair: a negative, a positive


def weights(loss, positive: bool, similarities: torch.Tensor) -> torch.Tensor:
    """|d loss / d s| of a pair, of an anchor that has one positive and one negative."""
    s = torch.stack([similarities, torch.full_like(similarities, OTHER[positive])], 1).requires_grad_()
    labels = torch.tensor([[positive, not positive]])
    of_rows = [pair_loss(loss, row[None], labels, torch.ones_like(labels)) for row in s]
    (grad,) = torch.autograd.grad(sum(of_rows), s)
    return grad[:, 0].abs()


def main() -> None:
    s = torch.linspace(-0.2, 1, 241, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, positive in zip(axes, (True, False), strict=True):
        for loss in LOSSES:
            w = weights(loss, positive, s)
            axis.plot(s, w / w.max().clamp(min=1e-12), label=type(loss).__name__)
        kind, other = ("positive", "negative") if positive else ("negative", "positive")
        axis.set_title(f"a {kind}; the anchor's {other} is at {OTHER[positive]}")
        axis.set_xlabel("similarity")
    axes[0].set_ylabel("weight, of the largest")
    axes[1].legend(fontsize=8)
    figure.savefig(Path(__file__).with_name("weights.png"), dpi=110)


if __name__ == "__main__":
    main()
