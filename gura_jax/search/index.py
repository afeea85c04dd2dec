"""An approximate index of a store's scenes or frames, by usearch (HNSW), in a folder that is whole or absent.

- ``graph.usearch``: usearch's own format, float16, cosine. A vector's key is its shard * 2**32 + its row there.
- ``index.json``: the run and the shards that it is of, the size and sha256 of the other file, and its recall.

The index of a local store is its folder ``index-scenes`` or ``index-frames``; that of a bucket is in the user's cache
folder.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gura_jax import files
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.search import PLACE_BITS, Matches, Of, StoredVectors, matches
from gura_jax.errors import InputError, StoreError
from gura_jax.nearest import SMALLEST, Nearest, Report, check_finite, check_queries, nearest, similarity
from gura_jax.objects import scheme

FILE, RECORD = "graph.usearch", "index.json"
VERSION = 1
ADDED_BYTES = 32 << 20  # of vectors at once
EXPANSION = 128  # candidates that a search keeps: usearch's default of 64 loses some percent of recall
SPARE = 2  # candidates for each result: float16 puts close ones into another order, and these are compared exactly
FRAMES = 8  # as many again for frames, of which a clip has many that are alike; and so on, where that was too few
SAMPLE, SAMPLE_TOP = 100, 10  # recall@10 is measured with so many of the store's clips as queries


class Recall(NamedTuple):
    """Share of the exact search's results that the index finds, for clips of the store as queries."""

    top: int
    queries: int
    share: float


