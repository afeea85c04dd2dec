"""Nearest vectors, exactly: a scan on the device, block by block, and float64 on the host for what is left.

The scan computes similarities in float32, whose rounding error is bounded (Higham, "Accuracy and Stability of Numerical
Algorithms", 2002, section 3.1). Rows that are further than the bound from the best are ruled out. The few others are
computed in float64 and rounded to float32, so the result is NumPy's in float64, on every device.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.errors import InputError, StoreError, expected

Metric = Literal["cosine", "dot"]
"""``cosine``: of the angle between two vectors, 0 where one is zero; ``dot``: their product."""

BLOCK_BYTES = 16 << 20  # of float32 rows scanned at once: the C library gives larger pieces back, and pages are slow
PAIR_ROWS = 2048  # of a block against another: their products are 16 MB
HELD_BLOCKS = 32  # stay on the device while all later ones pass by: 512 MB at most
EXACT_ROWS = 4096  # computed in float64 at once
MAX_QUERIES = 256  # scanned for at once
SMALLEST = 1e-30  # a row whose numbers are all below counts as zero: float32's products of them would vanish
LARGEST = 1e15  # a number above counts as not finite: float32's products of two vectors could overflow
UNIT = 2.0**-24  # relative rounding error of float32
# A product of D terms is within D * UNIT of the exact one, times both lengths, in whatever order it is summed; a row's
# length adds half of that, and the division and a query's own rounding a few units.
SAFETY, FIXED_TERMS = 2.0, 8

Report = Callable[[int], object]
"""``report(rows)``: so many more rows are done."""


class Vectors(Protocol):
    """Rows [n, D] that are read a slice at a time."""

    size: int
    """D."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [stop - start, D], float32 or float16."""
        ...

    def describe(self, row: int) -> str:
        """Name a row, for messages."""
        ...


class Nearest(NamedTuple):
    """The most similar rows of each query, best first; equal ones in the order of the rows.

    Attributes:
        rows: [Q, k] int64.
        similarity: [Q, k] float32.
    """

    rows: np.ndarray
    similarity: np.ndarray


