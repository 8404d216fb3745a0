"""CLIP (Radford et al. 2021, arXiv 2103.00020) with two memories, one of names and one of pictures.

Emoji drawn by several vendors are paired with their names in 36 languages. A picture is ranked against the memory of
names, a name against the memory of pictures: past batches give negatives that a small batch lacks. The test takes the
drawings of a vendor, and the names in a language, that were not trained on.

    python -m examples.clip
"""

from __future__ import annotations

import torch
from torch import nn

import xbn_ext

from . import names, pictures

VENDOR, LANGUAGE = "noto", "pt"  # of the test
TRAINED = "af az ca cs cy da de en es et eu fi fil fr ga gl hr hu id is it lt lv ms nl no pl ro sk sl sq sv sw tr uz vi"
LANGUAGES = TRAINED.split()
STEPS, BATCH, MEMORY, SIZE = 300, 64, 1024, 128


def main(seed: int = 0) -> tuple[float, float]:
    """Recall@1 of the name of a picture, before and after."""
    torch.manual_seed(seed)
    called = names.load([*LANGUAGES, LANGUAGE])
    shown = pictures.drawings()
    emoji = sorted({drawing.key for drawing in shown}.intersection(*called.values()))
    shown = [drawing for drawing in shown if drawing.key in emoji]
    labels = torch.tensor([emoji.index(drawing.key) for drawing in shown])
    tested = torch.tensor([drawing.vendor == VENDOR for drawing in shown])
    trained_on = (~tested).nonzero()[:, 0]
    features = pictures.pretrained_features([drawing.pixels for drawing in shown])
    image = nn.Sequential(nn.LayerNorm(features.shape[1]), nn.Linear(features.shape[1], SIZE))
    text = names.Encoder(SIZE)
    loss = xbn_ext.SupCon(temperature=nn.Parameter(torch.tensor(0.07)))
    criterion = xbn_ext.TwoTowers(loss, SIZE, MEMORY)  # first pictures, second names
    optimizer = torch.optim.Adam([*image.parameters(), *text.parameters(), *criterion.parameters()], lr=2e-2)

    def recall() -> float:
        with torch.no_grad():
            gallery = text([called[LANGUAGE][key] for key in emoji])
            queries, which = image(features[tested]), torch.arange(len(gallery))
            return 100 * xbn_ext.evaluate(queries, labels[tested], gallery, which)["precision_at_1"]

    before = recall()
    for _ in range(STEPS):
        chosen = trained_on[torch.randint(len(trained_on), (BATCH,))]
        languages = torch.randint(len(LANGUAGES), (BATCH,)).tolist()
        x = image(features[chosen])
        y = text([called[LANGUAGES[k]][shown[i].key] for k, i in zip(languages, chosen.tolist(), strict=True)])
        value = criterion(x, y, labels[chosen])  # pictures and names of one emoji are positives, of whatever batch
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        criterion.temperature.data.clamp_(min=0.05)  # lower, it fits these few names too closely

    after = recall()
    print(f"{len(emoji)} emoji, {int(criterion.second.count)} names in the memory, ", end="")
    print(f"temperature {criterion.temperature.item():.3f}")
    print(f"Recall@1 of the name of a picture: {before:.1f} % before, {after:.1f} % after")
    return before, after


if __name__ == "__main__":
    main()
