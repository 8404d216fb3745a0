"""Stanford Online Products, In-Shop and DeepFashion2: miniatures of them, broken in every way, and whole runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
from miniatures import PER_CLASS, TEST_CLASSES, TRAIN_CLASSES
from PIL import Image

from train import evaluate, loop, run
from train.data import DataError, Dataset, deepfashion2, deepfashion2_index, fingerprint, images, inshop, load, sop

Edit = Callable[[str], str]


@pytest.fixture
def sop_folder(few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sop, "PUBLISHED", miniatures.make_sop(tmp_path / "sop", few_emoji))
    return tmp_path / "sop"


@pytest.fixture
def inshop_folder(few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inshop, "PUBLISHED", miniatures.make_inshop(tmp_path / "inshop", few_emoji))
    return tmp_path / "inshop"


@pytest.fixture
def df2_folder(few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(deepfashion2, "PUBLISHED", miniatures.make_deepfashion2(tmp_path / "df2", few_emoji))
    monkeypatch.setenv("XBN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "df2"


def edit(path: Path, change: Edit) -> None:
    path.write_text(change(path.read_text()))


# ---- Stanford Online Products ---------------------------------------------------------------------------------------


def test_sop_is_read_by_its_lists(sop_folder: Path, few_emoji: Dataset) -> None:
    data = load(f"sop:{sop_folder}")
    assert data.recalls == (1, 10, 100, 1000) and data.queries is None and data.mirror
    assert data.summary() == "train: 32 images of 8 classes, test: 24 images of 6 classes"
    assert not set(data.train.classes) & set(data.test.classes)
    assert set(data.train.classes) == {f"{('bicycle', 'mug')[i % 2]} {i + 1}" for i in range(8)}
    assert isinstance(data.test.images, images.Files) and data.test.images[0].shape == (64, 72, 3)
    for i, source in enumerate(data.test.sources):
        name = data.test.classes[data.test.labels[i]]
        assert source.startswith(f"{name.split()[0]}_final/{110000 + int(name.split()[1])}_")
    drawn = few_emoji.test.images[int(np.flatnonzero(few_emoji.test.labels == 0)[0])]
    seen = data.test.images[data.test.sources.index("bicycle_final/110009_0.JPG")]
    assert np.abs(seen[:, 4:-4].astype(int) - drawn).mean() < 8, "the drawing itself, apart from JPEG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("image_id", "id", 1), r"Ebay_test\.txt:1: expected 'image_id class_id super_class_"),
        (lambda text: text.replace("34 9 1 ", "34 9 ", 1), r"Ebay_test\.txt:3: 3 words, not 4: '34 9 bicycle_final"),
        (lambda text: text.replace("34 9 1 ", "34 x 1 ", 1), r"Ebay_test\.txt:3: expected three numbers and a path"),
        (lambda text: text.replace("34 9 1 ", "33 9 1 ", 1), r"_test\.txt:3: image_id 33 is in .*_test\.txt:2 already"),
        (
            lambda text: text.replace("110009_1", "110001_1"),
            r"test\.txt:3: image bicy.*1_1\.JPG is in .*train\.txt:3 al",
        ),
        (lambda text: text.replace(" 9 1 ", " 1 1 "), r"1 classes are both trained on and tested on: 1\n"),
        (lambda text: text[: text.rindex("56 ")], r"not the lists as published: 23 test images, not 24\n"),
        (
            lambda text: text.replace("110009_1", "110009_7"),
            r"1 of 56 files are missing or empty: .*110009_7\.JPG\n  Stanford",
        ),
    ],
)
def test_a_broken_list_of_sop(change: Edit, message: str, sop_folder: Path) -> None:
    edit(sop_folder / "Ebay_test.txt", change)
    with pytest.raises(DataError, match=message):
        load(f"sop:{sop_folder}")


def test_what_of_sop_is_missing(sop_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sop:.*nowhere: there is no Ebay_train\.txt\n.*get it at https://cvgl"):
        load(f"sop:{tmp_path}/nowhere")
    for file in (sop_folder / "mug_final").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"28 of 56 files are missing or empty: .*JPG, .*JPG, .*JPG, \.\.\.\n"):
        load(f"sop:{sop_folder}")
    (sop_folder / "Ebay_test.txt").unlink()
    with pytest.raises(DataError, match=r"there is no Ebay_test\.txt\n  Stanford .* bicycle_final/ .*get it at https:"):
        load(f"sop:{sop_folder}")


def test_an_empty_file_or_a_link_to_nothing_is_missing(sop_folder: Path) -> None:
    files = sorted((sop_folder / "mug_final").iterdir())
    files[0].write_bytes(b"")
    files[1].unlink()
    files[1].symlink_to(sop_folder / "nowhere.JPG")
    with pytest.raises(DataError, match=rf"2 of 56 files are missing or empty: .*{files[0].name}, .*{files[1].name}"):
        load(f"sop:{sop_folder}")


def test_a_folder_that_may_not_be_looked_into_is_named(sop_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are not missing. The tests' user may be root, who may all."""
    closed, real = sop_folder / "mug_final", os.scandir

    def scandir(folder: Any) -> Any:
        if Path(folder) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=rf"--data: cannot look at {closed}: Permission denied"):
        load(f"sop:{sop_folder}")


