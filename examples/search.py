"""Search a folder of pictures: embed it with a network that `train/` has trained, and find what is nearest to a query.

make train                                           # leaves its network in runs/axbn
python -m examples.pictures FOLDER                   # pictures of emoji that it has not seen; or a folder of yours
python -m examples.search runs/axbn FOLDER QUERY     # QUERY is a picture, in the folder or not
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from train import augment, checkpoint, config, model
from train.data import formats, images

SHOWN = 8


class Searcher:
    """The pictures of a folder, indexed by their embeddings."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Raises ValueError if `run` has no checkpoint, or `folder` no pictures, or one that cannot be read."""
        state = checkpoint.load(run / checkpoint.CHECKPOINT, "RUN must be the --out of a run of train/")
        settings = config.Config(**state["config"] | {"weights": "none"})  # the weights come from the checkpoint
        self.network, _ = model.build(settings)
        self.network.load_state_dict(state["model"])
        self.view = augment.evaluation_view(settings.image_size, settings.augment)  # as the run was tested
        found = (path for path in folder.rglob("*") if path.suffix.lower() in formats.SUFFIXES)
        shown = (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
        self.paths = sorted(path for path in shown if path.is_file() or not path.exists())  # no folder, no pipe
        if not self.paths:
            raise ValueError(f"{folder}: no pictures in it")
        embeddings = torch.cat([self.embed(self.paths[i : i + 256]) for i in range(0, len(self.paths), 256)])
        self.index = faiss.IndexFlatIP(embeddings.shape[1])  # the inner product of unit vectors is their cosine
        self.index.add(embeddings.numpy())

    @torch.inference_mode()
    def embed(self, paths: list[Path]) -> Tensor:
        """Embeddings of unit length, [N, D]."""
        pictures = torch.stack([self.view(augment.to_tensor(images.decode(path))) for path in paths])
        return nn.functional.normalize(self.network.eval()(pictures), dim=1)

    def nearest(self, query: Path, count: int = SHOWN) -> list[tuple[Path, float]]:
        """The most similar pictures, best first, with their cosine similarity. The query itself is left out.

        Raises ValueError if it cannot be read, or if there is no other picture.
        """
        similarities, found = self.index.search(self.embed([query]).numpy(), min(count + 1, len(self.paths)))
        pairs = zip([self.paths[i] for i in found[0]], similarities[0].tolist(), strict=True)
        others = [(path, similarity) for path, similarity in pairs if not path.samefile(query)][:count]
        if not others:
            raise ValueError(f"{query}: there is no other picture to compare it with")
        return others


def show(query: Path, found: list[tuple[Path, float]], out: Path) -> None:
    """The query and what was found for it, side by side, as a picture file."""
    figure = Figure(figsize=(1.5 * (len(found) + 1), 2), layout="constrained")
    for axes, (path, similarity) in zip(figure.subplots(1, len(found) + 1), [(query, 1.0), *found], strict=True):
        axes.imshow(images.decode(path))
        axes.set_axis_off()
        axes.set_title("query" if path == query else f"{similarity:.2f}", fontsize=10)
    figure.savefig(out, dpi=100, format=out.suffix[1:] or "png")  # without it, a name with no suffix would get one


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find the pictures in a folder that are most like a picture.")
    parser.add_argument("run", type=Path, help="the --out of a run of train/")
    parser.add_argument("folder", type=Path, help="pictures, also in folders below it; hidden ones are left out")
    parser.add_argument("query", type=Path, help="a picture")
    parser.add_argument("--out", type=Path, default=Path("found.png"), help="where to show it (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        answer = Searcher(arguments.run, arguments.folder).nearest(arguments.query)
        show(arguments.query, answer, arguments.out)
    except (OSError, ValueError) as error:
        parser.error(str(error).removeprefix("--data: "))
    print(*(f"{similarity:.3f}  {path}" for path, similarity in answer), f"shown in {arguments.out}", sep="\n")
