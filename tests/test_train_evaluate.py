"""Retrieval scores against a slow computation that follows the definitions word by word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from train import evaluate


def by_definition(embeddings: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Recall@k and MAP@R in float64, one query at a time."""
    z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    totals = dict.fromkeys(("recall@1", "recall@10", "recall@100", "map@r"), 0.0)
    for query in range(len(z)):
        others = [i for i in range(len(z)) if i != query]
        ranked = sorted(others, key=lambda i: -float(z[i] @ z[query]))
        right = [labels[i] == labels[query] for i in ranked]
        for k in (1, 10, 100):
            totals[f"recall@{k}"] += any(right[:k])
        r = sum(right)
        totals["map@r"] += sum(sum(right[: i + 1]) / (i + 1) for i in range(r) if right[i]) / r
    return {name: 100 * total / len(z) for name, total in totals.items()}


@pytest.mark.parametrize(("count", "classes", "noise"), [(300, 40, 1.0), (150, 50, 0.7), (12, 3, 2.0)])
def test_scores_follow_their_definitions(count: int, classes: int, noise: float) -> None:
    rng = np.random.default_rng(count)
    labels = np.concatenate([np.arange(classes), np.arange(classes), rng.integers(0, classes, count - 2 * classes)])
    embeddings = rng.normal(size=(classes, 16))[labels] + noise * rng.normal(size=(count, 16))
    scores, _ = evaluate.evaluate(torch.from_numpy(embeddings), labels)
    expected = by_definition(embeddings, labels)
    assert scores == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["map@r"] < expected["recall@1"] < 100, "neither trivial nor hopeless"


def test_classes_larger_than_the_neighbour_lists_of_recall() -> None:
    labels = np.repeat(np.arange(2), 130).astype(np.int64)
    embeddings = np.random.default_rng(0).normal(size=(260, 4)) + labels[:, None]
    scores, found = evaluate.evaluate(torch.from_numpy(embeddings), labels)
    assert found.shape == (260, 129)
    assert scores == pytest.approx(by_definition(embeddings, labels), abs=1e-9)


def test_map_at_r_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])  # R = 3 for class 0, 1 for class 1
    found = np.array([[1, 4, 2], [4, 5, 0], [0, 1, 3], [4, 0, 1], [5, 0, 1], [0, 4, 1]])
    expected = [(1 + 2 / 3) / 3, (1 / 3) / 3, 1, (1 / 2 + 2 / 3) / 3, 1, 0]
    assert evaluate.score(found, labels)["map@r"] == pytest.approx(100 * np.mean(expected))
    assert evaluate.score(found, labels)["recall@1"] == pytest.approx(100 * 3 / 6)


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


def test_length_does_not_matter_but_direction_does() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scaled = rows * torch.linspace(0.01, 100, 50)[:, None]
    assert np.array_equal(evaluate.neighbours(rows, 5), evaluate.neighbours(scaled, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        evaluate.neighbours(torch.tensor([[1.0, 2.0], [bad, 1.0], [0.0, 1.0]]), 1)


def test_lists_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 \.\. 2 images"):
        evaluate.score(np.array([[1], [2], [0]]), np.array([0, 0, 0]))
    with pytest.raises(ValueError, match="images here"):
        evaluate.score(np.array([[1], [0], [0]]), np.array([0, 0, 1]))


def test_embed_joins_the_outputs_of_all_batches() -> None:
    batches = [torch.full((n, 3, 2, 2), n, dtype=torch.uint8) for n in (3, 2)]
    first, second = evaluate.embed(
        lambda images: (images[:, 0, 0].double(), images[:, 0, 0, :1] * 2), batches, torch.device("cpu")
    )
    assert first.dtype == torch.float32 and first.shape == (5, 2)
    assert second.flatten().tolist() == [6, 6, 6, 4, 4]