def test_the_counts_are_those_of_the_publications() -> None:
    assert sop.PUBLISHED == {"train images": 59551, "train classes": 11318, "test images": 60502, "test classes": 11316}
    assert tuple(inshop.PUBLISHED.values()) == (25882, 3997, 14218, 12612)


def test_a_few_classes_of_sop_need_their_files_only(sop_folder: Path) -> None:
    data = load(f"sop:{sop_folder}", max_classes=5)
    assert (len(data.train.classes), len(data.test.classes)) == (2, 3)
    used = {*data.train.sources, *data.test.sources}
    for file in sop_folder.glob("*/*.JPG"):
        if str(file.relative_to(sop_folder)) not in used:
            file.unlink()
    assert load(f"sop:{sop_folder}", max_classes=5).test.sources == data.test.sources
    with pytest.raises(DataError, match="files are missing"):
        load(f"sop:{sop_folder}")


def test_lists_may_begin_with_a_byte_order_mark(sop_folder: Path, inshop_folder: Path, df2_folder: Path) -> None:
    for kind, folder in (("sop", sop_folder), ("inshop", inshop_folder), ("deepfashion2", df2_folder)):
        before = load(f"{kind}:{folder}")
        for file in (*folder.rglob("*.txt"), *folder.rglob("*.json")):
            file.write_text(file.read_text(), encoding="utf-8-sig")
        after = load(f"{kind}:{folder}")
        assert (after.train.sources, after.test.classes) == (before.train.sources, before.test.classes)


# ---- In-Shop --------------------------------------------------------------------------------------------------------


def check_inshop(data: Dataset) -> None:
    assert data.recalls == (1, 10, 20, 30, 40, 50)
    assert data.summary().endswith("test: 24 images of 6 classes, 12 queries against a gallery of 12")
    assert data.queries is not None and data.gallery is not None
    for i in data.queries.tolist():
        assert data.test.sources[i][-13] in "24", "the second and the fourth of each are queries"
        assert f"/{data.test.classes[data.test.labels[i]]}/" in data.test.sources[i]
    assert not set(data.queries.tolist()) & set(data.gallery.tolist())
    assert data.test.images[0].shape == (64, 72, 3)


