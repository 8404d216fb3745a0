"""In-Shop Clothes Retrieval of DeepFashion: shop photographs of 7,982 garments, a few views and colours of each.

Half of the garments are trained on; of the others some photographs query a gallery of the rest (Liu et al., CVPR 2016).
The list is ``list_eval_partition.txt``: a line with the number of images, a line of column names, then ``image_name
item_id evaluation_status`` for each image, the last being train, query or gallery.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import benchmark
from .benchmark import Row, Source, Unique
from .dataset import Dataset
from .part import DataError

SOURCE = Source(
    "inshop",
    "In-Shop Clothes Retrieval",
    "a folder with Eval/list_eval_partition.txt or list_eval_partition.txt, and img/WOMEN/... or Img/img/WOMEN/...",
    "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, after signing its agreement",
)
LISTS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
FOLDERS = ("", "Img")
"""Where the list's ``img/...`` may lie."""
HEADER = "image_name item_id evaluation_status"
STATUSES = ("train", "query", "gallery")
PUBLISHED = {"train images": 25882, "train items": 3997, "queries": 14218, "gallery images": 12612}
RECALLS = (1, 10, 20, 30, 40, 50)


def load(path: Path, *, max_classes: int | None = None) -> Dataset:
    """Read the list and see that its images are there; see ``train.data.load`` for the arguments."""
    rows = _read(path)
    train, queries, gallery = (rows[status] for status in STATUSES)
    train_keys, test_keys = [row.key for row in train], [row.key for row in (*queries, *gallery)]
    counts = (len(train), len(set(train_keys)), len(queries), len(gallery))
    benchmark.check_counts(SOURCE, path, dict(zip(PUBLISHED, counts, strict=True)), PUBLISHED)
    benchmark.check_disjoint(SOURCE, path, train_keys, test_keys)
    alone = sorted({row.key for row in queries} - {row.key for row in gallery})
    if alone:
        raise SOURCE.error(path, f"the gallery has no image of {len(alone)} items that are queried: {alone[0]}, ...")
    keep_train, keep_test = benchmark.choose(train_keys, test_keys, max_classes)
    train = [row for row in train if row.key in keep_train]
    queries, gallery = ([row for row in side if row.key in keep_test] for side in (queries, gallery))
    test = [*queries, *gallery]
    folder = next((path / name for name in FOLDERS if (path / name / "img").is_dir()), path)
    benchmark.check_files(SOURCE, path, [folder / row.path for row in (*train, *test)])
    numbers = np.arange(len(test), dtype=np.int64)
    return Dataset(
        SOURCE.title,
        benchmark.make_part(folder, train),
        benchmark.make_part(folder, test),
        mirror=True,
        queries=numbers[: len(queries)],
        gallery=numbers[len(queries) :],
        recalls=RECALLS,
    )


def _read(path: Path) -> dict[str, list[Row]]:
    """The rows of each status."""
    file = next((path / name for name in LISTS if (path / name).is_file()), None)
    if file is None:
        raise SOURCE.error(path, f"there is no {' and no '.join(LISTS)}")
    rows: dict[str, list[Row]] = {status: [] for status in STATUSES}
    names = Unique("image")
    for number, (name, key, status) in benchmark.lines(file, ["", HEADER], 3):
        place = f"{file}:{number}"
        if status not in rows:
            raise DataError(f"--data: {place}: evaluation_status {status!r} is not one of {', '.join(STATUSES)}")
        names.add(name, place)
        rows[status].append(Row(key, name))
    count = benchmark.text(file).split(maxsplit=1)[0]
    total = sum(map(len, rows.values()))
    if count != str(total):
        raise SOURCE.error(path, f"{file} says that it has {count} images, but has {total:,}")
    return rows
