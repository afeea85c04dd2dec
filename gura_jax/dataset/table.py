"""The plan of a run as a table, a row a clip; and the settings that it depends on."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gura_jax.audio import MAX_SECONDS, kilohertz
from gura_jax.dataset.commit import Storage, as_read
from gura_jax.dataset.decode import Clip, probe
from gura_jax.dataset.plan import Plan, ShardLimits, make_plan
from gura_jax.dataset.sinks import DEFAULT, SINKS
from gura_jax.errors import InputError, expected
from gura_jax.model import Model

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_CLIPS = 4096
SHARD_BYTES = 1 << 30  # held in memory, beside the shard before, which is being written
PLAN_COLUMNS = ("samples", "shard", "batch", "rows", "padded", "problem")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is stored, and how clips are cut and grouped.

    Attributes:
        timestamps: store frames too, not scene embeddings alone.
        storage: type of the numbers on disk; what is computed does not depend on it.
        window: cut longer clips into windows of so many seconds, each a row of its own.
        max_duration: refuse clips of more seconds (after windows are cut).
        shard_hours: of audio in a shard, at most: what is lost when a job is killed.
        batch_seconds: of audio computed at once; by default what suits the devices.
        format: of the store, a name in :data:`gura_jax.dataset.sinks.SINKS`.
    """

    timestamps: bool = False
    storage: Storage = "float32"
    window: float | None = None
    max_duration: float = MAX_SECONDS
    shard_hours: float = 1.0
    batch_seconds: float | None = None
    format: str = DEFAULT

    def __post_init__(self) -> None:
        for name in ("window", "max_duration", "shard_hours", "batch_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name}: expected a number over 0, found {value!r}")
        if self.storage not in ("float32", "float16"):
            raise InputError(f"storage: expected float32 or float16, found {self.storage!r}")
        if self.format not in SINKS:
            raise InputError(f"format {expected(self.format, SINKS)}")


def plan_table(model: Model, clips: "pa.Table", settings: Settings, *, first_shard: int = 0) -> "pa.Table":
    """Plan a run: the clips in the order of the store, with their shard, batch and padded length.

    Args:
        model: for the sizes of its embeddings.
        clips: as from :func:`gura_jax.dataset.sources.read_inputs`.
        settings: of the run.
        first_shard: its number.

    Returns:
        The columns of ``clips``, and ``samples`` (at the model's rate; 0: cannot be read, for the reason in
        ``problem``), ``shard``, ``batch`` (-1: in none), ``rows`` and ``padded``, those of the batch.

    Raises:
        InputError: ``clips`` has a column that the plan has.
    """
    import pyarrow as pa

    # Of a file that will be cut into windows, the length does not matter.
    longest = float("inf") if settings.window else settings.max_duration
    found = probe([Clip(*row) for row in clip_rows(clips)], model.sample_rate, longest)
    shortest = model.shortest(frames=settings.timestamps, scenes=True)
    if settings.window is not None:
        clips, found = _cut(model, clips, found, settings.window, shortest / model.sample_rate)
    for i, samples in enumerate(found):
        if isinstance(samples, int) and samples < shortest:
            found[i] = too_short(model, samples, shortest)
    lengths = np.array([samples if isinstance(samples, int) else 0 for samples in found], np.int64)
    numbers = model.scene_embedding_size + np.zeros(len(lengths), np.int64)
    if settings.timestamps:
        numbers += model.timestamp_embedding_size * np.array([model.num_frames(int(n)) if n else 0 for n in lengths])
    limits = ShardLimits(SHARD_CLIPS, int(settings.shard_hours * 3600 * model.sample_rate), SHARD_BYTES)
    size = np.dtype(settings.storage).itemsize
    batch_samples = int(batch_seconds(model, settings) * model.sample_rate)
    plan = make_plan(lengths, size * numbers, batch_samples, limits, model.least)
    table = clips.take(pa.array(plan.order))
    problems = [samples if isinstance(samples, str) else None for samples in found]
    columns = _columns(plan, first_shard) | {"problem": pa.array([problems[i] for i in plan.order], pa.string())}
    for name in PLAN_COLUMNS:
        if name in table.column_names:
            raise InputError(f"expected a manifest without the column {name}, which the plan has: rename it")
        table = table.append_column(name, columns[name])
    return as_read(table)


def clip_rows(clips: "pa.Table") -> Iterator[tuple[str, float, float | None]]:
    """Iterate over (path, offset, duration) of a table of clips."""
    return zip(*(clips[name].to_pylist() for name in ("path", "offset", "duration")), strict=True)


def too_short(model: Model, samples: int, shortest: int) -> str:
    """Return the reason why a clip of so many samples is refused, where more are needed."""
    return (
        f"expected at least {shortest} samples at {kilohertz(model.sample_rate)} for "
        f"{model.system.name}, found {samples}"
    )


