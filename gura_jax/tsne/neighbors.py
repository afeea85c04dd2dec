"""The clips most similar to each clip of a map, by their embeddings."""

from typing import NamedTuple

import numpy as np

from gura_jax.nearest import SMALLEST, nearest
from gura_jax.tsne.clips import Clips, blocks

NEIGHBORS = 10
MAX_SEARCHED = 10_000  # clips: each is compared with each other one, which takes a minute or two for so many


class Neighbors(NamedTuple):
    """The most similar clips of each clip, best first.

    Attributes:
        rows: [n, k] int64; -1 where there are none, of a clip whose embedding is zero.
        similarity: [n, k] float32, cosine.
    """

    rows: np.ndarray
    similarity: np.ndarray


def find_neighbors(clips: Clips) -> Neighbors | None:
    """Find the ten most similar clips of each clip, exactly; None where there are too many clips.

    Raises:
        StoreError: embeddings are not finite.
    """
    count = len(clips.table)
    if count > MAX_SEARCHED:
        return None
    top = min(NEIGHBORS, count - 1)
    rows, similarity = np.full((count, top), -1), np.zeros((count, top), np.float32)
    for start, block in blocks(clips.scenes):
        queries = start + np.flatnonzero(np.abs(block).max(axis=1) >= SMALLEST)
        if not len(queries):
            continue
        found = nearest(clips.scenes, block[queries - start], top + 1)
        other = found.rows != queries[:, None]
        other[other.all(axis=1), -1] = False  # so many equal ones that the clip itself is not among them
        rows[queries] = found.rows[other].reshape(-1, top)
        similarity[queries] = found.similarity[other].reshape(-1, top)
    return Neighbors(rows, similarity)
