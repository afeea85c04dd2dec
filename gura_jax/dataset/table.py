"""The plan of a run as a table, a row a clip; and the settings that it depends on."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gura_jax.audio import MAX_SECONDS, kilohertz, too_long
from gura_jax.dataset.columns import FRAME_COLUMNS
from gura_jax.dataset.commit import Storage, as_read
from gura_jax.dataset.decode import Clip, probe
from gura_jax.dataset.plan import COLUMNS, Plan, ShardLimits, make_plan
from gura_jax.dataset.sinks import DEFAULT, SINKS
from gura_jax.dataset.sources import units
from gura_jax.dataset.states import States
from gura_jax.errors import InputError, expected
from gura_jax.fusion import Keep
from gura_jax.model import Model

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_CLIPS = 4096
SHARD_BYTES = 1 << 30  # held in memory, beside the shard before, which is being written
ROWS_AT_ONCE = 1 << 20
WHOLE = 1e-3  # of a sample: durations are decimal numbers, and their products with a rate are not exact


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
        keep: hidden states to store as well.
    """

    timestamps: bool = False
    storage: Storage = "float32"
    window: float | None = None
    max_duration: float = MAX_SECONDS
    shard_hours: float = 1.0
    batch_seconds: float | None = None
    format: str = DEFAULT
    keep: Keep | None = None

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
    lengths, problems, versions = _lengths(clips, model.sample_rate, longest)
    shortest = model.shortest(frames=settings.timestamps, scenes=True)
    if settings.window is not None:
        clips, lengths, taken = _cut(model, clips, lengths, settings.window, shortest / model.sample_rate)
        versions = versions[taken]
        if problems:
            problems = {i: problems[row] for i, row in enumerate(taken.tolist()) if row in problems}
    for i in np.flatnonzero(lengths < shortest).tolist():
        problems.setdefault(i, too_short(model, int(lengths[i]), shortest))
    lengths[list(problems)] = 0
    numbers = np.full(len(lengths), model.scene_embedding_size, np.int64)
    if settings.timestamps:
        numbers += model.timestamp_embedding_size * _frames(model, lengths)
    if settings.keep is not None:
        numbers += States.of_model(model, settings.keep).numbers(lengths, model.sample_rate)
    limits = ShardLimits(SHARD_CLIPS, int(settings.shard_hours * 3600 * model.sample_rate), SHARD_BYTES)
    size = np.dtype(settings.storage).itemsize
    batch_samples = int(batch_seconds(model, settings) * model.sample_rate)
    plan = make_plan(lengths, size * numbers, batch_samples, limits, model.least, units(clips["path"]))
    # Parts, as no Arrow array of strings exceeds 2 GB.
    parts = [
        clips.take(pa.array(part)) for part in np.split(plan.order, range(ROWS_AT_ONCE, len(plan.order), ROWS_AT_ONCE))
    ]
    table = pa.concat_tables(parts)
    found = np.full(len(plan.order), None)
    found[list(problems)] = list(problems.values())
    columns = _columns(plan, first_shard) | {"problem": pa.array(found[plan.order], pa.string())}
    etags = pa.array(versions[plan.order], pa.string())
    if etags.null_count < len(etags):
        columns["etag"] = etags
    if taken_names := [name for name in COLUMNS if name in table.column_names]:
        raise InputError(f"expected a manifest without the column {taken_names[0]}, which the plan has: rename it")
    for name, column in columns.items():
        table = table.append_column(name, column)
    return as_read(table)


def _lengths(clips: "pa.Table", sample_rate: int, longest: float) -> tuple[np.ndarray, dict[int, str], np.ndarray]:
    """The lengths of clips in samples, [n]; why those of length 0 cannot be read; and the versions of files, [n].

    Where a clip's duration is known, nothing is opened: what its file lacks is found when it is decoded.
    """
    import pyarrow as pa

    durations = clips["duration"].to_numpy()  # null: NaN
    lengths = np.zeros(len(clips), np.int64)
    problems: dict[int, str] = {}
    known = np.isfinite(durations)
    exact = durations[known] * sample_rate
    whole = np.round(exact)
    # A sample more, as resampling may round up.
    lengths[known] = np.where(np.abs(exact - whole) < WHOLE, whole, np.ceil(exact) + 1)
    for i in np.flatnonzero(durations > longest).tolist():
        problems[i] = too_long(durations[i], longest)
    unknown = np.flatnonzero(~known)
    rows = clips.select(["path", "offset", "duration"]).take(pa.array(unknown)) if len(unknown) else clips.slice(0, 0)
    versions = np.full(len(clips), None)
    probed = probe([Clip(*row) for row in clip_rows(rows)], sample_rate, longest)
    for i, found in zip(unknown.tolist(), probed, strict=True):
        lengths[i], versions[i] = found.samples, found.version
        if found.problem is not None:
            problems[i] = found.problem
    return lengths, problems, versions


