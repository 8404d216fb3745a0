"""``search RUN FOLDER QUERY...``: the pictures in a folder that are most like others, as a table and as a page."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import checkpoint, embed, evaluate, outputs, page, terminal
from .about import file_path
from .config import ConfigError
from .data import DataError, folder, images, tree
from .embed import Embeddings
from .program import called
from .trained import Trained

COUNT = 8
PICTURES, OF_QUERY = 1000, 100
"""Pictures on a page, some 10 KB each, and those of one query."""


class Found(NamedTuple):
    """What is most like a picture."""

    query: Path
    neighbours: list[tuple[Path, float]]
    """Best first, with their cosine similarity."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    terminal.prepare()
    parser = argparse.ArgumentParser(
        prog=called("search"),
        description="Find the pictures in a folder that are most like others, by the network of a run: a table, and "
        "a page that shows them. A query that is in the folder does not find itself.",
    )
    embed.add_arguments(parser)
    parser.add_argument("queries", metavar="QUERY", nargs="+", type=Path, help="a picture, in the folder or not")
    parser.add_argument(
        "--count",
        type=_count,
        default=COUNT,
        metavar="N",
        help="pictures to find for each query (default: %(default)s)",
    )
    parser.add_argument(
        "--embeddings", type=file_path, metavar="NAME", help="those that embed has written of this folder as NAME"
    )
    parser.add_argument("--out", type=file_path, default=Path("search.html"), help="the page (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        outputs.require_page(given.out)
        trained = Trained(given.run, given.weights_of)
        _check_queries(given.queries)
        if given.embeddings is None:
            files = folder.pictures(given.folder)
            there = Embeddings(files, embed.of_pictures(trained, files, given.device, given.workers))
        else:
            there = embed.read(given.embeddings, trained, given.run, given.folder)
        answers = search(trained, there, given.queries, given.count, given.device, given.workers)
        if not any(answer.neighbours for answer in answers):
            raise DataError(f"FOLDER {given.folder}: has no picture except {given.queries[0]}")
        write(given.out, answers, given.run, trained.step, given.folder, len(there.files))
    except (ConfigError, DataError) as error:
        return terminal.refuse("search", error)
    try:
        terminal.answer(*table(answers, given.folder), f"shown in {terminal.printable(str(given.out))}")
    except OSError as error:
        return terminal.refuse("search", OSError(f"standard output: {error.strerror}"))
    return 0


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def _check_queries(queries: Sequence[Path]) -> None:
    try:
        images.check_all(queries)
    except DataError as error:
        raise DataError(f"QUERY: {str(error).removeprefix('--data: ')}") from error


def search(
    trained: Trained,
    there: Embeddings,
    queries: Sequence[Path],
    count: int = COUNT,
    device: str = "cpu",
    workers: int | None = None,
) -> list[Found]:
    """The pictures most like each query; one that is among them does not find itself, nor a link to itself.

    Args:
        trained: the network.
        there: the pictures to be found, and their embeddings by this network.
        queries: pictures, among those or not.
        count: how many for each query; all there are where there are fewer.
        device: where the network computes.
        workers: processes that prepare pictures; None: as --workers says.

    Raises:
        ConfigError: the network gives embeddings that are not finite.
        DataError: a query, or a picture that is to be found, cannot be read.
    """
    files, own = there.files, _own(there.files, queries)
    rows = torch.cat([there.rows, _embedded(trained, there, queries, own, device, workers)])
    asked = np.arange(len(files), len(rows), dtype=np.int64)
    most = count + max(map(len, own))
    found = evaluate.neighbours(rows, most, queries=asked, gallery=np.arange(len(files), dtype=np.int64))
    answers = []
    for query, row, itself, nearest in zip(queries, asked.tolist(), own, found.tolist(), strict=True):
        others = [i for i in nearest if i not in itself][:count]
        similarities = F.cosine_similarity(rows[row], rows[others]) if others else torch.empty(0)
        answers.append(Found(query, list(zip([files[i] for i in others], similarities.tolist(), strict=True))))
    return answers


def _own(files: Sequence[Path], queries: Sequence[Path]) -> list[set[int]]:
    """Which of the files each query is: none, one, or several that are links to one, symbolic or hard.

    Raises:
        DataError: one of them is not there any more.
    """
    positions = defaultdict(set)
    try:
        for i, file in enumerate(files):
            positions[tree.identity(os.stat(file))].add(i)
        return [positions.get(tree.identity(os.stat(query)), set()) for query in queries]
    except OSError as error:
        raise DataError(f"cannot read {error.filename} ({error.strerror})") from error


def _embedded(
    trained: Trained, there: Embeddings, queries: Sequence[Path], own: list[set[int]], device: str, workers: int | None
) -> Tensor:
    """The queries' embeddings, float32 [Q, D]; those that are among the files have theirs."""
    rows = torch.empty(len(queries), there.rows.shape[1])
    outside = [i for i, itself in enumerate(own) if not itself]
    if outside:
        rows[outside] = embed.of_pictures(trained, [queries[i] for i in outside], device, workers)
    for i, itself in enumerate(own):
        if itself:
            rows[i] = there.rows[min(itself)]
    return rows


def table(answers: Sequence[Found], pictures: Path) -> list[str]:
    """A line for each picture that was found; its file is named by its path below ``pictures``. And one for a query
    that is the only picture there."""
    names = [terminal.printable(str(answer.query)) for answer in answers]
    width = max(map(len, [*names, "query"]))
    lines = [f"{'query':{width}}  rank  similarity  file"]
    for name, answer in zip(names, answers, strict=True):
        for rank, (file, similarity) in enumerate(answer.neighbours, 1):
            shown = terminal.printable(file.relative_to(pictures).as_posix())
            lines.append(f"{name:{width}}  {rank:4}  {similarity:10.3f}  {shown}")
        if not answer.neighbours:
            lines.append(f"{name:{width}}  {'-':>4}  {'-':>10}  (no other picture)")
    return lines


def write(out: Path, answers: Sequence[Found], run: Path, step: int, pictures: Path, count: int) -> None:
    """Write the page.

    Args:
        out: its file.
        answers: what was found for each query.
        run: the network's.
        step: of it.
        pictures: the folder.
        count: how many pictures are in it.

    Raises:
        ConfigError: it cannot be written.
        DataError: a picture cannot be read.
    """
    each = min(OF_QUERY, max(len(answer.neighbours) for answer in answers))
    shown = answers[: PICTURES // (each + 1)]
    thumbnails = page.Thumbnails()
    sections = [
        {
            "name": str(query),
            "file": query.name,
            "picture": thumbnails(query),
            "found": [
                {"name": file.relative_to(pictures).as_posix(), "picture": thumbnails(file), "similarity": similarity}
                for file, similarity in neighbours[:each]
            ],
        }
        for query, neighbours in shown
    ]
    left_out = [f"the first {len(shown):,} of {len(answers):,} queries"] if len(shown) < len(answers) else []
    if any(len(answer.neighbours) > each for answer in answers):
        left_out.append(f"the first {each} pictures found for a query")
    values = {"run": str(run), "step": step, "folder": str(pictures if pictures.name else pictures.resolve())}
    html = page.render("search.html", sections=sections, count=count, left_out=" and ".join(left_out), **values)
    checkpoint.write_whole(out, lambda path: path.write_text(html, encoding="utf-8"))
