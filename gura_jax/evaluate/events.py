"""Events in the probabilities of frames: filter, threshold, runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

THRESHOLD = 0.5

Parameters = tuple[tuple[str, float], ...]
"""Parameters of :func:`find_events`: (name, value) of each, sorted by name."""


class Events(NamedTuple):
    """Events of one file, ordered by start; times in milliseconds."""

    label: np.ndarray  # [n], indices of labels
    start: np.ndarray  # [n]
    end: np.ndarray  # [n]


def parameter_grid(grid: Mapping[str, Sequence[float]]) -> list[Parameters]:
    """List every combination of the parameters' values; the last parameter by name changes fastest."""
    names = sorted(grid)
    return [tuple(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]


def find_events(
    probabilities: np.ndarray,
    times: np.ndarray,
    *,
    median_filter_ms: float = 150,
    min_duration: float = 60,
    threshold: float = THRESHOLD,
) -> Events:
    """Find the events of one file: runs of frames above the threshold, from the first frame's time to the last one's.

    Args:
        probabilities: [T, C].
        times: [T], milliseconds, ascending.
        median_filter_ms: width of a median filter along time; 0: none.
        min_duration: ms; shorter events are dropped.
        threshold: of the filtered probabilities.
    """
    active = filtered(probabilities, times, median_filter_ms) > threshold  # [T, C]
    edges = np.diff(np.pad(active.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # [C, T + 1]
    label, first = np.nonzero(edges == 1)
    last = np.nonzero(edges == -1)[1] - 1
    start, end = times[first], times[last]
    kept = end - start >= min_duration
    label, start, end = label[kept], start[kept], end[kept]
    order = np.argsort(start, kind="stable")
    return Events(label[order], start[order], end[order])


def filtered(probabilities: np.ndarray, times: np.ndarray, median_filter_ms: float) -> np.ndarray:
    """Apply a median filter along time; its width in milliseconds is rounded to frames."""
    from scipy.ndimage import median_filter

    if not median_filter_ms or len(times) < 2:
        return probabilities
    width = round(median_filter_ms / float(np.mean(np.diff(times))))
    return median_filter(probabilities, size=(width, 1)) if width else probabilities
