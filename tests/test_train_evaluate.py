"""Scores of test images and their neighbours. The scores themselves: `test_evaluate.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from train import evaluate, index
from train.augment import EvaluationBatches
from train.data import Part
from xbn_ext import scores

pytestmark = pytest.mark.usefixtures("one_thread")

Numbers = NDArray[np.int64]


@pytest.mark.parametrize("queried", [0, 100, 150], ids=["all", "apart", "some are both"])
def test_scores_are_those_of_the_library_and_of_the_neighbours(queried: int) -> None:
    """The rows that pictures show are those that are scored; some queries have no answer, some many."""
    rng = np.random.default_rng(0)
    labels = np.minimum(rng.geometric(1 / 20, 300) - 1, 59).astype(np.int64)
    embeddings = torch.from_numpy(rng.normal(size=(60, 16))[labels] + rng.normal(size=(300, 16)))
    where = rng.permutation(300)
    queries, gallery = (None, None) if queried == 0 else (where[:queried], where[100:])
    found = evaluate.evaluate(embeddings, labels, queries=queries, gallery=gallery, recalls=(1, 20, 1000))
    wanted = evaluate.answers(labels, queries, gallery)
    assert wanted.min() == 0 and wanted.max() > 10
    nearest = evaluate.neighbours(embeddings, 300, queries=queries, gallery=gallery)
    right = torch.from_numpy(labels[nearest] == labels[slice(None) if queries is None else queries, None])[wanted > 0]
    assert list(found) == ["recall@1", "recall@20", "recall@1000", "map@r"] and found["recall@1000"] == 100
    assert found["recall@20"] == pytest.approx(100 * right[:, :20].any(1).double().mean().item())
    average = scores.average_precision(right, torch.from_numpy(wanted[wanted > 0]))
    assert found["map@r"] == pytest.approx(100 * average.mean().item())
    assert 0 < found["map@r"] < found["recall@1"] < 100, "neither trivial nor hopeless"


def test_the_query_is_left_out_by_number_and_its_copies_stay() -> None:
    """Eight copies of one row: a search by similarity may put any of them first, and more than are asked for."""
    rows = torch.nn.functional.normalize(torch.ones(10, 4) + torch.arange(10)[:, None].div(8).floor() * 9, dim=1)
    rows[8:] = torch.tensor([[1.0, -1, 1, -1], [1, -1, -1, 1]])
    for count in (1, 3, 9):
        found = evaluate.neighbours(rows, count)
        assert found.shape == (10, count)
        assert (found != np.arange(10)[:, None]).all()
        assert all(len(set(row)) == count for row in found.tolist())
        assert (found[:8, : min(count, 7)] < 8).all(), "copies come before the others"


def test_a_query_finds_the_gallery_except_itself() -> None:
    rows, gallery = torch.randn(12, 4), np.arange(5, 12)
    found = evaluate.neighbours(rows, 100, queries=np.arange(5), gallery=gallery)
    assert found.shape == (5, 7) and all(sorted(row) == gallery.tolist() for row in found.tolist())
    some = evaluate.neighbours(rows, 2, np.array([3, 1]), queries=np.arange(5), gallery=gallery)
    assert np.array_equal(some, found[[3, 1], :2])
    found = evaluate.neighbours(rows, 100, queries=np.arange(6), gallery=gallery)
    assert found.shape == (6, 6) and set(found[5]) == set(range(6, 12))
    assert all(len(set(row)) == 6 and set(row) < set(gallery) for row in found[:5])
    with pytest.raises(ValueError, match="go together"):
        evaluate.neighbours(rows, 1, queries=np.arange(6))


def test_neighbours_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gallery = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), np.arange(12, 30)
    for protocol in ({}, {"queries": np.arange(12), "gallery": gallery}):
        whole = evaluate.neighbours(rows, 5, **protocol)
        with monkeypatch.context() as patch:
            patch.setattr(index, "CHUNK", 5)
            assert np.array_equal(evaluate.neighbours(rows, 5, **protocol), whole)


def test_length_does_not_matter_but_direction_does() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scaled = rows * torch.linspace(0.01, 100, 50)[:, None]
    assert np.array_equal(evaluate.neighbours(rows, 5), evaluate.neighbours(scaled, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("protocol", [{}, {"queries": np.array([1]), "gallery": np.array([0, 2])}])
def test_embeddings_must_be_finite(bad: float, protocol: dict[str, Numbers]) -> None:
    rows = torch.tensor([[1.0, 2.0], [bad, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="must be finite"):
        evaluate.evaluate(rows, np.zeros(3, np.int64), **protocol)
    with pytest.raises(ValueError, match="not finite"):
        evaluate.neighbours(rows, 1, **protocol)


def test_nothing_to_be_found() -> None:
    with pytest.raises(ValueError, match="no query has a row of its class"):
        evaluate.evaluate(torch.randn(4, 2), np.arange(4))


def test_embed_joins_the_outputs_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.augment.EVALUATION_BATCH", 3)
    images = [np.full((2, 2, 3), i, np.uint8) for i in range(5)]
    batches = EvaluationBatches(Part(images, np.zeros(5, np.int64), ("a",), ("",) * 5), lambda image: image)

    def network(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, 0, 0].double(), len(images) + images[:, 0, 0, :1]

    first, second = evaluate.embed(network, batches, torch.device("cpu"))
    assert first.dtype == torch.float32 and first.tolist() == [[i, i] for i in range(5)]
    assert second.flatten().tolist() == [3, 4, 5, 5, 6]