@pytest.mark.parametrize(("images_in", "list_in"), [("", "Eval"), ("", ""), ("Img", "Eval"), ("Img", "")])
def test_inshop_is_read_by_its_list(
    images_in: str, list_in: str, few_emoji: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = miniatures.make_inshop(tmp_path, few_emoji, images_in, list_in)
    monkeypatch.setattr(inshop, "PUBLISHED", counts)
    check_inshop(load(f"inshop:{tmp_path}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("item_id", "item"),
            r"list_eval_partition\.txt:2: expected 'image_name item_id eval",
        ),
        (
            lambda text: text.replace("train", "training", 1),
            r"partition\.txt:3: evaluation_status 'training' is not one of",
        ),
        (
            lambda text: text.replace("id_00000001/02", "id_00000001/01"),
            r":4: image img/.*/01_1_f.* is in .*:3 already",
        ),
        (lambda text: text.replace("  gallery", " x gallery", 1), r"partition\.txt:35: 4 words, not 3"),
        (lambda text: text.replace("56", "57", 1), r"says that it has 57 images, but has 56"),
        (
            lambda text: text.replace("  gallery", "  query", 1),
            r"published: 13 queries, not 12; 11 gallery images, not",
        ),
        (
            lambda text: text.replace("id_00000009  query", "id_00000001  query"),
            r"1 classes are both trained on and tes",
        ),
    ],
)
def test_a_broken_list_of_inshop(change: Edit, message: str, inshop_folder: Path) -> None:
    edit(inshop_folder / "Eval" / "list_eval_partition.txt", change)
    with pytest.raises(DataError, match=message):
        load(f"inshop:{inshop_folder}")


def test_what_of_inshop_is_missing(inshop_folder: Path) -> None:
    file = inshop_folder / "Eval" / "list_eval_partition.txt"
    text = file.read_text()
    file.write_text(text.replace("id_00000009  gallery", "id_00000010  gallery"))
    with pytest.raises(DataError, match=r"the gallery has no image of 1 items that are queried: id_00000009"):
        load(f"inshop:{inshop_folder}")
    file.write_text(text)
    (inshop_folder / "img" / "MEN").rename(inshop_folder / "img" / "GONE")
    with pytest.raises(
        DataError, match=r"28 of 56 files are missing or empty: .*img/MEN/Denim/.*\n  In-Shop.*agreement"
    ):
        load(f"inshop:{inshop_folder}")
    file.unlink()
    with pytest.raises(DataError, match=r"there is no Eval/list_eval_partition\.txt and no list_eval_partition\.txt\n"):
        load(f"inshop:{inshop_folder}")


def test_a_few_items_of_inshop(inshop_folder: Path) -> None:
    data = load(f"inshop:{inshop_folder}", max_classes=4)
    assert data.summary().endswith("test: 8 images of 2 classes, 4 queries against a gallery of 4")


# ---- DeepFashion2 ---------------------------------------------------------------------------------------------------


def annotation(folder: Path, number: int, side: str = "validation") -> Path:
    return folder / side / "annos" / f"{number:06}.json"


def change_item(path: Path, item: str | None = None, **values: Any) -> None:
    content = json.loads(path.read_text())
    (content if item is None else content[item]).update(values)
    path.write_text(json.dumps(content))


