"""The plan of a run: which clips make a batch, and which batches a shard. A pure function of lengths and limits.

Clips are sorted by length, the longest first, and cut into batches from one end to the other, each padded to the length
of its bucket. So the padding is little, the shapes to compile are few, and what memory cannot hold shows at once. Clips
that can only be read together, as the rows of a compressed table, stay together: these are sorted within their shard.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gura_jax.batching import bucket_lengths

MAX_ROWS = 256  # clips in a batch
COLUMNS = ("samples", "shard", "batch", "rows", "padded", "problem", "etag")  # of a plan, beside those of the clips


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
    """Clips in ``order`` (indices into the input), with their ``lengths`` in samples, and the batches and shards.

    A clip of length 0 cannot be read: such clips come last, in no batch, and belong to the last shard.
    """

    order: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int64, in that order
    table: np.ndarray  # [batches, 4] int64: as PlannedBatch
    firsts: np.ndarray  # [shards] int64: the first batch of each

    @property
    def batches(self) -> list[PlannedBatch]:
        """All batches, in order."""
        return [PlannedBatch(*row) for row in self.table.tolist()]

    @property
    def shards(self) -> tuple[PlannedShard, ...]:
        """All shards, in order."""
        batches, starts = self.batches, self.shard_starts.tolist()
        stops, firsts = [*starts[1:], len(self.order)], [*self.firsts.tolist(), len(batches)]
        return tuple(
            PlannedShard(start, stop, tuple(batches[first:end]))
            for start, stop, first, end in zip(starts, stops, firsts, firsts[1:], strict=False)
        )

    @property
    def shard_starts(self) -> np.ndarray:
        """The first clip of each shard, [shards]."""
        return self.table[self.firsts, 0] if len(self.table) else np.zeros_like(self.firsts)

    @property
    def buckets(self) -> list[int]:
        """The lengths that batches are padded to, in samples, the longest first."""
        return np.unique(self.table[:, 3])[::-1].tolist()

    @property
    def padding(self) -> float:
        """The share of computed samples that belong to no clip."""
        computed = int((self.table[:, 2] * self.table[:, 3]).sum())
        return 1 - int(self.lengths.sum()) / computed if computed else 0.0


def make_plan(
    lengths: Sequence[int] | np.ndarray,
    clip_bytes: np.ndarray,
    batch_samples: int,
    limits: ShardLimits,
    least: int = 0,
    units: np.ndarray | None = None,
) -> Plan:
    """Plan the batches and shards of clips.

    Args:
        lengths: [n], in samples; 0 for a clip that cannot be read.
        clip_bytes: [n], stored for each clip.
        batch_samples: computed at once, at most; a longer clip is a batch by itself.
        limits: of a shard.
        least: a clip of fewer samples costs as much as one of so many.
        units: [n], clips that are read together have one number, in order; -1: by itself. Each unit is in one shard,
            if that can hold it.
    """
    lengths = np.asarray(lengths, np.int64)
    costs = np.stack([np.ones_like(lengths), lengths, np.asarray(clip_bytes, np.int64)], axis=1)  # [n, 3], as limits
    blocks = np.zeros(len(lengths), np.int64) if units is None else _blocks(units, costs, limits)
    order = np.lexsort((-lengths, blocks, lengths == 0))
    ordered, costs = lengths[order], costs[order]
    readable = int(np.count_nonzero(ordered))
    buckets = bucket_lengths(ordered[:readable])
    cuts = np.flatnonzero(np.diff(blocks[order[:readable]])) + 1
    batches: list[np.ndarray] = []
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), readable], strict=True):
        batches.append(_batches(ordered, begin, end, buckets, batch_samples, least, last=end == readable))
    table = np.concatenate(batches)
    forced = np.cumsum([0, *map(len, batches[:-1])]).tolist()  # a shard ends with its block
    sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(costs, axis=0)])
    firsts = _pack(sums[table[:, 1]] - sums[table[:, 0]], limits, forced)
    if not readable:
        firsts = np.zeros(min(1, len(order)), np.int64)  # a shard of nothing but clips that cannot be read
    return Plan(order, ordered, table, firsts)


def _blocks(units: np.ndarray, costs: np.ndarray, limits: ShardLimits) -> np.ndarray:
    """Join neighbouring units to blocks of about a shard, [n], from 1; 0: clips by themselves."""
    count = int(units.max(initial=-1)) + 1
    together = units >= 0
    sums = np.zeros((count, 3), np.int64)
    np.add.at(sums, units[together], costs[together])
    firsts = _pack(sums, limits, [0])
    block = np.zeros(count + 1, np.int64)  # the last is for -1
    block[firsts] = 1
    block[:count] = np.cumsum(block[:count])
    block[count] = 0
    return block[units]


def _batches(
    ordered: np.ndarray, begin: int, end: int, buckets: np.ndarray, batch_samples: int, least: int, *, last: bool
) -> np.ndarray:
    """Cut clips ``begin`` to ``end`` into batches, [batches, 4]."""
    falling = -ordered[begin:end]
    parts: list[np.ndarray] = [np.zeros((0, 4), np.int64)]
    start = begin
    while start < end:
        bucket = int(np.searchsorted(buckets, ordered[start]))
        samples = int(buckets[bucket])
        rows = max(1, min(MAX_ROWS, batch_samples // max(samples, least)))
        # All that begin with a clip of this bucket.
        own = end if bucket == 0 else begin + int(np.searchsorted(falling, -buckets[bucket - 1]))
        starts = np.arange(start, own, rows, dtype=np.int64)
        stops = np.minimum(starts + rows, end)
        part = np.stack([starts, stops, np.full_like(starts, rows), np.full_like(starts, samples)], axis=1)
        start = int(stops[-1])
        if last and start == end:
            part[-1, 2] = end - starts[-1]
        parts.append(part)
    return np.concatenate(parts)


def _pack(costs: np.ndarray, limits: ShardLimits, forced: Sequence[int]) -> np.ndarray:
    """Group what follows each other, within limits: the first of each group, in which none of ``forced`` follows.

    Args:
        costs: [n, 3], as the limits.
        limits: of a group; one by itself may exceed them.
        forced: where groups begin in any case, ascending.
    """
    sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(costs, axis=0)])
    firsts: list[int] = []
    for begin, end in zip(forced, [*forced[1:], len(costs)], strict=True):
        start = begin
        while start < end:
            firsts.append(start)
            reach = (
                int(np.searchsorted(sums[:, k], sums[start, k] + limit, "right")) - 1 for k, limit in enumerate(limits)
            )
            start = min(max(start + 1, min(reach)), end)
    return np.array(firsts, np.int64)