class Pairs(NamedTuple):
    """Pairs of rows that are similar.

    Attributes:
        first, second: [m] int64, ``first < second``.
        similarity: [m] float32.
        complete: whether these are all; else the search ended at the limit.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    complete: bool


def nearest(
    vectors: Vectors,
    queries: np.ndarray,
    top: int,
    *,
    metric: Metric = "cosine",
    starts: np.ndarray | None = None,
    report: Report = lambda rows: None,
) -> Nearest:
    """Find the rows that are most similar to each query.

    Memory is bounded by a block of rows and its similarities, however many rows there are. All blocks have one shape,
    so a search compiles one program.

    Args:
        vectors: to search in.
        queries: [Q, D].
        top: results for each query; fewer where there are not so many rows.
        metric: see :data:`Metric`.
        starts: [G], ascending from 0: where groups of rows begin, of which each gives its best row alone.
        report: called with the number of rows after each block.

    Raises:
        InputError: queries of another size, not finite, or zero; ``top`` below 1; an unknown metric.
        StoreError: a row is not finite.
    """
    queries = check_queries(queries, vectors.size)
    if not isinstance(top, int) or top < 1:
        raise InputError(f"top: expected a number of results, at least 1, found {top!r}")
    if metric not in get_args(Metric):
        raise InputError(f"metric: {expected(metric, get_args(Metric))}")
    count = len(vectors) if starts is None else len(starts)
    best = [_Best(query, min(top, count), metric) for query in queries]
    for first in range(0, len(best), MAX_QUERIES):
        part = best[first : first + MAX_QUERIES]
        for block in _scan(vectors, np.stack([each.unit for each in part]), metric):
            parts = _Parts.of(block.start, len(block.rows), starts)
            for each, scores in zip(part, block.scores, strict=False):  # the last ones fill the queries up
                each.update(block, scores, parts)
            report(len(block.rows))
    return Nearest(np.stack([each.rows for each in best]), np.stack([each.similarity for each in best]))


def check_queries(queries: Any, size: int) -> np.ndarray:
    """Return queries as [Q, D] float64.

    Raises:
        InputError: another rank, size or type; not finite; or zero.
    """
    try:
        array = np.asarray(queries)
    except ValueError:
        raise InputError("queries: expected vectors of one size, found several") from None
    if array.ndim != 2 or array.shape[1] != size or not len(array):
        raise InputError(f"queries: expected vectors of {size} numbers, [n, {size}], found {list(array.shape)}")
    if array.dtype.kind not in "fiu":
        raise InputError(f"queries: expected real numbers, found {array.dtype}")
    array = array.astype(np.float64)
    for i, query in enumerate(array):
        check_vector(query, f"queries[{i}]")
    return array


def check_vector(vector: np.ndarray, name: str) -> None:
    """Refuse a vector [D] that has no similarity to others.

    Raises:
        InputError: it is not finite, or zero; begins with the name.
    """
    vector = np.asarray(vector, np.float64)  # the limits are beyond float32's
    largest = np.abs(vector).max()
    if not largest <= LARGEST:
        raise InputError(f"{name}: expected finite numbers, found {vector[np.abs(vector).argmax()]}")
    if largest < SMALLEST:
        raise InputError(f"{name}: expected a vector with a direction, found zero")


def _tolerance(size: int) -> float:
    """How far a float32 similarity can be from the exact one, for vectors of length 1."""
    return SAFETY * (size + FIXED_TERMS) * UNIT


def similarity(rows: np.ndarray, others: np.ndarray, metric: Metric = "cosine") -> np.ndarray:
    """Return the similarity of each row to the other one, or to one for all: [m] float64, computed in float64."""
    rows, others = rows.astype(np.float64), np.broadcast_to(others, rows.shape).astype(np.float64)
    products = np.einsum("nd,nd->n", rows, others)  # row by row: the same wherever a row is
    if metric == "dot":
        return products
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows) * np.einsum("nd,nd->n", others, others))
    zero = np.minimum(np.abs(rows).max(1), np.abs(others).max(1)) < SMALLEST
    return np.divide(products, lengths, out=np.zeros_like(products), where=~zero)


# A search


class _Block(NamedTuple):
    """A block that was scanned."""

    start: int
    rows: np.ndarray  # [n, D]
    scores: np.ndarray  # [Q, n] float32: similarity to queries of length 1
    error: float  # of the scores, at most


class _Parts(NamedTuple):
    """The groups of a block's rows: where each begins in the block, the rows' groups; None where each row is one."""

    cuts: np.ndarray | None  # [P]
    groups: np.ndarray  # [n]: of the rows, counted over all blocks
    local: np.ndarray  # [n]: counted in the block

    @classmethod
    def of(cls, start: int, count: int, starts: np.ndarray | None) -> "_Parts":
        rows = np.arange(start, start + count)
        if starts is None:
            return cls(None, rows, rows - start)
        groups = np.searchsorted(starts, rows, side="right") - 1
        local = groups - groups[0]
        return cls(np.flatnonzero(np.diff(local, prepend=-1)), groups, local)


class _Best:
    """The best rows so far of one query, exactly."""

    def __init__(self, query: np.ndarray, top: int, metric: Metric) -> None:
        self.query, self.top = query, top
        self.metric: Metric = metric
        self.length = float(np.linalg.norm(query)) if metric == "dot" else 1.0  # what scores are multiplied by
        self.unit = query / np.linalg.norm(query)
        self.rows = self._groups = np.zeros(0, np.int64)
        self._exact = np.zeros(0)  # [k] float64

    @property
    def similarity(self) -> np.ndarray:
        return self._exact.astype(np.float32)

    def update(self, block: _Block, scores: np.ndarray, parts: _Parts) -> None:
        """Compute exactly what the scores do not rule out, and merge it."""
        highest = scores if parts.cuts is None else np.maximum.reduceat(scores, parts.cuts)  # [P]
        floor = -np.inf
        if len(self.rows) == self.top:
            floor = self._exact[-1] / self.length - block.error
        possible = highest >= floor
        if not possible.any():
            return
        if len(highest) > self.top:  # so many of this block are better than what is below, whatever the errors
            floor = max(floor, float(np.partition(highest, -self.top)[-self.top]) - 2 * block.error)
            possible = highest >= floor
        chosen = possible[parts.local] & (scores >= highest[parts.local] - 2 * block.error)
        for local in _divided(np.flatnonzero(chosen)):
            exact = similarity(block.rows[local], self.query, self.metric)
            self._merge(block.start + local, parts.groups[local], exact)

    def _merge(self, rows: np.ndarray, groups: np.ndarray, exact: np.ndarray) -> None:
        rows, groups = np.concatenate([self.rows, rows]), np.concatenate([self._groups, groups])
        exact = np.concatenate([self._exact, exact])
        order = np.lexsort((rows, -exact.astype(np.float32)))
        firsts = np.sort(np.unique(groups[order], return_index=True)[1])[: self.top]  # a group's best row alone
        order = order[firsts]
        self.rows, self._groups, self._exact = rows[order], groups[order], exact[order]


def _divided(indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), EXACT_ROWS):
        yield indices[start : start + EXACT_ROWS]


def _scan(vectors: Vectors, units: np.ndarray, metric: Metric) -> Iterator[_Block]:
    """Compute all similarities in float32; while the device has a block, the next is read."""
    count = _power(len(units))
    queries = jnp.asarray(np.pad(units, ((0, count - len(units)), (0, 0))).astype(np.float32))
    ahead = None
    for start, rows in _blocks(vectors, _block_rows(vectors)):
        current = start, rows, _scores(queries, _filled(rows, _block_rows(vectors)), metric == "cosine")
        if ahead is not None:
            yield _collected(vectors, *ahead, metric)
        ahead = current
    if ahead is not None:
        yield _collected(vectors, *ahead, metric)


def _collected(vectors: Vectors, start: int, rows: np.ndarray, computed: Any, metric: Metric) -> _Block:
    scores, largest, lengths = (np.asarray(array)[..., : len(rows)] for array in computed)
    check_finite(vectors, start + np.arange(len(rows)), largest)
    longest = 1.0 if metric == "cosine" else float(lengths.max())
    return _Block(start, rows, scores, _tolerance(vectors.size) * longest)


def check_finite(vectors: Vectors, rows: np.ndarray, largest: np.ndarray) -> None:
    """Refuse rows that are not finite.

    Args:
        vectors: that they are of.
        rows: [n], which.
        largest: [n], the largest absolute value of each.

    Raises:
        StoreError: names the first.
    """
    bad = np.flatnonzero(~(largest <= LARGEST))  # NaN is neither
    if len(bad):
        raise StoreError(
            f"{vectors.describe(int(rows[bad[0]]))}: expected an embedding of finite numbers, found NaN, infinity or "
            f"numbers above {LARGEST:g}: leave the clip out (EmbeddingStore.filter), or embed it again"
        )


def _blocks(vectors: Vectors, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), rows):
        yield start, vectors.read(start, min(start + rows, len(vectors)))


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """[n, D] as [count, D], with zeros at the end."""
    return (
        rows if len(rows) == count else np.concatenate([rows, np.zeros((count - len(rows), rows.shape[1]), rows.dtype)])
    )


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _block_rows(vectors: Vectors) -> int:
    """Rows of a block: a power of two, and no more than are needed."""
    most = max(1, BLOCK_BYTES // (4 * vectors.size))
    return min(1 << (most.bit_length() - 1), _power(len(vectors)))


@functools.partial(jax.jit, static_argnums=2)
def _scores(queries: jax.Array, rows: jax.Array, cosine: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Similarities [Q, N] of queries [Q, D] of length 1 and rows [N, D]; the rows' largest numbers, and lengths [N]."""
    rows = rows.astype(jnp.float32)
    largest, lengths = _lengths(rows)
    products = jnp.matmul(queries, rows.T, precision="highest")
    if cosine:
        products = jnp.where(largest[None] < SMALLEST, 0, products / lengths[None])
    return products, largest, lengths


