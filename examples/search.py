"""Search a folder of pictures: embed it with a network that `train/` has trained, and find what is nearest to a query.

make train                                           # leaves its network in runs/axbn
python -m examples.pictures FOLDER                   # pictures of emoji that it has not seen; or a folder of yours
python -m examples.search runs/axbn FOLDER QUERY     # QUERY is a picture, in the folder or not
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
from matplotlib.figure import Figure

from train.data import images
from train.data.folder import pictures
from train.trained import Trained

SHOWN = 8


class Searcher:
    """The pictures of a folder, indexed by their embeddings."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Raises ValueError if `run` has no checkpoint, or `folder` no pictures, or one that cannot be read."""
        self.trained, self.paths = Trained(run), pictures(folder)
        embeddings = self.trained.embed(images.Files(self.paths))
        self.index = faiss.IndexFlatIP(embeddings.shape[1])  # the inner product of unit vectors is their cosine
        self.index.add(embeddings.numpy())

    def nearest(self, query: Path, count: int = SHOWN) -> list[tuple[Path, float]]:
        """The most similar pictures, best first, with their cosine similarity. The query itself is left out.

        Raises ValueError if it cannot be read, or if there is no other picture.
        """
        embedding = self.trained.embed(images.Files([query])).numpy()
        similarities, found = self.index.search(embedding, min(count + 1, len(self.paths)))
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
