"""Batches: which clips are computed together, the lengths they are padded to, and the padded arrays."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gura_jax.audio import resample, resampled_length
from gura_jax.backend import Platform

BUCKETS_PER_OCTAVE = 4  # clip lengths are padded by 12 % on average, 25 % at most
MAX_BUCKETS = 48  # of a known collection; each is a shape to compile
PADDING = 0.035  # of all samples: buckets are as few as keep to it; the last batches of each add a little
CANDIDATES = 512  # lengths that a bucket may end at


class Batch(NamedTuple):
    """Clips that are computed together, padded to ``samples``; rows past the last clip hold silence."""

    rows: int
    samples: int
    clips: tuple[int, ...]


class Padded(NamedTuple):
    """A batch by sample rate, as a model takes it."""

    audio: dict[int, np.ndarray]  # [rows, N] float32, zero past each clip's end
    lengths: dict[int, np.ndarray]  # [rows] int32


def pad(
    clips: Sequence[np.ndarray | None], rows: int, samples: int, *, sample_rate: int, rates: Sequence[int]
) -> Padded:
    """Put clips into one batch, at every rate that is wanted.

    Args:
        clips: at most ``rows``, each [n] at ``sample_rate``, n <= samples; None stands for silence.
        rows: of the batch; those past the last clip hold silence of full length.
        samples: of the batch at ``sample_rate``; at another rate as many as these become.
        sample_rate: of the clips, in Hz.
        rates: to pad at; clips are resampled once for each that differs.
    """
    audio, lengths = {}, {}
    for rate in rates:
        width = resampled_length(samples, sample_rate, rate)
        audio[rate] = np.zeros((rows, width), np.float32)
        lengths[rate] = np.full(rows, width, np.int32)
        for row, clip in enumerate(clips):
            if clip is not None:
                own = resample(clip, sample_rate, rate)
                audio[rate][row, : len(own)] = own
                lengths[rate][row] = len(own)
    return Padded(audio, lengths)


def fill_rows(audio: Mapping[int, Any], lengths: Mapping[int, Any], devices: int) -> Padded:
    """A batch with rows of silence added, until their number is a multiple of the devices'."""
    missing = -len(next(iter(audio.values()))) % devices
    if not missing:
        return Padded(dict(audio), dict(lengths))
    return Padded(
        {rate: _pad_rows(x, missing, 0) for rate, x in audio.items()},
        {rate: _pad_rows(x, missing, audio[rate].shape[1]) for rate, x in lengths.items()},
    )


def _pad_rows(x: Any, rows: int, value: int) -> Any:
    """Pad an array where it is: on the host or on a device; and it may be traced, for a gradient."""
    width = ((0, rows), *((0, 0),) * (x.ndim - 1))
    return (jnp if isinstance(x, jax.Array) else np).pad(x, width, constant_values=value)


def pack(
    lengths: Sequence[int],
    max_rows: int,
    devices: int,
    *,
    platform: Platform,
    sample_rate: int,
    exact: bool = True,
    least: int = 0,
) -> list[Batch]:
    """Cut clips into the batches that cost least to compute, padding and silent rows included.

    Rows are a power of two times the devices, and lengths those of :func:`bucket_length`, so that shapes are few.
    Clips of one length are not padded, and a single batch of them has as many rows as clips. ``exact=False`` pads them
    too, for few shapes over many calls.

    Args:
        lengths: of the clips, in samples.
        max_rows: clips in a batch, at most; but a row for each device at least.
        devices: that a batch is sharded over.
        platform: its limits.
        sample_rate: of the lengths, in Hz.
        exact: see above.
        least: a clip of fewer samples costs as much as one of so many.

    Returns:
        Batches, the longest clips first.
    """
    limit, overhead = (int(s * sample_rate) for s in (platform.batch_seconds, platform.overhead_seconds))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    one_length = exact and lengths[order[0]] == lengths[order[-1]]
    padded = [lengths[i] if one_length else bucket_length(lengths[i]) for i in order]
    costs = [max(samples, least) for samples in padded]
    if one_length and len(order) <= max_rows and len(order) * costs[0] <= max(limit, costs[0]):
        return [Batch(len(order), padded[0], tuple(order))]
    sizes = [devices]
    while 2 * sizes[-1] <= max_rows:
        sizes.append(2 * sizes[-1])
    best: list[tuple[int, int]] = [(0, 0)] * (len(order) + 1)  # cost of the clips from i on, minus their first rows
    for i in reversed(range(len(order))):
        best[i] = min(
            (rows * costs[i] + overhead + best[min(i + rows, len(order))][0], -rows)
            for rows in sizes
            if rows == devices or rows * costs[i] <= limit
        )
    batches, i = [], 0
    while i < len(order):
        rows = -best[i][1]
        batches.append(Batch(rows, padded[i], tuple(order[i : i + rows])))
        i += rows
    return batches


def bucket_length(samples: int, per_octave: int = BUCKETS_PER_OCTAVE) -> int:
    """The length that a clip is padded to, so that clips of many lengths share few compiled shapes."""
    octave = 2 ** math.floor(math.log2(samples))
    step = max(1, octave // per_octave)
    return math.ceil(samples / step) * step


def bucket_lengths(lengths: np.ndarray) -> np.ndarray:
    """Choose the lengths to pad a known collection to, ascending: as few as keep the padding under :data:`PADDING`.

    Among sets of that size, the one with the least padding. Each is the length of a clip, so that clips of one length
    are not padded at all.

    Args:
        lengths: [n] in samples, over 0, in any order.
    """
    if not len(lengths):
        return np.zeros(0, np.int64)
    values, counts = np.unique(lengths, return_counts=True)
    if len(values) > CANDIDATES:  # neighbours share a candidate; each has as many clips or as large a step
        share = np.cumsum(counts) / counts.sum() + (np.log(values) - math.log(values[0])) / math.log(
            values[-1] / values[0]
        )
        group = np.minimum((share * CANDIDATES / 2).astype(np.int64), CANDIDATES - 1)
        last = np.flatnonzero(np.append(np.diff(group) > 0, True))
    else:
        last = np.arange(len(values))
    tops = values[last]
    clips = np.concatenate([[0], np.cumsum(counts)[last]])
    samples = np.concatenate([[0], np.cumsum(counts * values)[last]])
    # cost[j, i]: padding of the candidates j to i - 1 in a bucket that ends at the last of them
    cost = tops[None, :] * (clips[None, 1:] - clips[:-1, None]) - (samples[None, 1:] - samples[:-1, None])
    cost = np.where(np.tri(len(tops), dtype=bool).T, cost, np.iinfo(np.int64).max // 4)
    best = cost[0]  # with one bucket, of the first i + 1 candidates
    choices: list[np.ndarray] = []
    allowed = PADDING / (1 - PADDING) * samples[-1]
    while best[-1] > allowed and len(choices) + 1 < min(MAX_BUCKETS, len(tops)):
        through = best[:-1, None] + cost[1:]  # the last bucket starts at candidate j + 1
        choices.append(np.argmin(through, axis=0))
        best = np.minimum(through.min(axis=0), np.iinfo(np.int64).max // 4)
    ends = [len(tops) - 1]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return tops[sorted(set(ends))]