def _lengths(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest number, and the length of each row [N, D]; 1 for a row of zeros."""
    largest = jnp.max(jnp.abs(rows), axis=1)
    scale = jnp.where(largest < SMALLEST, 1, largest)  # squares neither vanish nor overflow
    scaled = jnp.sqrt(jnp.sum(jnp.square(rows / scale[:, None]), axis=1))
    return largest, jnp.where(largest < SMALLEST, 1, scaled * scale)


# Pairs


def near_pairs(vectors: Vectors, threshold: float, *, limit: int, report: Report = lambda rows: None) -> Pairs:
    """Find the pairs of rows whose cosine similarity is at least a threshold.

    The upper triangle of all similarities, block by block; at most ``limit`` pairs are kept, then it ends.

    Args:
        vectors: to search in.
        threshold: over 0, at most 1.
        limit: of the pairs.
        report: called with the number of rows after each block, :func:`pair_rows` in all.

    Raises:
        InputError: a threshold outside its range.
        StoreError: a row is not finite.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold: expected a cosine similarity over 0 and at most 1, found {threshold}")
    count = min(PAIR_ROWS, _block_rows(vectors))
    floor = threshold - _tolerance(vectors.size)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    total = 0
    for held in range(0, len(vectors), count * HELD_BLOCKS):
        blocks: list[tuple[int, Any]] = []
        for start in range(held, len(vectors), count):
            rows = vectors.read(start, min(start + count, len(vectors)))
            units, largest = _units(_filled(rows, count))
            check_finite(vectors, start + np.arange(len(rows)), np.asarray(largest)[: len(rows)])
            if len(blocks) < HELD_BLOCKS:
                blocks.append((start, units))
            for other, other_units in blocks:
                products, highest = _products(other_units, units, start - other)
                near = np.flatnonzero(np.asarray(highest) >= floor)
                if not len(near):
                    continue
                products = np.asarray(products)[near]
                first, second = np.nonzero(products >= floor)
                for pairs in _exact_pairs(vectors, other + near[first], start + second, threshold):
                    found.append(pairs)
                    total += len(pairs[0])
                    if total > limit:
                        return _joined(found, limit, complete=False)
            report(len(rows))
    return _joined(found, limit, complete=True)


def pair_rows(vectors: Vectors) -> int:
    """Return how many rows :func:`near_pairs` reads, all passes together."""
    return sum(range(len(vectors), 0, -min(PAIR_ROWS, _block_rows(vectors)) * HELD_BLOCKS))


def _exact_pairs(
    vectors: Vectors, first: np.ndarray, second: np.ndarray, threshold: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    inside = (first < len(vectors)) & (second < len(vectors))
    first, second = first[inside], second[inside]
    if not len(first):
        return
    rows, others = (vectors.read(int(each.min()), int(each.max()) + 1) for each in (first, second))
    for part in _divided(np.arange(len(first))):
        i, j = first[part], second[part]
        exact = similarity(rows[i - first.min()], others[j - second.min()]).astype(np.float32)
        keep = exact >= threshold
        yield i[keep], j[keep], exact[keep]


def _joined(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], limit: int, *, complete: bool) -> Pairs:
    """The most similar first; equal ones in the order of the rows."""
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    first, second, exact = (np.concatenate(parts)[:limit] for parts in zip(empty, *found, strict=True))
    order = np.lexsort((second, first, -exact))
    return Pairs(first[order], second[order], exact[order], complete)


@jax.jit
def _units(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [N, D] at length 1, zeros as they are; and the largest number of each."""
    rows = rows.astype(jnp.float32)
    largest, lengths = _lengths(rows)
    return jnp.where(largest[:, None] < SMALLEST, 0, rows / lengths[:, None]), largest


@jax.jit
def _products(rows: jax.Array, others: jax.Array, offset: int) -> tuple[jax.Array, jax.Array]:
    """Products [N, N] of rows and others that begin ``offset`` rows later; -1 where a row is not before the other.

    And the highest of each row.
    """
    products = jnp.matmul(rows, others.T, precision="highest")
    row, other = jnp.arange(len(rows)), jnp.arange(len(others))
    products = jnp.where(row[:, None] < other[None] + offset, products, -1)
    return products, jnp.max(products, axis=1)
