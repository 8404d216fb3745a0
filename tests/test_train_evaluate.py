"""Retrieval scores against a slow computation that follows the definitions word by word, and another library's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from train import evaluate, search
from train.augment import EvaluationBatches
from train.data import Part

Numbers = NDArray[np.int64]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def by_definition(
    embeddings: NDArray[np.float64],
    labels: Numbers,
    queries: Numbers | None = None,
    gallery: Numbers | None = None,
    recalls: Sequence[int] = (1, 10, 100),
) -> dict[str, float]:
    """Recall@K and MAP@R in float64, one query at a time."""
    z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    totals = dict.fromkeys([*(f"recall@{k}" for k in recalls), "map@r"], 0.0)
    everything = np.arange(len(z))
    count = 0
    for query in everything if queries is None else queries:
        others = [i for i in (everything if gallery is None else gallery) if i != query]
        ranked = sorted(others, key=lambda i: -float(z[i] @ z[query]))
        right = [labels[i] == labels[query] for i in ranked]
        if not any(right):
            continue
        count += 1
        for k in recalls:
            totals[f"recall@{k}"] += any(right[:k])
        r = sum(right)
        totals["map@r"] += sum(sum(right[: i + 1]) / (i + 1) for i in range(r) if right[i]) / r
    return {name: 100 * total / count for name, total in totals.items()}


def closest(embeddings: NDArray[np.float64], labels: Numbers) -> float:
    """How close to one another a right and a wrong row ever are, in similarity to a query: float32 must tell which of
    them comes first."""
    z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    gaps = [np.inf]
    for query, row in enumerate(z @ z.T):
        order = np.argsort(np.delete(row, query))
        right = np.delete(labels == labels[query], query)[order]
        gaps.append(np.diff(np.delete(row, query)[order])[right[1:] != right[:-1]].min(initial=np.inf))
    return min(gaps)


def ragged(seed: int, count: int, classes: int, noise: float = 1.0) -> tuple[NDArray[np.float64], Numbers]:
    """Embeddings in clusters; classes of all sizes, some with one member only."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(3 / classes, count) - 1, classes - 1).astype(np.int64)
    return rng.normal(size=(classes, 16))[labels] + noise * rng.normal(size=(count, 16)), labels


