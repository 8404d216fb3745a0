"""Stanford Online Products: photographs of 22,634 products; half are trained on and half tested on.

Every test image queries all the others (Song et al., arXiv 1511.06452). The lists are ``Ebay_train.txt`` and
``Ebay_test.txt``: one line of column names, then ``image_id class_id super_class_id path`` for each image.
"""

from __future__ import annotations

from pathlib import Path

from . import benchmark
from .benchmark import Row, Source, Unique
from .dataset import Dataset
from .part import DataError

SOURCE = Source(
    "sop",
    "Stanford Online Products",
    "the unpacked folder Stanford_Online_Products with Ebay_train.txt, Ebay_test.txt and bicycle_final/ ... "
    "toaster_final/",
    "https://cvgl.stanford.edu/projects/lifted_struct/",
)
HEADER = "image_id class_id super_class_id path"
PUBLISHED = {"train images": 59551, "train classes": 11318, "test images": 60502, "test classes": 11316}
RECALLS = (1, 10, 100, 1000)


def load(path: Path, *, max_classes: int | None = None) -> Dataset:
    """Read the lists and see that their images are there; see ``train.data.load`` for the arguments."""
    ids, paths = Unique("image_id"), Unique("image")
    train, test = (_read(path, f"Ebay_{side}.txt", ids, paths) for side in ("train", "test"))
    train_keys, test_keys = ([row.key for row in rows] for rows in (train, test))
    counts = (len(train), len(set(train_keys)), len(test), len(set(test_keys)))
    benchmark.check_counts(SOURCE, path, dict(zip(PUBLISHED, counts, strict=True)), PUBLISHED)
    benchmark.check_disjoint(SOURCE, path, train_keys, test_keys)
    keep_train, keep_test = benchmark.choose(train_keys, test_keys, max_classes)
    train = [row for row in train if row.key in keep_train]
    test = [row for row in test if row.key in keep_test]
    benchmark.check_files(SOURCE, path, [path / row.path for row in (*train, *test)])
    titles = {row.key: f"{row.path.partition('_final/')[0]} {row.key}" for row in (*train, *test)}
    return Dataset(
        SOURCE.title,
        benchmark.make_part(path, train, titles),
        benchmark.make_part(path, test, titles),
        mirror=True,
        recalls=RECALLS,
    )


def _read(path: Path, name: str, ids: Unique, paths: Unique) -> list[Row]:
    listed = path / name
    if not listed.is_file():
        raise SOURCE.error(path, f"there is no {name}")
    rows = []
    for number, (image, key, super_class, file) in benchmark.lines(listed, [HEADER], 4):
        place = f"{listed}:{number}"
        if not (image.isdecimal() and key.isdecimal() and super_class.isdecimal()):
            raise DataError(f"--data: {place}: expected three numbers and a path, {HEADER!r}")
        ids.add(image, place)
        paths.add(file, place)
        rows.append(Row(key, file))
    return rows