def batch_seconds(model: Model, settings: Settings) -> float:
    """Return the seconds of audio that are computed at once, on all devices together."""
    if settings.batch_seconds is not None:
        return settings.batch_seconds
    devices = 1 if model.platform.share_batch else model.compilation.batch_devices
    return float(model.platform.batch_seconds * devices)


def windows(offset: float, duration: float, window: float, shortest: float) -> Iterable[tuple[float, float]]:
    """Cut a clip into windows (offset, duration), in seconds.

    The last has the rest; if that is under ``shortest``, it is part of the window before.
    """
    count = max(1, math.ceil((duration - shortest) / window))
    for i in range(count):
        start = i * window
        yield offset + start, (window if i < count - 1 else duration - start)


def _cut(
    model: Model, clips: "pa.Table", found: list[int | str], window: float, shortest: float
) -> tuple["pa.Table", list[int | str]]:
    """Replace longer clips by windows: of id ``ID#NUMBER``, with the clip's id in the column ``source``."""
    import pyarrow as pa

    if "source" in clips.column_names:
        raise InputError("expected a manifest without the column source, which --window writes: rename it")
    rate = model.sample_rate
    keep: list[int] = []
    lengths: list[int | str] = []
    ids, offsets, durations = [], [], []
    names = clips["id"].to_pylist()
    for i, ((_, offset, duration), samples) in enumerate(zip(clip_rows(clips), found, strict=True)):
        if isinstance(samples, str) or samples <= window * rate:
            cuts: list[tuple[str, float, float | None, int | str]] = [(names[i], offset, duration, samples)]
        else:
            # A sample more, as resampling may round up; the last window goes to the clip's own end.
            cuts = [
                (f"{names[i]}#{n}", start, length, int(np.ceil(length * rate)) + 1)
                for n, (start, length) in enumerate(windows(offset, samples / rate, window, shortest))
            ]
            if duration is None:
                cuts[-1] = cuts[-1][0], cuts[-1][1], None, cuts[-1][3]
        for name, start, length, size in cuts:
            keep.append(i)
            ids.append(name)
            offsets.append(start)
            durations.append(length)
            lengths.append(size)
    if len(set(ids)) < len(ids):
        twice = next(name for name, count in collections.Counter(ids).items() if count > 1)
        raise InputError(f"expected ids that differ also in windows, found {twice!r} twice: rename a clip")
    table = clips.take(pa.array(keep, pa.int64())).append_column("source", pa.array([names[i] for i in keep]))
    for name, values, kind in (
        ("id", ids, pa.string()),
        ("offset", offsets, pa.float64()),
        ("duration", durations, pa.float64()),
    ):
        table = table.set_column(table.column_names.index(name), name, pa.array(values, kind))
    return table, lengths


def _columns(plan: Plan, first_shard: int) -> dict[str, "pa.Array"]:
    import pyarrow as pa

    shard, batch, rows, padded = (np.full(len(plan.order), value, np.int64) for value in (0, -1, 0, 0))
    number = 0
    for index, planned in enumerate(plan.shards):
        shard[planned.start : planned.stop] = first_shard + index
        for b in planned.batches:
            batch[b.start : b.stop], rows[b.start : b.stop], padded[b.start : b.stop] = number, b.rows, b.samples
            number += 1
    arrays = {"samples": plan.lengths, "shard": shard, "batch": batch, "rows": rows, "padded": padded}
    return {name: pa.array(values, pa.int64()) for name, values in arrays.items()}


class PlanSummary(NamedTuple):
    """Totals of a plan, which ``--dry-run`` prints."""

    clips: int
    unreadable: int
    hours: float
    buckets: tuple[float, ...]  # seconds
    batches: int
    padding: float  # share of what is computed
    shards: int
    bytes: int


def summarise(model: Model, settings: Settings, table: "pa.Table") -> PlanSummary:
    """Sum up a plan, with the size of what it will store."""
    samples, batch, rows, padded, shard = (
        table[name].to_numpy() for name in ("samples", "batch", "rows", "padded", "shard")
    )
    _, first = np.unique(batch[batch >= 0], return_index=True)
    computed = int((rows[first] * padded[first]).sum())
    readable = samples > 0
    numbers = model.scene_embedding_size * int(readable.sum())
    if settings.timestamps:
        numbers += model.timestamp_embedding_size * sum(model.num_frames(int(n)) for n in samples[readable])
    return PlanSummary(
        clips=len(table),
        unreadable=int((~readable).sum()),
        hours=float(samples.sum() / model.sample_rate / 3600),
        buckets=tuple(float(x) / model.sample_rate for x in np.unique(padded[readable])),
        batches=len(first),
        padding=1 - int(samples.sum()) / computed if computed else 0.0,
        shards=len(np.unique(shard)),
        bytes=numbers * np.dtype(settings.storage).itemsize,
    )
