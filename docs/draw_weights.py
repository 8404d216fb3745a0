"""Draws weights.png: how strongly each loss pulls at a pair, by the pair's similarity. `python docs/draw_weights.py`"""

from pathlib import Path

import matplotlib
import torch

from xbn_ext import (
    DCL,
    NCA,
    Circle,
    Contrastive,
    LiftedStructure,
    Margin,
    MultiSimilarity,
    NTXent,
    SigLIP,
    SupCon,
    Triplet,
)
from xbn_ext.reference.losses import pair_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {
    "-": [Contrastive(), Margin(), SupCon(), NTXent(), MultiSimilarity(), Circle()],
    "--": [SigLIP(bias=-5.0), DCL(), NCA(8.0), LiftedStructure(), Triplet(margin=0.2), Triplet(margin=0.2, soft=True)],
}
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
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, positive in zip(axes, (True, False), strict=True):
        for style, losses in LOSSES.items():
            axis.set_prop_cycle(None)
            for loss in losses:
                w = weights(loss, positive, s)
                name = type(loss).__name__ + (", soft" if getattr(loss, "soft", False) else "")
                axis.plot(s, w / w.max().clamp(min=1e-12), style, label=name)
        kind, other = ("positive", "negative") if positive else ("negative", "positive")
        axis.set_title(f"a {kind}; the anchor's {other} is at {OTHER[positive]}")
        axis.set_xlabel("similarity")
    axes[0].set_ylabel("weight, of the largest")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(Path(__file__).with_name("weights.png"), dpi=110)


if __name__ == "__main__":
    main()