def test_deepfashion2_is_read_by_its_annotations(
    df2_folder: Path, few_emoji: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load(f"deepfashion2:{df2_folder}")
    assert data.recalls == (1, 10, 20) and data.queries is not None and data.gallery is not None
    assert len(data.train.classes) == TRAIN_CLASSES and len(data.train.labels) == TRAIN_CLASSES * PER_CLASS
    assert "train pair 1 style 1 (shorts, skirt)" in data.train.classes, "one identity, two names of its category"
    pairs = TEST_CLASSES // 2
    assert len(data.queries) == 2 * pairs, "garments of users without a style ask for nothing"
    assert len(data.gallery) == 4 * pairs, "those of shops without a style are in the way"
    assert len(data.test.classes) == pairs + 2 * pairs, "each as a class of its own"
    assert (evaluate.answers(data.test.labels, data.queries, data.gallery) == 2).all()
    for i in data.queries.tolist():
        number = int(Path(data.test.sources[i].split()[0]).stem)
        assert json.loads(annotation(df2_folder, number).read_text())["source"] == "user"
    drawn = few_emoji.test.images[int(np.flatnonzero(few_emoji.test.labels == 0)[1])]
    seen = data.test.images[data.test.sources.index("validation/image/000002.jpg item1")]
    assert seen.shape == drawn.shape and np.abs(seen.astype(int) - drawn).mean() < 8, "cut out by its box"
    assert capsys.readouterr().err == ""


def test_names_that_are_not_utf8(df2_folder: Path) -> None:
    """A file's of a garment that is a class of its own, which has its name; and a garment's."""
    file = annotation(df2_folder, 1)
    image = file.parent.parent / "image" / "000001.jpg"
    content = json.loads(file.read_text())
    strange = file.with_name(os.fsdecode(b"\xff.json"))
    strange.write_text(json.dumps(content | {"item1": content["item1"] | {"style": 0}, "item\ud800": content["item1"]}))
    shutil.copy(image, image.with_name(os.fsdecode(b"\xff.jpg")))
    data = load(f"deepfashion2:{df2_folder}")
    assert any(r", \udcff item1 (" in name for name in data.test.classes)
    assert fingerprint.of("", [data.train, data.test], [data.queries, data.gallery])["class names"]


def test_boxes_are_clipped_and_those_outside_are_left_out(df2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_item(annotation(df2_folder, 1), "item1", bounding_box=[-20, 10.5, 69.2, 300])
    change_item(annotation(df2_folder, 2), "item1", bounding_box=[200, 10, 260, 74])
    change_item(annotation(df2_folder, 3, "train"), "item1", bounding_box=[30, 10, 30, 74])
    data = load(f"deepfashion2:{df2_folder}")
    assert data.test.images[data.test.sources.index("validation/image/000001.jpg item1")].shape == (80, 70, 3)
    assert "validation/image/000002.jpg item1" not in data.test.sources
    said = capsys.readouterr().err
    assert "train: 1 garments left out, no pixel of whose box" in said and "validation: 1 garments left out, no" in said


def test_garments_that_nothing_matches_are_left_out(df2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 3):  # those of shops
        change_item(annotation(df2_folder, number), "item1", style=5)
    for number in (1, 2, 3):
        change_item(annotation(df2_folder, number, "train"), "item2", style=6 + number)
    data = load(f"deepfashion2:{df2_folder}")
    assert data.queries is not None and data.gallery is not None
    assert (len(data.queries), len(data.gallery)) == (4, 12)
    assert len(data.train.classes) == TRAIN_CLASSES - 1
    said = capsys.readouterr().err
    assert "validation: 2 garments of users left out, which no shop shows" in said
    assert "train: 4 identities with fewer than 2 images left out" in said


def test_a_few_identities_of_deepfashion2(df2_folder: Path) -> None:
    data = load(f"deepfashion2:{df2_folder}", max_classes=4)
    assert data.summary() == (
        "train: 8 images of 2 classes, test: 8 images of 2 classes, 4 queries against a gallery of 4"
    )


@pytest.mark.parametrize(
    ("values", "item", "message"),
    [
        ({"source": "web"}, None, r"annos/000002\.json: source 'web' is neither user nor shop"),
        ({"pair_id": "1"}, None, r"annos/000002\.json: pair_id '1' is not a number"),
        ({"pair_id": True}, None, r"annos/000002\.json: pair_id True is not a number"),
        ({"pair_id": 10**30}, None, r"annos/000002\.json: pair_id 10{30} is not a number"),
        ({"style": 2**63}, "item1", r"annos/000002\.json: style 9223372036854775808 of item1 is not a number"),
        ({"bounding_box": [0, 0, True, 9]}, "item1", r"bounding_box \[0, 0, True, 9\] of item1 is not four numbers"),
        ({"style": None}, "item1", r"annos/000002\.json: style None of item1 is not a number"),
        ({"bounding_box": [1, 2, 3]}, "item2", r"000002\.json: bounding_box \[1, 2, 3\] of item2 is not four numbers"),
    ],
)
def test_a_broken_annotation(values: dict[str, Any], item: str | None, message: str, df2_folder: Path) -> None:
    change_item(annotation(df2_folder, 2), item, **values)
    with pytest.raises(DataError, match=message):
        load(f"deepfashion2:{df2_folder}")


def test_an_annotation_that_is_a_pipe_is_not_waited_for(df2_folder: Path) -> None:
    annotation(df2_folder, 2).unlink()
    os.mkfifo(annotation(df2_folder, 2))
    with pytest.raises(DataError, match=r"cannot read .*annos/000002\.json: it is a pipe"):
        load(f"deepfashion2:{df2_folder}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0, 0, 9, 1e400]", r"annos/000002\.json: bounding_box \[0, 0, 9, inf\] of item1 is not finite"),
        (100_000 * "[", r"cannot read .*annos/000002\.json: maximum recursion depth exceeded"),
        ("[0, 0, 9, NaN]", r"cannot read .*annos/000002\.json: NaN is no number"),
    ],
)
def test_an_annotation_that_python_does_not_write(text: str, message: str, df2_folder: Path) -> None:
    change_item(path := annotation(df2_folder, 2), "item1", bounding_box="here")
    edit(path, lambda content: content.replace('"here"', text))
    with pytest.raises(DataError, match=message):
        load(f"deepfashion2:{df2_folder}")


