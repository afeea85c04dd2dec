"""The layout of clips in the plane, by scikit-learn's t-SNE."""

import math
from typing import NamedTuple

import numpy as np

from gura_jax.errors import InputError, SystemConfigError
from gura_jax.tsne.clips import Clips, spread

PERPLEXITY = 50.0  # Figure 2
MANY_CLIPS = 1000
SEED = 0


class Map(NamedTuple):
    """Clips in the plane.

    Attributes:
        clips: n clips.
        places: [n, 2].
        perplexity: the perplexity used.
    """

    clips: Clips
    places: np.ndarray
    perplexity: float


def make_map(clips: Clips, perplexity: float = PERPLEXITY) -> Map:
    """Lay out clips by t-SNE, initialised with principal components and a fixed seed.

    Args:
        clips: the clips, with their scene embeddings.
        perplexity: effective number of neighbours; at most a third of the clips.

    Raises:
        InputError: perplexity is not a number over 0.
        SystemConfigError: scikit-learn is missing.
    """
    if not 0 < perplexity < math.inf:
        raise InputError(f"--perplexity: expected a number over 0, found {perplexity}")
    perplexity = min(perplexity, (len(clips.rows) - 1) / 3)
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        raise SystemConfigError("expected scikit-learn: pip install 'gura-jax[plot]'") from None
    # With few clips, threads spend more time waiting for each other than computing.
    with threadpool_limits(1 if len(clips.rows) < MANY_CLIPS else None):
        # Scaled to a range of 1: squares of tiny numbers underflow, which crashes scikit-learn's tree.
        scenes = clips.scenes / np.float32(spread(clips.scenes))
        places = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(scenes)
    return Map(clips, places, perplexity)
