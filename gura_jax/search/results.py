"""Results of a search: as a table, as JSON, and as what a page shows."""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.search import Duplicates, Matches
from gura_jax.dataset.sources import printable
from gura_jax.search.queries import Failure, Query

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of controls, bidi's among them, and line breaks


class Hit(NamedTuple):
    """A clip that was found.

    Attributes:
        meta: its row of the store's metadata.
        similarity: to the query.
        time: of its most similar frame, in milliseconds; None for scenes.
    """

    meta: Mapping[str, Any]
    similarity: float
    time: float | None = None


class Result(NamedTuple):
    """A query, and what was found for it.

    Attributes:
        name: of the query.
        hits: the most similar first.
        sound: of a recording that was the query, at the rate of the store's system.
        meta: of a clip of the store that was the query.
    """

    name: str
    hits: Sequence[Hit]
    sound: np.ndarray | None = None
    meta: Mapping[str, Any] | None = None


def of_matches(store: EmbeddingStore, queries: Sequence[Query], found: Matches) -> list[Result]:
    """Return the result of each query."""
    results = []
    for i, query in enumerate(queries):
        times = [None] * found.clips.shape[1] if found.times is None else found.times[i].tolist()
        rows = store.meta.take(found.clips[i]).to_pylist()
        hits = [Hit(*each) for each in zip(rows, found.similarity[i].tolist(), times, strict=True)]
        own = None if query.clip is None else store.meta.slice(query.clip, 1).to_pylist()[0]
        results.append(Result(query.name, hits, query.sound, own))
    return results


def of_duplicates(store: EmbeddingStore, found: Duplicates) -> list[Result]:
    """Return a result for each pair: the first clip is the query."""
    first, second = (store.meta.take(found.clips[:, i]).to_pylist() for i in (0, 1))
    return [
        Result(one["id"], [Hit(other, similarity)], meta=one)
        for one, other, similarity in zip(first, second, found.similarity.tolist(), strict=True)
    ]


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results as JSON has them."""
    return [
        {
            "query": printable(result.name),
            "matches": [
                {
                    "id": hit.meta["id"],
                    "path": hit.meta["path"],
                    "offset": hit.meta["offset"],
                    "duration": hit.meta["duration"],
                    "similarity": hit.similarity,
                }
                | ({} if hit.time is None else {"time_ms": hit.time})
                for hit in result.hits
            ],
        }
        for result in results
    ]


def pairs_as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results of :func:`of_duplicates` as JSON has them."""
    return [
        {"ids": [result.name, hit.meta["id"]], "similarity": hit.similarity}
        for result in results
        for hit in result.hits
    ]


def failed_as_json(failed: Sequence[Failure]) -> list[dict[str, str]]:
    """Return queries without a vector as JSON has them."""
    return [{"query": printable(failure.name), "error": printable(str(failure.error))} for failure in failed]


def visible(text: str) -> str:
    """Return a text as a terminal can show it in one line: control characters become escapes, as \\x1b."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _INVISIBLE else c for c in text)


def table(results: Sequence[Result]) -> Iterator[str]:
    """Return the lines of a table: each query, and below it rank, similarity, id, and the time of a frame."""
    for result in results:
        yield visible(result.name)
        rank = len(str(len(result.hits)))
        ids = [visible(hit.meta["id"]) for hit in result.hits]
        width = max(map(len, ids), default=0)
        for i, (name, hit) in enumerate(zip(ids, result.hits, strict=True)):
            time = "" if hit.time is None else f"  {clock(hit.time)}"
            yield f"  {i + 1:{rank}}  {hit.similarity:7.4f}  {name:{width}}{time}".rstrip()


def pair_table(results: Sequence[Result]) -> Iterator[str]:
    """Return the lines of a table of duplicates: similarity, and both ids."""
    names = [visible(result.name) for result in results]
    width = max(map(len, names), default=0)
    for name, result in zip(names, results, strict=True):
        yield f"{result.hits[0].similarity:7.4f}  {name:{width}}  {visible(result.hits[0].meta['id'])}"


def clock(milliseconds: float) -> str:
    """Write a time in a clip as 1:02.35 (minutes, seconds)."""
    minutes, hundredths = divmod(math.floor(milliseconds / 10 + 0.5), 6000)
    return f"{minutes}:{hundredths / 100:05.2f}"
