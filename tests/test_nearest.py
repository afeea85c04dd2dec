"""gura_jax/nearest.py: the same as NumPy in float64, whatever the blocks, ties and groups."""

from typing import Any

import numpy as np
import pytest
from refusals import refuses

from gura_jax import nearest as module
from gura_jax.errors import InputError, StoreError
from gura_jax.nearest import Metric, near_pairs, nearest, pair_rows


class Array:
    """Rows in memory; remembers the most that were asked for at once."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.size, self.most = rows, rows.shape[1], 0

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        self.most = max(self.most, stop - start)
        return self.rows[start:stop]

    def describe(self, row: int) -> str:
        return f"row {row}"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows of 20 numbers, so that a few hundred rows are many blocks, and a last one that is not full."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 64 * 20 * 4)
    monkeypatch.setattr(module, "HELD_BLOCKS", 2)


def numpys(rows: np.ndarray, queries: np.ndarray, metric: Metric = "cosine") -> np.ndarray:
    """All similarities [Q, n]: of NumPy in float64, rounded to float32."""
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        rows, queries = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-300) for a in (rows, queries))
    return (queries @ rows.T).astype(np.float32)


def ordered(similarity: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
    return rows, np.take_along_axis(similarity, rows, 1)


def made(kind: str, count: int = 333) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, 20)).astype(np.float32)
    if kind == "ties":  # five different rows, over and over
        return rows[rng.integers(0, 5, count)]
    if kind == "close":  # no further from each other than float32's own errors
        return (rows[:1] + 1e-7 * rows).astype(np.float32)
    if kind == "half":
        return rows.astype(np.float16)
    if kind == "sizes":
        return rows * (10.0 ** rng.integers(-12, 12, (count, 1))).astype(np.float32)
    if kind == "zeros":
        rows[::3] = 0
    return rows


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["plain", "ties", "close", "half", "sizes", "zeros"])
def test_equals_numpy(kind: str, metric: Metric) -> None:
    rows = made(kind)
    queries = np.concatenate([np.random.default_rng(1).standard_normal((3, 20)), rows[[1, 332]].astype(np.float64)])
    vectors = Array(rows)
    found = nearest(vectors, queries, 17, metric=metric)
    wanted, similarity = ordered(numpys(rows, queries, metric), 17)
    np.testing.assert_array_equal(found.rows, wanted)
    np.testing.assert_array_equal(found.similarity, similarity)
    assert found.similarity.dtype == np.float32
    assert vectors.most == 64


@pytest.mark.parametrize(("count", "top"), [(1, 1), (1, 5), (64, 64), (65, 100), (200, 1)])
def test_sizes(count: int, top: int) -> None:
    rows, queries = made("plain", count), made("plain", 70)
    done: list[int] = []
    found = nearest(Array(rows), queries, top, report=done.append)
    wanted, similarity = ordered(numpys(rows, queries), min(top, count))
    np.testing.assert_array_equal(found.rows, wanted)
    np.testing.assert_array_equal(found.similarity, similarity)
    assert sum(done) == count


def test_more_queries_than_are_scanned_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_QUERIES", 16)
    rows = made("plain", 100)
    np.testing.assert_array_equal(nearest(Array(rows), rows, 3).rows, ordered(numpys(rows, rows), 3)[0])


@pytest.mark.parametrize("kind", ["plain", "ties", "close"])
def test_the_best_of_each_group(kind: str) -> None:
    """Groups of 1 to 200 rows: within a block, over the edge of two, and longer than one."""
    rows, queries = made(kind), made("plain", 3)
    starts = np.array([0, 1, 30, 60, 70, 71, 72, 128, 328, 330])
    found = nearest(Array(rows), queries, 6, starts=starts)
    for query, similarity in enumerate(numpys(rows, queries)):
        parts = np.split(similarity, starts[1:])
        best = [start + int(part.argmax()) for start, part in zip(starts.tolist(), parts, strict=True)]
        order = sorted(best, key=lambda row: (-similarity[row], row))[:6]
        assert found.rows[query].tolist() == order
        np.testing.assert_array_equal(found.similarity[query], similarity[order])
    assert nearest(Array(rows), queries, 100, starts=starts).rows.shape == (3, len(starts))


def test_few_rows_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scan rules out is not computed in float64."""
    counts: list[int] = []
    own = module.similarity
    monkeypatch.setattr(module, "similarity", lambda rows, *rest: counts.append(len(rows)) or own(rows, *rest))
    nearest(Array(made("plain", 2000)), made("plain", 1), 5)
    assert 5 <= sum(counts) < 60


@pytest.mark.parametrize("kind", ["plain", "ties", "close", "zeros"])
def test_pairs(kind: str) -> None:
    rows = made(kind, 300)
    similarity = numpys(rows, rows)
    threshold = 0.6 if kind in ("plain", "zeros") else 0.999999
    vectors, done = Array(rows), []
    found = near_pairs(vectors, threshold, limit=100_000, report=done.append)
    wanted = np.argwhere(np.triu(similarity >= threshold, 1))
    assert len(wanted) > 10
    order = np.lexsort((wanted[:, 1], wanted[:, 0], -similarity[*wanted.T]))
    np.testing.assert_array_equal(np.stack([found.first, found.second], 1), wanted[order])
    np.testing.assert_array_equal(found.similarity, similarity[*wanted[order].T])
    assert found.complete
    assert sum(done) == pair_rows(vectors)
    few = near_pairs(vectors, threshold, limit=7)
    assert (len(few.first), few.complete) == (7, False)
    assert {*zip(few.first.tolist(), few.second.tolist(), strict=True)} < {*map(tuple, wanted.tolist())}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_rows_that_are_not_finite(value: float) -> None:
    rows = made("plain")
    rows[217, 3] = value
    with refuses(StoreError, "row 217: expected an embedding of finite numbers"):
        nearest(Array(rows), made("plain", 1), 3)
    with refuses(StoreError, "row 217: expected an embedding of finite numbers"):
        near_pairs(Array(rows), 0.9, limit=10)


def test_queries_that_are_none() -> None:
    vectors = Array(made("plain"))
    wrong: list[tuple[Any, str]] = [
        (np.zeros((1, 20)), "queries[0]: expected a vector with a direction, found zero"),
        (np.full((1, 20), np.nan), "queries[0]: expected finite numbers, found nan"),
        (np.ones((1, 19)), "expected vectors of 20 numbers, [n, 20], found [1, 19]"),
        (np.ones(20), "expected vectors of 20 numbers, [n, 20], found [20]"),
        (np.ones((0, 20)), "found [0, 20]"),
        ([["a"] * 20], "expected real numbers"),
        ([[1.0] * 20, [1.0] * 19], "expected vectors of one size"),
    ]
    for queries, message in wrong:
        with refuses(InputError, message):
            nearest(vectors, queries, 3)
    ones: Any = np.ones((1, 20))
    for options, message in (({"top": 0}, "top: expected"), ({"top": 2, "metric": "l2"}, "metric: 'l2' is not known")):
        arguments: dict[str, Any] = options
        with refuses(InputError, message):
            nearest(vectors, ones, **arguments)
    for threshold in (0.0, 1.1, float("nan")):
        with refuses(InputError, "threshold: expected a cosine similarity over 0 and at most 1"):
            near_pairs(vectors, threshold, limit=3)