def test_a_category_with_half_a_character_is_shown_as_an_escape(df2_folder: Path) -> None:
    change_item(annotation(df2_folder, 1), "item1", category_name="\ud800")
    data = load(f"deepfashion2:{df2_folder}")
    assert data.fingerprint and any(r"\ud800" in name for name in data.test.classes)


def test_what_of_deepfashion2_is_missing(df2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation(df2_folder, 12).unlink()
    load(f"deepfashion2:{df2_folder}")
    assert "validation has 11 annotations, not the 12 of the release: scores cannot be" in capsys.readouterr().err
    annotation(df2_folder, 3).write_text('{"source": "us')
    with pytest.raises(DataError, match=r"cannot read .*annos/000003\.json: Unterminated string"):
        load(f"deepfashion2:{df2_folder}")
    (df2_folder / "validation" / "image" / "000007.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 annotations have no image, or an empty one, the first .*validation/image/000007\.jpg"
    ):
        load(f"deepfashion2:{df2_folder}")
    (df2_folder / "validation" / "annos").rename(df2_folder / "annos")
    with pytest.raises(
        DataError, match=r"no folder validation/annos\n  DeepFashion2 is expected.*get it at https://gi"
    ):
        load(f"deepfashion2:{df2_folder}")


def same(one: Dataset, other: Dataset) -> bool:
    parts = [(one.train, other.train), (one.test, other.test)]
    return all(
        a.sources == b.sources and a.classes == b.classes and np.array_equal(a.labels, b.labels)
        and np.array_equal(a.images.boxes, b.images.boxes) for a, b in parts
    )  # fmt: skip


def test_a_second_start_reads_the_stored_index(df2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"deepfashion2:{df2_folder}")
    with monkeypatch.context() as patch:
        patch.setattr(deepfashion2_index, "_scan", lambda folder: pytest.fail("read again"))
        assert same(first, load(f"deepfashion2:{df2_folder}"))


@pytest.mark.parametrize("what", ["annotation", "image", "time", "added", "damage"])
def test_an_index_is_made_anew_when_anything_changed(
    what: str, df2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(f"deepfashion2:{df2_folder}")
    path = annotation(df2_folder, 1)
    if what == "annotation":
        change_item(path, "item1", bounding_box=[6, 10, 69, 74])
    elif what == "image":
        miniatures.write(df2_folder / "validation" / "image" / "000001.jpg", np.zeros((90, 152, 3), np.uint8))
    elif what == "time":
        os.utime(path, ns=(0, 0))
    elif what == "added":
        (df2_folder / "validation" / "image" / "000013.jpg").write_bytes(b"no image yet")
    else:
        (index,) = (tmp_path / "cache").glob("deepfashion2-validation-*.npz")
        index.write_bytes(index.read_bytes()[:-100])
    scanned: list[Path] = []
    plain = deepfashion2_index._scan
    monkeypatch.setattr(deepfashion2_index, "_scan", lambda folder: (scanned.append(folder), plain(folder))[1])
    load(f"deepfashion2:{df2_folder}")
    assert [folder.name for folder in scanned] == ["validation"], "the other folder is as it was"
    assert ("damaged" in capsys.readouterr().err) == (what == "damage")
    load(f"deepfashion2:{df2_folder}")
    assert len(scanned) == 1


def test_a_box_is_cut_out_upright_and_clipped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.check(tmp_path / "turned.jpg") == (4, 8)
    assert images.decode(tmp_path / "turned.jpg", (1, 5, 9, 9)).shape == (3, 3, 3)
    with pytest.raises(DataError, match=r"turned\.jpg: the box \[4, 0, 8, 4\] is outside"):
        images.decode(tmp_path / "turned.jpg", (4, 0, 8, 4))


# ---- whole runs -----------------------------------------------------------------------------------------------------


def brute_force(embeddings: torch.Tensor, data: Dataset) -> dict[str, float]:
    """Recall@K from the full matrix of similarities."""
    z = torch.nn.functional.normalize(embeddings.double(), dim=1).numpy()
    labels = data.test.labels
    everything = np.arange(len(labels))
    queries, gallery = (everything, everything) if data.queries is None else (data.queries, data.gallery)
    similar = z[queries] @ z[gallery].T
    similar[queries[:, None] == gallery] = -np.inf
    ranked = gallery[np.argsort(-similar, axis=1, kind="stable")][:, : len(gallery) - (data.queries is None)]
    right = labels[ranked] == labels[queries][:, None]
    return {f"recall@{k}": 100 * float(right[:, :k].any(1).mean()) for k in data.recalls}


@pytest.mark.parametrize("kind", ["sop", "inshop", "deepfashion2"])
def test_a_miniature_trains_and_is_tested_by_its_protocol(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = request.getfixturevalue({"deepfashion2": "df2_folder"}.get(kind, f"{kind}_folder"))
    ends: list[tuple[torch.Tensor, Dataset]] = []
    plain = loop.Trainer.run

    def remember(self: loop.Trainer, asked_to_stop: Callable[[], bool]) -> torch.Tensor:
        ends.append((plain(self, asked_to_stop), self.data))
        return ends[-1][0]

    monkeypatch.setattr(loop.Trainer, "run", remember)
    network = {"sop": "efficientnet-lite0"}.get(kind, "convnet")
    small = "--image-size 32 --batch-size 8 --samples-per-class 2 --memory-size 16 --embedding-dim 8 --warmup-steps 1"
    steps = f"--backbone {network} --batchnorm auto --lr 1e-3 --steps 4 --eval-every 2 --threads 1 --workers 0"
    arguments = ["--recipe", kind, "--data", f"{kind}:{folder}", *small.split(), *steps.split()]
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    ((embeddings, data),) = ends
    expected = brute_force(embeddings, data)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert list(metrics["before"]) == [*expected, "map@r"]
    asked, gallery = {"sop": (24, 24), "inshop": (12, 12), "deepfashion2": (6, 12)}[kind]
    assert (metrics["data"]["queries"], metrics["data"]["gallery"]) == (asked, gallery)
    printed = capsys.readouterr().out
    assert all(name in printed for name in expected) and data.summary() in printed
    with Image.open(tmp_path / "out" / "neighbours.png") as picture:
        assert min(picture.size) > 300