class Index:
    """An index that is open: see :func:`open_index`.

    Attributes:
        folder: that holds it.
        recall: as measured when it was made.
        built: how many vectors were added when it was opened.
    """

    def __init__(self, stored: StoredVectors, graph: Any, folder: Path, recall: Recall, built: int) -> None:
        self.stored, self.folder, self.recall, self.built = stored, folder, recall, built
        self._graph = graph

    def __len__(self) -> int:
        return len(self._graph)

    def search(self, vectors: Any, top: int = 10) -> Matches:
        """Find clips that are similar to each of some vectors [Q, S] or [Q, D]; their similarities are exact.

        Raises:
            InputError: vectors of another size, not finite, or zero; ``top`` below 1.
        """
        return matches(self.stored, self.nearest(vectors, top))

    def nearest(self, vectors: Any, top: int) -> Nearest:
        """As :meth:`search`, by rows of the store."""
        queries = check_queries(vectors[None] if np.ndim(vectors) == 1 else vectors, self.stored.size)
        if not isinstance(top, int) or top < 1:
            raise InputError(f"top: expected a number of results, at least 1, found {top!r}")
        units = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
        wanted = min(top, len(self.stored.clips))
        count = SPARE * top * (1 if self.stored.starts is None else FRAMES)
        while True:
            count = min(count, len(self))
            self._graph.expansion_search = max(EXPANSION, count)
            found = self._graph.search(units, count)
            counts = np.reshape(getattr(found, "counts", len(found)), -1)  # of one query there are no counts
            keys = np.reshape(found.keys, (len(queries), -1)).astype(np.int64)
            results = [self._best(query, own[:n], top) for query, own, n in zip(queries, keys, counts, strict=True)]
            few = [i for i, (rows, _) in enumerate(results) if len(rows) < wanted]
            if few and count < len(self):
                count *= FRAMES
                continue
            for i in few:  # parts of a graph can be out of reach, and zeros are not in it
                exact = nearest(self.stored, queries[i : i + 1], wanted, starts=self.stored.starts)
                results[i] = exact.rows[0], exact.similarity[0]
            return Nearest(*(np.stack(parts) for parts in zip(*results, strict=True)))

    def _best(self, query: np.ndarray, keys: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The best vectors of those with some keys, one of a clip, and their similarities."""
        rows = np.sort(self.stored.at(keys))
        exact = similarity(self.stored.take(rows), query).astype(np.float32)
        order = np.argsort(-exact, kind="stable")
        firsts = np.unique(self.stored.clip_of(rows[order]), return_index=True)[1]
        order = order[np.sort(firsts)[:top]]
        return rows[order], exact[order]


def open_index(
    store: EmbeddingStore,
    folder: str | os.PathLike[str] | None = None,
    *,
    of: Of = "scenes",
    report: Report = lambda rows: None,
) -> Index:
    """Open the index of a store: as it is, extended by the shards that it lacks, or built.

    The file is read once to compare its checksum, then mapped into memory.

    Args:
        store: all of it.
        folder: of the index; by default in the store's folder, or for a bucket in the cache folder.
        of: ``"scenes"`` or ``"frames"``.
        report: called with the number of vectors that were added, after each block.

    Raises:
        StoreError: a part of a store, the index of another store, a damaged one, a folder that cannot be written, or an
            embedding that is not finite.
        InputError: usearch is missing.
    """
    usearch = _usearch()
    if len(store) != sum(record.clips for record in store.records.values()):
        raise StoreError(f"{store.folder}: an index is of a whole store: search a part of it with its own method")
    stored = StoredVectors(store, of)
    folder = default_folder(store, of) if folder is None else Path(folder)
    files.recover_folder(folder)
    shards = {str(number): _shard_hash(record.files) for number, record in store.records.items()}
    record = _read_record(folder, stored)
    there: Mapping[str, str] = record["shards"] if record is not None else {}
    changed = any(shards.get(number) != found for number, found in there.items())
    missing = set(shards) - ({} if changed else there).keys()
    graph = usearch.Index(ndim=stored.size, metric="cos", dtype="f16", expansion_search=EXPANSION)
    if record is not None and not changed:
        _load(graph, folder, record, view=not missing)
    if not missing and record is not None:
        return Index(stored, graph, folder, Recall(**record["recall"]), 0)
    _check_free(folder)
    added = _add(graph, stored, {int(number) for number in missing}, report)
    index = Index(stored, graph, folder, Recall(0, 0, 0.0), added)
    index.recall = _measure(index)
    _write(index, graph, shards)
    return index


def default_folder(store: EmbeddingStore, of: Of = "scenes") -> Path:
    """Return where the index of a store is, unless it was put elsewhere."""
    text, name = os.fspath(store.folder), f"index-{of}"
    if not scheme(text):
        return Path(text) / name
    return files.cache_folder() / name / hashlib.sha256(text.rstrip("/").encode()).hexdigest()[:32]


def _usearch() -> Any:
    try:
        import usearch.index  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"--index: expected usearch, found none ({error}): pip install 'gura-jax[search]'") from None
    return usearch.index


def _shard_hash(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path, stored: StoredVectors) -> dict[str, Any] | None:
    """Read ``index.json``; None if there is no index.

    Raises:
        StoreError: it is damaged, or of another store.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {
            "version": int,
            "run": str,
            "of": str,
            "size": int,
            "vectors": int,
            "shards": dict,
            "recall": dict,
            "file": dict,
        }
        if any(not isinstance(content[name], kind) for name, kind in kinds.items()):
            raise TypeError("a value of another type")
        Recall(**content["recall"])
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder, f"expected what this version writes, found another file ({error})") from None
    if (content["run"], content["of"], content["size"]) != _identity(stored):
        found = "one of another run" if content["of"] == stored.of else f"one of {content['of']}"
        raise _damaged(folder, f"expected an index of the {stored.of} of {stored.store.folder}, found {found}")
    return content


def _identity(stored: StoredVectors) -> tuple[str, str, int]:
    return stored.store.run["fingerprint"], stored.of, stored.size


def _damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"{folder}: {what}: remove that folder to have it built again, or name another --index-folder")