@pytest.mark.parametrize(("count", "classes", "noise"), [(300, 40, 1.0), (150, 50, 0.7), (12, 3, 2.0)])
def test_scores_follow_their_definitions(count: int, classes: int, noise: float) -> None:
    rng = np.random.default_rng(count)
    labels = np.concatenate([np.arange(classes), np.arange(classes), rng.integers(0, classes, count - 2 * classes)])
    embeddings = rng.normal(size=(classes, 16))[labels] + noise * rng.normal(size=(count, 16))
    scores = evaluate.evaluate(torch.from_numpy(embeddings), labels)
    expected = by_definition(embeddings, labels)
    assert scores == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["map@r"] < expected["recall@1"] < 100, "neither trivial nor hopeless"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(12, 120),
    classes=st.integers(3, 40),
    part=st.one_of(st.none(), st.floats(0.1, 0.9)),
    chunk=st.integers(1, 40),
)
def test_any_protocol_and_any_chunks(seed: int, count: int, classes: int, part: float | None, chunk: int) -> None:
    """Leave-one-out or query and gallery, distractors, queries without an answer, lists of all lengths."""
    embeddings, labels = ragged(seed, count, classes)
    assume(closest(embeddings, labels) > 1e-6)
    where = np.random.default_rng(seed).permutation(count)
    split = None if part is None else max(1, int(part * count))
    queries, gallery = (None, None) if split is None else (where[:split], where[split:])
    recalls = (1, 3, 20, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CHUNK", chunk)
        patch.setattr(evaluate, "LIST_NUMBERS", 50)
        wanted = evaluate.answers(labels, queries, gallery)
        if not wanted.any():
            return
        scores = evaluate.evaluate(
            torch.from_numpy(embeddings), labels, queries=queries, gallery=gallery, recalls=recalls
        )
    assert scores == pytest.approx(by_definition(embeddings, labels, queries, gallery, recalls), abs=1e-9)
    assert scores["recall@1000"] == 100, "all of the gallery holds a right one"


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_scores_are_those_of_pytorch_metric_learning(leave_one_out: bool) -> None:
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    for seed in range(5):
        embeddings, labels = ragged(seed, 500, 60)
        z = torch.nn.functional.normalize(torch.from_numpy(embeddings).float(), dim=1)
        where = np.random.default_rng(seed).permutation(500)
        queries, gallery = (None, None) if leave_one_out else (where[:150], where[150:])
        wanted = evaluate.answers(labels, queries, gallery)
        assert wanted.min() == 0 and wanted.max() > 10, "some have no answer, some many"
        theirs = calculator.AccuracyCalculator(("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
        t, q, g = torch.from_numpy(labels), queries, gallery
        found = theirs.get_accuracy(z, t) if leave_one_out else theirs.get_accuracy(z[q], t[q], z[g], t[g])
        ours = evaluate.evaluate(z, labels, queries=queries, gallery=gallery)
        assert ours["recall@1"] == pytest.approx(100 * found["precision_at_1"], abs=1e-4)
        assert ours["map@r"] == pytest.approx(100 * found["mean_average_precision_at_r"], abs=1e-4)


def test_lists_are_no_longer_than_a_chunk_of_queries_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class of 400 among pairs: only its own queries get long lists, and never all at once."""
    labels = np.concatenate([np.zeros(400, np.int64), np.arange(800) // 2 + 1])
    embeddings = np.random.default_rng(0).normal(size=(1200, 8)) + (labels == 0)[:, None]
    asked: list[tuple[int, int]] = []
    plain = evaluate.Search.__call__
    monkeypatch.setattr(evaluate, "LIST_NUMBERS", 8000)
    monkeypatch.setattr(
        evaluate.Search, "__call__", lambda self, w, n: (asked.append((len(w), n)), plain(self, w, n))[1]
    )
    scores = evaluate.evaluate(torch.from_numpy(embeddings), labels, recalls=(1, 10))
    assert scores == pytest.approx(by_definition(embeddings, labels, recalls=(1, 10)), abs=1e-9)
    assert all(n * count <= 8000 for n, count in asked) and sum(n for n, _ in asked) == 1200
    assert asked[0] == (20, 399) and asked[-1][1] == 10


def test_map_at_r_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])  # R = 3 for class 0, 1 for class 1
    found = np.array([[1, 4, 2], [4, 5, 0], [0, 1, 3], [4, 0, 1], [5, 0, 1], [0, 4, 1]])
    right = labels[found] == labels[:, None]
    expected = [(1 + 2 / 3) / 3, (1 / 3) / 3, 1, (1 / 2 + 2 / 3) / 3, 1, 0]
    assert evaluate.average_precision(right, evaluate.answers(labels)).tolist() == pytest.approx(expected)
    assert (evaluate.first_right(right)[:5] == [0, 2, 0, 1, 0]).all()
    assert evaluate.first_right(right)[5] == 1
    assert evaluate.first_right(np.zeros((1, 3), bool))[0] > 10**9


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


def test_a_gallery_holds_no_query() -> None:
    rows, gallery = torch.randn(12, 4), np.arange(5, 12)
    found = evaluate.neighbours(rows, 100, queries=np.arange(5), gallery=gallery)
    assert found.shape == (5, 7) and all(sorted(row) == gallery.tolist() for row in found.tolist())
    some = evaluate.neighbours(rows, 2, np.array([3, 1]), queries=np.arange(5), gallery=gallery)
    assert np.array_equal(some, found[[3, 1], :2])
    with pytest.raises(ValueError, match="both query and gallery"):
        evaluate.neighbours(rows, 1, queries=np.arange(6), gallery=gallery)
    with pytest.raises(ValueError, match="go together"):
        evaluate.neighbours(rows, 1, queries=np.arange(6))


def test_length_does_not_matter_but_direction_does() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scaled = rows * torch.linspace(0.01, 100, 50)[:, None]
    assert np.array_equal(evaluate.neighbours(rows, 5), evaluate.neighbours(scaled, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("protocol", [{}, {"queries": np.array([1]), "gallery": np.array([0, 2])}])
def test_embeddings_must_be_finite(bad: float, protocol: dict[str, Numbers]) -> None:
    rows = torch.tensor([[1.0, 2.0], [bad, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        evaluate.evaluate(rows, np.zeros(3, np.int64), **protocol)


def test_nothing_to_be_found() -> None:
    with pytest.raises(ValueError, match="no query has an image of its class"):
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
