"""Scores of a search against a slow computation that follows the definitions word by word, and another library's."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from xbn_ext import evaluate, evaluation, scores

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KS = (1, 3, 20, 1000)


def of_length_1(rows):
    rows = rows / np.maximum(np.abs(rows).max(1, keepdims=True), 1e-300)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def cosine(row, query):
    return float(row @ query)


def of_integers(row, query):
    """In the order of the cosines with the query, without rounding."""
    product = int(row @ query)
    return Fraction(product * abs(product), int(row @ row))


def by_definition(
    embeddings, labels, gallery=None, gallery_labels=None, *, ks=KS, ids=None, gallery_ids=None, similarity=cosine
):
    """In float64, one query and one place at a time."""
    of_length = of_length_1 if similarity is cosine else np.asarray
    z = of_length(embeddings)
    found, found_labels, found_ids = z, labels, ids
    if gallery is not None:
        found, found_labels, found_ids = of_length(gallery), gallery_labels, gallery_ids
    names = [*(f"recall_at_{k}" for k in ks), "precision_at_1", "r_precision", "mean_average_precision_at_r"]
    totals, count = dict.fromkeys(names, 0.0), 0
    for query, label in enumerate(labels):
        others = [i for i in range(len(found)) if gallery is not None or i != query]
        if ids is not None and ids[query] >= 0:
            others = [i for i in others if found_ids[i] != ids[query]]
        ranked = sorted(others, key=lambda i: (-similarity(found[i], z[query]), found_labels[i] == label))
        right = [bool(found_labels[i] == label) for i in ranked]
        R = sum(right)
        if R == 0:
            continue
        count += 1
        for k in ks:
            totals[f"recall_at_{k}"] += any(right[:k])
        totals["precision_at_1"] += right[0]
        totals["r_precision"] += sum(right[:R]) / R
        totals["mean_average_precision_at_r"] += sum(sum(right[: i + 1]) / (i + 1) for i in range(R) if right[i]) / R
    return {name: total / count for name, total in totals.items()} if count else None


def ragged(seed, count, classes, noise=1.0):
    """Embeddings in clusters; classes of all sizes, some with one member only."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(3 / classes, count) - 1, classes - 1)
    return rng.normal(size=(classes, 16))[labels] + noise * rng.normal(size=(count, 16)), labels * 7 - 20


def signs(rng, count):
    """Rows of -1, 0 and 1 whose products are exact in float32 when they have length 1: full of ties. Some are zero."""
    rows = rng.choice([-1.0, 1.0], (count, 16))
    rows[:, 4:] *= rng.choice([0, 1], (count, 1))  # 4 or 16 of them are not 0
    return rows * rng.choice([0, 1], (count, 1), p=[0.1, 0.9])


def tensors(**arrays):
    return {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}


def assert_same(ours, expected, tolerance=1e-12):
    assert ours.keys() == expected.keys()
    assert all(abs(ours[name] - value) <= tolerance for name, value in expected.items()), (ours, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "classes", "noise"), [(200, 40, 1.0), (120, 50, 0.7), (30, 6, 2.0)])
