"""The layout of clips in the plane, by scikit-learn's t-SNE; of very many, by t-SNE of some and interpolation."""

import math
from typing import NamedTuple

import numpy as np

from gura_jax.errors import InputError, SystemConfigError
from gura_jax.nearest import Vectors
from gura_jax.tsne.clips import Clips, blocks, spread

PERPLEXITY = 50.0  # Figure 2
MANY_CLIPS = 1000
LANDMARKS = 10_000  # laid out by t-SNE, which takes a minute or two for so many; of more clips, a random sample
COMPONENTS = 50  # principal ones in which the others' nearest landmarks are found, as is usual before t-SNE
ANCHORS = 3  # nearest landmarks that place a clip: more pull it between clusters (measured on scikit-learn's digits)
SEED = 0


class Map(NamedTuple):
    """Clips in the plane.

    Attributes:
        clips: n clips.
        places: [n, 2].
        perplexity: the perplexity used.
        landmarks: how many clips t-SNE laid out: n, or a random sample; the others were placed between them.
    """

    clips: Clips
    places: np.ndarray
    perplexity: float
    landmarks: int

    @property
    def method(self) -> str:
        """How the clips were laid out, as text."""
        if self.landmarks == len(self.places):
            return f"t-SNE, perplexity {self.perplexity:g}"
        return (
            f"t-SNE of {self.landmarks:,} random clips, perplexity {self.perplexity:g}; the others placed by their "
            f"{ANCHORS} nearest of these"
        )


def make_map(clips: Clips, perplexity: float = PERPLEXITY) -> Map:
    """Lay out clips by t-SNE, initialised with principal components and a fixed seed.

    Of more than :data:`LANDMARKS` clips, a random sample of so many is laid out, reduced to 50 principal components,
    and each other clip is placed by its three nearest in the sample.

    Args:
        clips: the clips, with their scene embeddings.
        perplexity: effective number of neighbours; at most a third of the clips.

    Raises:
        InputError: perplexity is not a number over 0.
        SystemConfigError: scikit-learn is missing.
    """
    if not 0 < perplexity < math.inf:
        raise InputError(f"--perplexity: expected a number over 0, found {perplexity}")
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        raise SystemConfigError("expected scikit-learn: pip install 'gura-jax[plot]'") from None
    count = len(clips.table)
    chosen = np.arange(count)
    if count > LANDMARKS:
        chosen = np.sort(np.random.default_rng(SEED).choice(count, LANDMARKS, replace=False))
    perplexity = min(perplexity, (len(chosen) - 1) / 3)
    # Scaled to a range of 1: squares of tiny numbers underflow, which crashes scikit-learn's tree.
    scale = np.float32(spread(clips.scenes))
    scenes = _rows(clips.scenes, chosen) / scale
    reduce = None
    if count > LANDMARKS and scenes.shape[1] > COMPONENTS:
        reduce = PCA(COMPONENTS, random_state=SEED).fit(scenes)
        scenes = reduce.transform(scenes)
    # With few clips, threads spend more time waiting for each other than computing.
    with threadpool_limits(1 if len(chosen) < MANY_CLIPS else None):
        places = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(scenes)
    if count == len(chosen):
        return Map(clips, places, perplexity, count)
    found = np.empty((count, 2), np.float32)
    for start, block in blocks(clips.scenes):
        block /= scale
        found[start : start + len(block)] = interpolate(
            block if reduce is None else reduce.transform(block), scenes, places
        )
    found[chosen] = places
    return Map(clips, found, perplexity, len(chosen))


def _rows(scenes: Vectors, chosen: np.ndarray) -> np.ndarray:
    """Read some rows, ascending, [n, S] float32."""
    parts = []
    for start, block in blocks(scenes):
        first, last = np.searchsorted(chosen, (start, start + len(block)))
        parts.append(block[chosen[first:last] - start])
    return np.concatenate(parts)


def interpolate(vectors: np.ndarray, landmarks: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Place vectors [n, D] by their nearest landmarks [L, D], which lie at places [L, 2].

    The place is the mean of the nearest landmarks', weighted by the inverse squared distance, and less the further a
    landmark lies from the median of these places: one that lies in another cluster would pull the vector in between.

    Returns:
        [n, 2] float32.
    """
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=ANCHORS, algorithm="brute").fit(landmarks)
    distances, nearest = search.kneighbors(vectors)  # [n, k], Euclidean as in t-SNE
    around = places[nearest].astype(np.float64)  # [n, k, 2]
    apart = np.square(around - np.median(around, axis=1, keepdims=True)).sum(axis=2)
    spacing = np.ptp(places, axis=0).max() / math.sqrt(len(places))  # of the landmarks, were they on a grid
    weights = 1 / (np.maximum(np.square(distances), 1e-12) * (spacing**2 + apart))  # 1e-12: equal to a landmark
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nk,nkd->nd", weights, around).astype(np.float32)