def _frames(model: Model, lengths: np.ndarray) -> np.ndarray:
    """The numbers of frames of clips, [n]."""
    distinct, inverse = np.unique(lengths, return_inverse=True)
    return np.array([model.num_frames(int(n)) if n else 0 for n in distinct], np.int64)[inverse]


def frame_columns(model: Model, samples: Sequence[int], counts: Sequence[int]) -> dict[str, "pa.Array"]:
    """Return the columns of a shard's metadata that say where its frames are: see :mod:`gura_jax.dataset.commit`.

    Args:
        model: whose frames they are.
        samples: of each clip.
        counts: of its frames.
    """
    import pyarrow as pa

    times = [model.timestamps(n) for n in samples]
    hops = [float(t[-1] - t[0]) / max(1, len(t) - 1) for t in times]
    columns = (
        pa.array(counts, pa.int64()),
        pa.array(np.cumsum([0, *counts])[:-1], pa.int64()),
        pa.array([float(t[0]) for t in times], pa.float64()),
        pa.array(hops, pa.float64()),
    )
    return dict(zip(FRAME_COLUMNS, columns, strict=True))


def clip_rows(clips: "pa.Table") -> Iterator[tuple[str, float, float | None, str | None]]:
    """Iterate over the fields of :class:`Clip` of a table of clips, or of a plan."""
    columns = [clips[name].to_pylist() for name in ("path", "offset", "duration")]
    versions = clips["etag"].to_pylist() if "etag" in clips.column_names else [None] * len(clips)
    return zip(*columns, versions, strict=True)


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


def windows(
    seconds: np.ndarray, window: float, shortest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut clips into windows.

    The last of a clip has the rest; if that is under ``shortest``, it is part of the window before.

    Args:
        seconds: [n], durations of the clips.
        window, shortest: in seconds.

    Returns:
        Of each window: its number in its clip, the clip's index, and its start and duration in seconds.
    """
    counts = np.ceil((seconds - shortest) / window).astype(np.int64)
    counts = np.where(seconds <= window, 1, np.maximum(1, counts))
    clip = np.repeat(np.arange(len(seconds)), counts)
    number = np.arange(len(clip)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * window
    return number, clip, start, np.where(number == counts[clip] - 1, seconds[clip] - start, window)


def _cut(
    model: Model, clips: "pa.Table", lengths: np.ndarray, window: float, shortest: float
) -> tuple["pa.Table", np.ndarray, np.ndarray]:
    """Replace longer clips by windows: of id ``ID#NUMBER``, with the clip's id in the column ``source``.

    Returns:
        The windows, their lengths in samples, and the rows that they were.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if "source" in clips.column_names:
        raise InputError("expected a manifest without the column source, which --window writes: rename it")
    rate = model.sample_rate
    number, taken, start, length = windows(lengths / rate, window, shortest)
    cut = np.bincount(taken)[taken] > 1
    # A sample more, as resampling may round up; the last window goes to the clip's own end.
    samples = np.where(cut, np.ceil(length * rate).astype(np.int64) + 1, lengths[taken])
    table = clips.take(pa.array(taken))
    names, durations = table["id"], table["duration"].to_numpy()
    last = np.append(np.diff(taken) > 0, True)
    durations = np.where(~cut | (last & np.isnan(durations)), durations, length)
    c: Any = pc
    ids = c.if_else(pa.array(cut), c.binary_join_element_wise(names, pa.array(number).cast(pa.string()), "#"), names)
    if c.count_distinct(ids).as_py() < len(ids):
        twice = next(name for name, count in collections.Counter(ids.to_pylist()).items() if count > 1)
        raise InputError(f"expected ids that differ also in windows, found {twice!r} twice: rename a clip")
    table = table.append_column("source", names)
    for name, values in (
        ("id", ids),
        ("offset", pa.array(table["offset"].to_numpy() + start)),
        ("duration", pa.array(durations, pa.float64(), mask=np.isnan(durations))),
    ):
        table = table.set_column(table.column_names.index(name), name, values)
    return table, samples, taken


def _columns(plan: Plan, first_shard: int) -> dict[str, "pa.Array"]:
    import pyarrow as pa

    start, stop, rows, samples = plan.table.T
    sizes, unread = stop - start, len(plan.order) - int((stop - start).sum())
    none = np.zeros(unread, np.int64)
    starts = plan.shard_starts
    arrays = {
        "samples": plan.lengths,
        "shard": first_shard + np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(plan.order)))),
        "batch": np.append(np.repeat(np.arange(len(sizes)), sizes), none - 1),
        "rows": np.append(np.repeat(rows, sizes), none),
        "padded": np.append(np.repeat(samples, sizes), none),
    }
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
        numbers += model.timestamp_embedding_size * int(_frames(model, samples[readable]).sum())
    if settings.keep is not None:
        numbers += int(States.of_model(model, settings.keep).numbers(samples[readable], model.sample_rate).sum())
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