def test_scores_follow_their_definitions(device, count, classes, noise):
    embeddings, labels = ragged(count, count, classes, noise)
    x, y = torch.from_numpy(embeddings).to(device), torch.from_numpy(labels).to(device)
    expected = by_definition(embeddings, labels)
    assert_same(evaluate(x, y, ks=KS), expected)
    assert 0 < expected["mean_average_precision_at_r"] < 1, "neither trivial nor hopeless"
    assert_same(evaluate(x.requires_grad_(), y.cpu(), ks=KS), expected)  # labels are anywhere, gradients in no way


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 40),
    classes=st.integers(1, 20),
    queries=st.one_of(st.none(), st.integers(1, 20)),
    with_ids=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    chunk_bytes=st.integers(1, 10_000),
)
def test_any_protocol_any_chunks_and_ties(seed, count, classes, queries, with_ids, dtype, chunk_bytes):
    """All rows or a gallery, distractors, queries without an answer, samples with several rows; equal similarities."""
    rng = np.random.default_rng(seed)
    G = None if queries is None else count
    Q = count if queries is None else queries
    given = {
        "embeddings": signs(rng, Q),
        "labels": rng.integers(-classes, classes, Q),
        "gallery": None if G is None else signs(rng, G),
        "gallery_labels": None if G is None else rng.integers(-classes, classes, G),
        "ids": rng.integers(-2, Q, Q) if with_ids else None,
        "gallery_ids": rng.integers(-2, Q, G) if with_ids and G is not None else None,
    }
    expected = by_definition(**given)
    given = tensors(**given)
    for name in ("embeddings", "gallery"):
        given[name] = None if given[name] is None else given[name].to(dtype)
    if expected is None:
        with pytest.raises(ValueError, match="labels: no query has a row of its class"):
            evaluate(**given)
    else:
        assert_same(evaluate(**given, ks=KS, chunk_bytes=chunk_bytes), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("largest, dim", [(1, 32), (1, 48), (3, 5), (9, 48)])
def test_ties_of_integers_are_ties(largest, dim, kind, device):
    """Codes are all of one length, the others are not. Whatever rounds would break ties."""
    rng = np.random.default_rng(dim)
    rows = rng.choice([-1, 1] if largest == 1 else range(-largest, largest + 1), (160, dim))
    rows[(rows == 0).all(1)] = 1
    labels = rng.integers(4, size=160)
    expected = by_definition(rows, labels, similarity=of_integers)
    x, y = torch.from_numpy(rows).to(device, kind), torch.from_numpy(labels).to(device)
    lengths = 2.0 ** torch.arange(-8, 8, device=device).repeat(10)[:, None]
    for chunk_bytes in (None, 1, 10_000):
        columns = torch.from_numpy(rng.permutation(dim)).to(device)
        assert_same(evaluate((x * lengths)[:, columns].to(kind), y, ks=KS, chunk_bytes=chunk_bytes), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_collapsed_embeddings_score_nothing(device):
    """All rows are alike: sorted labels, or the order of the rows, must not look like knowledge."""
    labels = torch.arange(60, device=device) // 6
    for x in (torch.ones(60, 4, device=device), torch.zeros(60, 4, device=device)):
        assert set(evaluate(x, labels, ks=(1, 10)).values()) == {0}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [7, 129, 333, pytest.param(1001, marks=pytest.mark.long)])
def test_copies_are_equally_similar_wherever_they_are(rows, kind, device):
    """A product of matrices may round its last columns differently."""
    labels = torch.arange(rows, device=device) % 2
    for dim in (7, 33, 128):
        x = torch.randn(1, dim, dtype=kind, device=device)
        for chunk_bytes in (None, 1, 100_000):
            scores = evaluate(x.expand(rows, -1), labels, ks=(1,), chunk_bytes=chunk_bytes)
            assert set(scores.values()) == {0}
        scores = evaluate(torch.cat([x, -x]).repeat(rows, 1)[:rows], labels, ks=(1,))
        assert scores["r_precision"] == 1, "of two points each is of a class"


def test_torch_has_another_default_device():
    embeddings, labels = ragged(0, 60, 10)
    x, y, ids = torch.from_numpy(embeddings), torch.from_numpy(labels), torch.arange(60) // 2
    x[::7] = x[0]
    for more in ({}, {"ids": ids}, {"gallery": x, "gallery_labels": y}):
        expected = evaluate(x, y, **more)
        with torch.device("meta"):
            assert evaluate(x, y, **more) == expected


def test_which_rows_are_copies():
    x = torch.tensor([[1.0, 0], [0, 1], [1, -0.0], [2, 0], [0, 1], [1, 0]])
    distinct, copy_of = evaluation._distinct(x)
    assert copy_of.tolist() == [0, 1, 0, 2, 1, 0] and torch.equal(distinct, x[[0, 1, 3]])
    for rows in (x[:2], x[:1], x[:0]):
        assert evaluation._distinct(rows) == (rows, None)


def test_copies_are_found_unless_they_have_the_same_id():
    x = torch.eye(4).repeat(2, 1)  # each row once more
    labels = torch.tensor([0, 0, 1, 1] * 2)
    assert evaluate(x, labels)["precision_at_1"] == 1
    left_out = evaluate(x, labels, ids=torch.arange(4).repeat(2), ks=(1, 7))
    assert left_out["recall_at_1"] == 0 and left_out["recall_at_7"] == 1, "what is left is no nearer than the others"


def test_a_part_of_the_rows_queries_all():
    embeddings, labels = ragged(0, 100, 20)
    x, y, index = torch.from_numpy(embeddings), torch.from_numpy(labels), torch.arange(100)
    some = torch.randperm(100)[:30]
    found = evaluate(x[some], y[some], x, y, ids=some, gallery_ids=index, ks=KS)
    order = torch.cat([some, index[~torch.isin(index, some)]])
    given = {"ids": some.numpy(), "gallery_ids": order.numpy(), "gallery": embeddings[order]}
    assert_same(found, by_definition(embeddings[some], labels[some], gallery_labels=labels[order], **given))


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_scores_are_those_of_pytorch_metric_learning(leave_one_out):
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    theirs = calculator.AccuracyCalculator(names, k="max_bin_count", device=torch.device("cpu"))
    for seed in range(3):
        embeddings, labels = ragged(seed, 500, 60)
        x, y = torch.nn.functional.normalize(torch.from_numpy(embeddings).float(), dim=1), torch.from_numpy(labels)
        given = (x, y) if leave_one_out else (x[:150], y[:150], x[150:], y[150:])
        expected, ours = theirs.get_accuracy(*given), evaluate(*given)
        assert {name: ours[name] for name in names} == pytest.approx(expected, abs=1e-6)
    with_queries = evaluate(x[:150], y[:150], x, y, ids=torch.arange(150), gallery_ids=torch.arange(500))
    expected = theirs.get_accuracy(x[:150], y[:150], x, y, ref_includes_query=True)
    assert {name: with_queries[name] for name in names} == pytest.approx(expected, abs=1e-6)


def test_more_right_rows_than_any_k():
    """One class of 1,200: lists as long as R, whatever the ks are."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [1200, 300])
    embeddings = rng.normal(size=(1500, 4)) + labels[:, None]
    z = of_length_1(embeddings)
    s = z @ z.T
    np.fill_diagonal(s, -np.inf)
    right = (labels[np.argsort(-s, axis=1)] == labels[:, None])[:, :-1]
    R, place = right.sum(1), np.arange(1, 1500)
    inside = right & (place <= R[:, None])
    found = evaluate(torch.from_numpy(embeddings), torch.from_numpy(labels), ks=(1,))
    assert R.max() == 1199
    assert found["r_precision"] == pytest.approx((inside.sum(1) / R).mean(), rel=1e-12)
    expected = ((right.cumsum(1) / place * inside).sum(1) / R).mean()
    assert found["mean_average_precision_at_r"] == pytest.approx(expected, rel=1e-12)


def test_recall_is_exact_where_the_gallery_is_smaller_than_k():
    x, labels = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.3], [0, 1.0]]), torch.tensor([0, 1, 1, 0])
    assert list(evaluate(x, labels, ks=(1, 2, 3, 50)).values())[:4] == [0.25, 0.5, 1, 1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_length_does_not_matter_whatever_the_dtype(kind):
    rows, labels = torch.randn(50, 8, dtype=torch.float64), torch.arange(50) % 9
    largest = torch.finfo(kind).max / 16
    lengths = torch.logspace(-3, math.log10(largest), 50, dtype=torch.float64)[torch.randperm(50)]
    x = (torch.nn.functional.normalize(rows, dim=1) * lengths[:, None]).to(kind)
    assert_same(evaluate(x, labels, ks=KS), by_definition(x.double().numpy(), labels.numpy()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(evaluate(x, labels, ks=KS), by_definition(x.double().numpy(), labels.numpy()))


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("in_one_class", [300, 900])
def test_a_chunk_takes_no_more_than_it_may(in_one_class):
    """One class among pairs: only its own queries get long lists, and never all at once."""
    labels = torch.arange(900).sub_(in_one_class).clamp_(min=-2) // 2
    x = torch.randn(900, 4)
    with Largest() as whole:
        expected = evaluate(x, labels)
    with Largest() as in_chunks:
        assert_same(evaluate(x, labels, chunk_bytes=100_000), expected)
    assert whole.bytes >= 4 * 900 * 900 and in_chunks.bytes <= 100_000 / 3


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_similarities_and_the_integers_for_them_are_in_the_same_order(kind):
    eps, small = torch.finfo(kind).eps, torch.finfo(kind).smallest_normal
    numbers = torch.tensor([0.0, small**0.5, 2 * small**0.5, 1e-9, 0.5, 1 - eps, 1.0, 1 + eps, 1.4], dtype=kind)
    ascending = torch.cat([-numbers.flip(0), numbers])
    keys = evaluation._in_order(ascending.clone(), torch.ones(len(ascending), dtype=kind)).mul_(2)
    assert (keys.diff().sign() == ascending.diff().sign()).all(), "-0 is 0, and the largest can be doubled"
    of_cosine_half = torch.tensor([[0.5, 0.25, 0.3], [-0.5, -0.25, -0.3]], dtype=kind)
    keys = evaluation._in_order(of_cosine_half, torch.tensor([1, 0.25, 0.36], dtype=kind))
    assert (keys == keys[:, :1]).all() and keys[0, 0] == -keys[1, 0] > 0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rows_are_scaled_without_rounding(kind):
    info = torch.finfo(kind)
    sizes = torch.tensor([info.max, 1e30, 1, 0.7, 1e-30, info.tiny, info.tiny * info.eps, 0], dtype=kind)
    rows = sizes[:, None] * torch.tensor([[0.75, -1.0, 0.0, 0.125]], dtype=kind)
    scaled = evaluation._scaled_rows("rows", rows, kind)
    lengths = scaled.norm(dim=1)
    assert ((lengths >= 0.5) & (lengths <= 1) | (sizes == 0)).all() and lengths[-1] == 0
    assert torch.equal(torch.frexp(scaled[:, 1]).mantissa, torch.frexp(rows[:, 1]).mantissa)
    assert torch.equal(scaled[:-2, 0], -0.75 * scaled[:-2, 1])


def test_formulas_by_hand():
    right = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()
    wanted = torch.tensor([3, 3, 3, 3, 1, 1])
    expected = [(1 + 2 / 3) / 3, (1 / 3) / 3, 1, (1 / 2 + 2 / 3) / 3, 1, 0]
    assert scores.average_precision(right, wanted).tolist() == pytest.approx(expected)
    assert scores.r_precision(right, wanted).tolist() == pytest.approx([2 / 3, 1 / 3, 1, 2 / 3, 1, 0])
    assert scores.recall(torch.tensor([0, 2, 0, 1]), 1) == 0.5 and scores.recall(torch.tensor([0, 2, 0, 1]), 2) == 0.75


GOOD = {
    "embeddings": torch.randn(4, 3),
    "labels": torch.tensor([0, 0, 1, 1]),
    "gallery": torch.randn(5, 3),
    "gallery_labels": torch.tensor([0, 1, 2, 3, 4]),
    "ids": torch.arange(4),
    "gallery_ids": torch.arange(5),
}


def broken(rows, value):
    rows = rows.clone()
    rows[2, 1] = value
    return rows


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"embeddings": torch.ones(4, 3).long()}, TypeError, "embeddings must be a floating-point tensor"),
        ({"embeddings": [[1.0]]}, TypeError, "embeddings must be a floating-point tensor, got list"),
        ({"embeddings": torch.randn(4)}, ValueError, r"embeddings must be rows of .* shape \[4\]"),
        ({"embeddings": torch.randn(4, 0)}, ValueError, "embeddings must be rows of one number or more"),
        ({"embeddings": broken(GOOD["embeddings"], math.nan)}, ValueError, "embeddings must be finite: row 2 has NaN"),
        ({"gallery": broken(GOOD["gallery"], -math.inf)}, ValueError, "gallery must be finite: row 2 has NaN or Inf"),
        ({"gallery": torch.randn(5, 4)}, ValueError, r"gallery must be \[G, D=3\] as embeddings, got \[5, 4\]"),
        ({"gallery": torch.randn(5, 3, device="meta")}, ValueError, "gallery is on the meta device, which holds no"),
        (
            {"embeddings": torch.randn(4, 3, device="meta")},
            ValueError,
            "embeddings is on the meta device, which holds no",
        ),
        ({"labels": torch.arange(4, device="meta")}, ValueError, "labels is on the meta device, which holds no values"),
        ({"gallery_ids": torch.arange(5, device="meta")}, ValueError, "gallery_ids is on the meta device, which holds"),
        ({"gallery": None}, ValueError, "gallery_labels must be None without a gallery"),
        ({"gallery": None, "gallery_labels": None}, ValueError, "gallery_ids must be None without a gallery"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be an integer tensor, got torch.float32"),
        ({"labels": GOOD["labels"].to(torch.uint64)}, TypeError, "labels must be of a dtype that int64 holds"),
        ({"gallery_labels": torch.arange(5).to(torch.uint64)}, TypeError, "gallery_labels must be of a dtype"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels must be \[Q=4\], got \[1\]"),
        ({"gallery_labels": None}, TypeError, "gallery_labels must be an integer tensor, got NoneType"),
        ({"gallery_labels": torch.arange(4)}, ValueError, r"gallery_labels must be \[G=5\], got \[4\]"),
        ({"labels": torch.arange(4) + 9}, ValueError, "labels: no query has a row of its class to be found"),
        ({"ids": None}, ValueError, "ids and gallery_ids go together"),
        ({"gallery_ids": None}, ValueError, "ids and gallery_ids go together"),
        ({"gallery_ids": torch.arange(5).to(torch.uint64)}, TypeError, "gallery_ids must be of a dtype that int64"),
        ({"ids": torch.arange(3)}, ValueError, r"ids must be \[Q=4\], got \[3\]"),
        ({"ks": 10}, TypeError, "ks must be a sequence of integers, got int"),
        ({"ks": (1, 0)}, ValueError, "ks must be an integer >= 1, got 0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(changed, error, words):
    evaluate(**GOOD)
    with pytest.raises(error, match=words):
        evaluate(**GOOD | changed)


@pytest.mark.parametrize("integer", [torch.uint8, torch.uint16, torch.uint32, torch.int8])
def test_ids_of_any_integer_type(integer):
    """Torch does not compare some of them."""
    x, labels, ids = torch.randn(8, 4), torch.arange(8) % 3, torch.arange(8) // 2
    for others in ({}, {"gallery": x, "gallery_labels": labels, "gallery_ids": ids}):
        narrow = {name: t.to(integer) if name == "gallery_ids" else t for name, t in others.items()}
        assert evaluate(x, labels, ids=ids.to(integer), **narrow) == evaluate(x, labels, ids=ids, **others)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_be_found(rows):
    with pytest.raises(ValueError, match="labels: no query has a row of its class to be found"):
        evaluate(torch.randn(rows, 3), torch.zeros(rows, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: no query has a row of its class to be found"):
        evaluate(torch.randn(2, 3), torch.arange(2), torch.randn(rows, 3), torch.arange(rows) + 5)
