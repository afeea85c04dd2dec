"""Search in a store: the clips most similar to a vector, and pairs of near duplicates; exact, by a scan of all rows."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from gura_jax.errors import InputError, StoreError, expected
from gura_jax.nearest import Metric, Nearest, Report, near_pairs, nearest

if TYPE_CHECKING:
    from gura_jax.dataset.reader import EmbeddingStore
    from gura_jax.dataset.sinks import Rows

Of = Literal["scenes", "frames"]
OPEN_SHARDS = 16  # each is an open file
PLACE_BITS = 32  # of an address: the row in a shard's file


class Matches(NamedTuple):
    """The clips most similar to each of Q queries, best first; equal ones in the store's order.

    Attributes:
        ids: of the clips, k for each query.
        clips: [Q, k] int64, their rows of the store's metadata.
        similarity: [Q, k] float32.
        times: [Q, k] float64, of the most similar frame in milliseconds; None for scenes.
    """

    ids: list[list[str]]
    clips: np.ndarray
    similarity: np.ndarray
    times: np.ndarray | None


class Duplicates(NamedTuple):
    """Pairs of clips that are similar, the most similar first.

    Attributes:
        ids: of both clips.
        clips: [m, 2] int64, their rows of the store's metadata.
        similarity: [m] float32.
        complete: whether these are all; else the search ended when there were enough.
    """

    ids: list[tuple[str, str]]
    clips: np.ndarray
    similarity: np.ndarray
    complete: bool


def vector_size(store: "EmbeddingStore", of: Of) -> int:
    """Return the size of a store's scenes or frames.

    Raises:
        StoreError: it has no frames.
    """
    size = store.run.get("scene_embedding_size" if of == "scenes" else "timestamp_embedding_size")
    if size is None:
        raise StoreError(f"{store.folder}: expected a store with timestamps, found scene embeddings alone")
    return int(size)


class StoredVectors:
    """Scenes or frames of a store's clips, in its order, as rows of one matrix [n, D], read from the shards' files.

    Args:
        store: or a part of one.
        of: which.

    Raises:
        StoreError: there are no clips, or no frames.

    Attributes:
        clips: [G], the rows of the metadata that have vectors: all but clips without a frame.
        starts: [G], the first vector of each; None for scenes.
    """

    def __init__(self, store: "EmbeddingStore", of: Of = "scenes") -> None:
        if of not in get_args(Of):
            raise InputError(f"of: {expected(of, get_args(Of))}")
        self.store, self.size = store, vector_size(store, of)
        self.of: Of = of
        columns = ("shard", "row", "row") if of == "scenes" else ("shard", "frame_start", "num_frames")
        if not len(store):
            raise StoreError(f"{store.folder}: expected clips to search in, found none")
        shards, firsts, counts = (store.meta[name].to_numpy() for name in columns)
        counts = np.ones(len(shards), np.int64) if of == "scenes" else counts
        self.clips = np.flatnonzero(counts)
        self._shards, self._firsts, counts = shards[self.clips], firsts[self.clips], counts[self.clips]
        ends = np.cumsum(counts)
        self._starts, self._count = ends - counts, int(ends[-1]) if len(ends) else 0
        self.starts = None if of == "scenes" else self._starts
        self._open: dict[int, Rows] = {}
        if not self._count:
            raise StoreError(f"{store.folder}: expected frames to search in, found none")

    def __len__(self) -> int:
        return self._count

    def clip_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the row of the metadata that each vector belongs to."""
        return self.clips[self._group(rows)]

    def _group(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.starts is None else np.searchsorted(self._starts, rows, side="right") - 1

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """Return what names vectors also when shards are added: shard * 2**32 + row there, int64, ascending."""
        groups = self._group(rows)
        return (self._shards[groups] << PLACE_BITS) + self._firsts[groups] + rows - self._starts[groups]

    def at(self, addresses: np.ndarray) -> np.ndarray:
        """Return the vectors of some addresses; the inverse of :meth:`addresses` for a whole store."""
        begins = (self._shards << PLACE_BITS) + self._firsts
        groups = np.searchsorted(begins, addresses, side="right") - 1
        return self._starts[groups] + addresses - begins[groups]

    def times(self, rows: np.ndarray) -> np.ndarray:
        """Return the time of frames in their clips, in milliseconds."""
        offset, hop = (self.store.meta[name].to_numpy() for name in ("frame_offset_ms", "frame_hop_ms"))
        clips = self.clip_of(rows)
        return offset[clips] + hop[clips] * (rows - self._starts[self._group(rows)])

    def describe(self, row: int) -> str:
        """Name a vector by its clip."""
        clip = int(self.clip_of(np.array([row]))[0])
        return f"{self.store.folder}: clip {self.store.meta['id'][clip].as_py()!r}"

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return vectors [stop - start, D], one after the other."""
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return some vectors, [n, D]."""
        groups = self._group(rows)
        shards, places = self._shards[groups], self._firsts[groups] + rows - self._starts[groups]
        cuts = np.flatnonzero(np.diff(shards)) + 1
        parts = [self._part(int(s[0]), p) for s, p in zip(np.split(shards, cuts), np.split(places, cuts), strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, shard: int, places: np.ndarray) -> np.ndarray:
        if shard not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[shard] = self.store.rows(shard, self.of)
        rows = self._open[shard]
        first, last = int(places[0]), int(places[-1])
        try:
            one_run = last - first + 1 == len(places) and (np.diff(places) == 1).all()
            found: Any = rows[first : last + 1] if one_run else rows[places]
        except OSError as error:
            raise StoreError(f"{self.store.folder}: shard {shard} cannot be read: {error.strerror or error}") from None
        except IndexError:
            found = np.empty(0)
        if found.shape != (len(places), self.size):
            raise StoreError(
                f"{self.store.folder}: shard {shard}: expected {self.of} of {self.size} numbers, as its metadata say, "
                "found others: run gura-jax embed --verify again, with the same arguments"
            )
        return np.asarray(found)


def search(
    store: "EmbeddingStore",
    vectors: Any,
    top: int = 10,
    *,
    of: Of = "scenes",
    metric: Metric = "cosine",
    report: Report = lambda rows: None,
) -> Matches:
    """Find the clips that are most similar to each vector, exactly.

    The store is read once, in blocks, for every 256 vectors; memory does not grow with it. A scene of zeros has the
    cosine similarity 0 to all.

    Args:
        store: or a part of one (:meth:`EmbeddingStore.filter`).
        vectors: [Q, S], or [Q, D] for frames; or one of them.
        top: clips for each vector, fewer where there are not so many.
        of: ``"scenes"``; or ``"frames"``: the best frame of each clip.
        metric: ``"cosine"`` or ``"dot"``.
        report: called with the number of rows that were scanned, after each block.

    Raises:
        InputError: vectors of another size, not finite, or zero; ``top`` below 1.
        StoreError: no clips, no frames, a file that cannot be read, or an embedding that is not finite.
    """
    stored = StoredVectors(store, of)
    queries = vectors[None] if isinstance(vectors, np.ndarray) and vectors.ndim == 1 else vectors
    return matches(stored, nearest(stored, queries, top, metric=metric, starts=stored.starts, report=report))


def matches(stored: StoredVectors, found: Nearest) -> Matches:
    """Say which clips the nearest vectors belong to, and when in them."""
    clips = stored.clip_of(found.rows)
    ids = stored.store.meta["id"].take(clips.ravel()).to_pylist()
    by_query = [ids[i * clips.shape[1] : (i + 1) * clips.shape[1]] for i in range(len(clips))]
    return Matches(by_query, clips, found.similarity, None if stored.starts is None else stored.times(found.rows))


def duplicates(
    store: "EmbeddingStore", threshold: float, *, limit: int, report: Report = lambda rows: None
) -> Duplicates:
    """Find pairs of clips whose scenes have at least this cosine similarity.

    Args:
        store: or a part of one.
        threshold: over 0, at most 1.
        limit: of the pairs; then the search ends.
        report: called with the number of rows that were compared, after each block.

    Raises:
        InputError: a threshold outside its range.
        StoreError: no clips, a file that cannot be read, or an embedding that is not finite.
    """
    stored = StoredVectors(store)
    found = near_pairs(stored, threshold, limit=limit, report=report)
    clips = np.stack([found.first, found.second], axis=1)
    ids = stored.store.meta["id"].take(clips.ravel()).to_pylist()
    return Duplicates(list(zip(ids[::2], ids[1::2], strict=True)), clips, found.similarity, found.complete)