def _load(graph: Any, folder: Path, record: Mapping[str, Any], *, view: bool) -> None:
    """Load the graph, after its bytes were compared: usearch trusts what it reads.

    Raises:
        StoreError: it is damaged.
    """
    path = folder / FILE
    try:
        with open(path, "rb") as file:
            whole = files.matches(file, record["file"])
        if not whole:
            raise _damaged(folder, f"expected {FILE} as {RECORD} describes it, found other content")
        metadata = _usearch().Index.metadata(path)
        found = (metadata["dimensions"], metadata["count_present"])
        if found != (graph.ndim, record["vectors"]):
            raise _damaged(folder, f"expected {record['vectors']} vectors of {graph.ndim} numbers, found {found}")
        graph.view(path) if view else graph.load(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{FILE} cannot be read ({error})") from None


def _check_free(folder: Path) -> None:
    """Refuse to replace a folder that is no index, before hours of work.

    Raises:
        StoreError: it is something else, or cannot be written beside.
    """
    try:
        other = folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {FILE, RECORD})
    except OSError as error:
        raise files.cannot_write(folder, error) from None
    if other:
        raise StoreError(f"{folder}: expected an index, or a folder that is new, found other files: choose another")
    files.open_folder(folder.parent)


def _add(graph: Any, stored: StoredVectors, shards: set[int], report: Report) -> int:
    """Add the vectors of some shards; those of zeros, which have no direction, are left out."""
    before = len(graph)
    count = max(1, ADDED_BYTES // (4 * stored.size))
    for start in range(0, len(stored), count):
        places = np.arange(start, min(start + count, len(stored)))
        places = places[np.isin(stored.addresses(places) >> PLACE_BITS, list(shards))]
        if not len(places):
            continue
        rows = stored.take(places).astype(np.float32)
        largest = np.abs(rows).max(axis=1)
        check_finite(stored, places, largest)
        some = largest >= SMALLEST
        # At length 1: float16 holds no number over 65504.
        rows = rows[some] / largest[some, None]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        if len(rows):
            graph.add(stored.addresses(places[some]).astype(np.uint64), rows)
        report(len(places))
    if not len(graph):
        raise StoreError(f"{stored.store.folder}: expected {stored.of} with a direction, found zeros alone")
    return len(graph) - before


def _measure(index: Index) -> Recall:
    """Compare with the exact search; a result counts that is as similar as the exact search's last."""
    rng = np.random.default_rng(0)
    stored = index.stored
    sample = np.sort(rng.choice(len(stored), min(SAMPLE, len(stored)), replace=False))
    queries = stored.take(sample).astype(np.float64)
    queries = queries[np.abs(queries).max(axis=1) >= SMALLEST]
    if not len(queries):
        return Recall(SAMPLE_TOP, 0, 1.0)
    # The clip itself is always found: it is one more, and not counted.
    exact = nearest(stored, queries, SAMPLE_TOP + 1, starts=stored.starts).similarity
    found = index.nearest(queries, SAMPLE_TOP + 1).similarity
    wanted = exact.shape[1] - 1
    right = np.clip((found >= exact[:, -1:]).sum(axis=1) - 1, 0, wanted)
    return Recall(SAMPLE_TOP, len(queries), float(right.mean() / wanted) if wanted else 1.0)


def _write(index: Index, graph: Any, shards: Mapping[str, str]) -> None:
    folder = index.folder
    try:
        with files.new_folder(folder) as temporary:
            graph.save(temporary / FILE)
            with open(temporary / FILE, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
                size = file.tell()
            record = {
                "version": VERSION,
                **dict(zip(("run", "of", "size"), _identity(index.stored), strict=True)),
                "vectors": len(graph),
                "shards": shards,
                "recall": index.recall._asdict(),
                "file": {"bytes": size, "sha256": digest},
            }
            files.write_json(temporary, RECORD, record)
    except (OSError, RuntimeError) as error:
        raise files.cannot_write(folder, error if isinstance(error, OSError) else OSError(str(error))) from None
