"""The plan of a run: which clips make a batch, and which batches a shard. A pure function of lengths and limits.

Clips are sorted by length, the longest first, and cut into batches from one end to the other, each padded to the length
of its bucket. So the padding is little, the shapes to compile are few, and what memory cannot hold shows at once.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gura_jax.batching import bucket_lengths

MAX_ROWS = 256  # clips in a batch


class PlannedBatch(NamedTuple):
    """Clips ``start`` to ``stop`` of the plan's order, in ``rows`` rows of ``samples`` samples."""

    start: int
    stop: int
    rows: int
    samples: int


class PlannedShard(NamedTuple):
    """Clips ``start`` to ``stop`` of the plan's order, in these batches; clips in no batch cannot be read."""

    start: int
    stop: int
    batches: tuple[PlannedBatch, ...]


class ShardLimits(NamedTuple):
    """Limits of a shard; only a single batch may exceed them."""

    clips: int
    samples: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Clips in ``order`` (indices into the input), with their ``lengths`` in samples, and the shards.

    A clip of length 0 cannot be read: such clips come last, in no batch.
    """

    order: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int64, in that order
    shards: tuple[PlannedShard, ...]

    @property
    def batches(self) -> list[PlannedBatch]:
        """All batches, in order."""
        return [batch for shard in self.shards for batch in shard.batches]

    @property
    def buckets(self) -> list[int]:
        """The lengths that batches are padded to, in samples, the longest first."""
        return list(dict.fromkeys(batch.samples for batch in self.batches))

    @property
    def padding(self) -> float:
        """The share of computed samples that belong to no clip."""
        computed = sum(batch.rows * batch.samples for batch in self.batches)
        return 1 - int(self.lengths.sum()) / computed if computed else 0.0


def make_plan(
    lengths: Sequence[int] | np.ndarray,
    clip_bytes: np.ndarray,
    batch_samples: int,
    limits: ShardLimits,
    least: int = 0,
) -> Plan:
    """Plan the batches and shards of clips.

    Args:
        lengths: [n], in samples; 0 for a clip that cannot be read.
        clip_bytes: [n], stored for each clip.
        batch_samples: computed at once, at most; a longer clip is a batch by itself.
        limits: of a shard.
        least: a clip of fewer samples costs as much as one of so many.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    readable = int(np.count_nonzero(ordered))
    buckets = bucket_lengths(ordered[:readable])
    batches: list[PlannedBatch] = []
    start = 0
    while start < readable:
        samples = int(buckets[np.searchsorted(buckets, ordered[start])])
        rows = max(1, min(MAX_ROWS, batch_samples // max(samples, least)))
        stop = min(start + rows, readable)
        batches.append(PlannedBatch(start, stop, min(rows, readable - start), samples))
        start = stop
    return Plan(order, ordered, _shards(batches, len(lengths), ordered, np.asarray(clip_bytes)[order], limits))


def _shards(
    batches: list[PlannedBatch], total: int, lengths: np.ndarray, sizes: np.ndarray, limits: ShardLimits
) -> tuple[PlannedShard, ...]:
    """Cut between batches; clips that cannot be read belong to the last shard."""
    shards: list[list[PlannedBatch]] = []
    held = [0, 0, 0]
    for batch in batches:
        span = slice(batch.start, batch.stop)
        more = [batch.stop - batch.start, int(lengths[span].sum()), int(sizes[span].sum())]
        if not shards or any(h + m > limit for h, m, limit in zip(held, more, limits, strict=True)):
            shards.append([])
            held = [0, 0, 0]
        shards[-1].append(batch)
        held = [h + m for h, m in zip(held, more, strict=True)]
    if not shards:
        return (PlannedShard(0, total, ()),) if total else ()
    ends = [shard[-1].stop for shard in shards[:-1]] + [total]
    starts = [0, *ends[:-1]]
    return tuple(PlannedShard(a, b, tuple(shard)) for a, b, shard in zip(starts, ends, shards, strict=True))
