"""A run: a collection of clips into a store, shard by shard, and on from where it stopped.

Every process of a run, on whatever machine, opens it with the same arguments, finds or makes the same plan, and
computes shards of its own. Nothing is shared but the folder, so no process waits for another.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gura_jax import checkpoint
from gura_jax.audio import MAX_SECONDS, SAMPLE_RATE
from gura_jax.dataset import store
from gura_jax.dataset.decode import Clip, decode_ahead, probe, reason
from gura_jax.dataset.manifest import windows
from gura_jax.dataset.plan import Plan, ShardLimits, make_plan
from gura_jax.dataset.store import Failure, ShardRecord, Storage
from gura_jax.errors import AudioError, InputError, StoreError
from gura_jax.model import Model
from gura_jax.parallel import ACCELERATOR_LIMITS, LIMITS

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_CLIPS = 4096
SHARD_BYTES = 1 << 30  # held in memory, and that of the shard before while it is written
CHECK_THREADS = 8
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
_PLAN_COLUMNS = ("samples", "shard", "batch", "rows", "padded", "problem")


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
    """

    timestamps: bool = False
    storage: Storage = "float32"
    window: float | None = None
    max_duration: float = MAX_SECONDS
    shard_hours: float = 1.0
    batch_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "max_duration", "shard_hours", "batch_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name}: expected a number over 0, found {value!r}")
        if self.storage not in ("float32", "float16"):
            raise InputError(f"storage: expected float32 or float16, found {self.storage!r}")


class Done(NamedTuple):
    """What a batch added."""

    clips: int
    samples: int
    failed: int


Report = Callable[[Done], None]


def plan_table(model: Model, clips: "pa.Table", settings: Settings, *, first_shard: int = 0) -> "pa.Table":
    """Plan a run: the clips in the order of the store, with their shard, batch and padded length.

    Args:
        model: for the sizes of what it makes.
        clips: as from :func:`gura_jax.dataset.manifest.read_inputs`.
        settings: of the run.
        first_shard: its number.

    Returns:
        The columns of ``clips``, and ``samples`` (0: cannot be read, for the reason in ``problem``), ``shard``,
        ``batch`` (-1: in none), ``rows`` and ``padded``, those of the batch.
    """
    import pyarrow as pa

    # With windows a long file is no reason to refuse it.
    longest = float("inf") if settings.window else settings.max_duration
    found = probe([Clip(*row) for row in _where(clips)], longest)
    shortest = model.min_scene_samples
    if settings.window is not None:
        clips, found = _cut(clips, found, settings.window, shortest)
    for i, samples in enumerate(found):
        if isinstance(samples, int) and samples < shortest:
            found[i] = too_short(model, samples)
    lengths = np.array([samples if isinstance(samples, int) else 0 for samples in found], np.int64)
    numbers = model.scene_embedding_size + np.zeros(len(lengths), np.int64)
    if settings.timestamps:
        numbers += model.timestamp_embedding_size * np.array([model.num_frames(int(n)) if n else 0 for n in lengths])
    limits = ShardLimits(SHARD_CLIPS, int(settings.shard_hours * 3600 * SAMPLE_RATE), SHARD_BYTES)
    size = np.dtype(settings.storage).itemsize
    plan = make_plan(lengths, size * numbers, int(batch_seconds(model, settings) * SAMPLE_RATE), limits)
    table = clips.take(pa.array(plan.order))
    problems = [samples if isinstance(samples, str) else None for samples in found]
    columns = _columns(plan, first_shard) | {"problem": pa.array([problems[i] for i in plan.order], pa.string())}
    for name in _PLAN_COLUMNS:
        if name in table.column_names:
            raise InputError(f"expected a manifest without the column {name}, which the plan has: rename it")
        table = table.append_column(name, columns[name])
    return table


def _where(clips: "pa.Table") -> Iterator[tuple[str, float, float | None]]:
    return zip(*(clips[name].to_pylist() for name in ("path", "offset", "duration")), strict=True)


def too_short(model: Model, samples: int) -> str:
    """Why a clip is refused."""
    return f"expected at least {model.min_scene_samples} samples at 16 kHz for {model.system.name}, found {samples}"


def batch_seconds(model: Model, settings: Settings) -> float:
    """Audio computed at once, on all devices together."""
    if settings.batch_seconds is not None:
        return settings.batch_seconds
    backend = jax.default_backend()
    if backend in LIMITS:
        return LIMITS[backend].batch / SAMPLE_RATE
    return ACCELERATOR_LIMITS.batch / SAMPLE_RATE * model.compilation.mesh.size


def _cut(clips: "pa.Table", found: list[int | str], window: float, shortest: int) -> tuple["pa.Table", list[int | str]]:
    """Windows in the place of longer clips: of id ``ID#NUMBER``, and the column ``source`` has the clip's id."""
    import pyarrow as pa

    if "source" in clips.column_names:
        raise InputError("expected a manifest without the column source, which --window writes: rename it")
    keep: list[int] = []
    lengths: list[int | str] = []
    ids, offsets, durations = [], [], []
    names = clips["id"].to_pylist()
    for i, ((_, offset, duration), samples) in enumerate(zip(_where(clips), found, strict=True)):
        if isinstance(samples, str) or samples <= window * SAMPLE_RATE:
            cuts: list[tuple[str, float, float | None, int | str]] = [(names[i], offset, duration, samples)]
        else:
            spans = list(windows(offset, samples / SAMPLE_RATE, window, shortest / SAMPLE_RATE))
            # A sample more, for what resampling may round up to; the last goes to the clip's own end.
            cuts = [
                (f"{names[i]}#{n}", start, length, int(np.ceil(length * SAMPLE_RATE)) + 1)
                for n, (start, length) in enumerate(spans)
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
    """What a plan amounts to; ``--dry-run`` prints it."""

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
        hours=float(samples.sum() / SAMPLE_RATE / 3600),
        buckets=tuple(float(x) / SAMPLE_RATE for x in np.unique(padded[readable])),
        batches=len(first),
        padding=1 - int(samples.sum()) / computed if computed else 0.0,
        shards=len(np.unique(shard)),
        bytes=numbers * np.dtype(settings.storage).itemsize,
    )


def open_run(
    model: Model,
    clips: "pa.Table",
    folder: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> "Run":
    """Open a run: begin it, or go on with it where the folder has it already.

    Args:
        model: the system.
        clips: as from :func:`gura_jax.dataset.manifest.read_inputs`.
        folder: of the store.
        settings: of the run.
        overwrite: delete the store that is there, and begin.
        retry_failed: plan the clips that failed once more, in shards of their own.

    Raises:
        StoreError: the folder cannot be written, or holds another run: the message names what differs.
        InputError: columns that are the plan's.
    """
    store.open_folder(folder)
    with store.locked(folder):
        description = _description(model, clips, settings)
        run = None
        if overwrite:
            store.remove_store(folder)
        else:
            run = store.read_run(folder)
        if run is None:
            there = sorted(p.name for p in folder.iterdir() if store.STORE_FILE.fullmatch(p.name))
            there = [name for name in there if not name.startswith("plan-")]  # killed before it began
            if there:
                raise StoreError(
                    f"{folder}: expected a folder without embeddings, or with a {store.RUN_FILE} to go on with, found "
                    f"{there[0]}: {store.ELSEWHERE}"
                )
            table = plan_table(model, clips, settings)
            _write_plan(folder, 0, table)
            run = description | _totals(table)
            run["fingerprint"] = _fingerprint(run)
            store.write_json(folder, store.RUN_FILE, run)
            tables = [table]
        else:
            _check_same(folder, run, description)
            tables = _read_plans(model, folder, run, clips, settings)
        if retry_failed:
            names = {failure.id for failure in store.failures(folder, store.shard_numbers(folder))}
            if names:
                tables.append(_plan_again(model, folder, tables, names, settings))
    return Run(model, folder, settings, run["fingerprint"], tables)


def _plan_again(
    model: Model, folder: Path, tables: list["pa.Table"], names: set[str], settings: Settings
) -> "pa.Table":
    """A plan of the clips that failed, after those that there are."""
    import pyarrow as pa

    columns = [name for name in tables[0].column_names if name not in _PLAN_COLUMNS]
    all_clips = tables[0].select(columns)
    chosen = [i for i, name in enumerate(all_clips["id"].to_pylist()) if name in names]
    settings = dataclasses.replace(settings, window=None)  # these are windows by now
    first = 1 + max(int(table["shard"].to_numpy().max()) for table in tables)
    table = plan_table(model, all_clips.take(pa.array(chosen, pa.int64())), settings, first_shard=first)
    _write_plan(folder, len(tables), table)
    return table


def _write_plan(folder: Path, number: int, table: "pa.Table") -> None:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    store.write_file(folder, f"plan-{number:05d}.parquet", sink.getvalue().to_pybytes())


def _read_plans(
    model: Model, folder: Path, run: dict[str, Any], clips: "pa.Table", settings: Settings
) -> list["pa.Table"]:
    """The plans in a folder. The first is made again where it is damaged: it depends on the inputs alone."""
    import pyarrow as pa

    tables: list[pa.Table] = []
    for path in sorted(folder.glob("plan-*.parquet")) or [folder / "plan-00000.parquet"]:
        try:
            tables.append(store.read_parquet(path))
        except (pa.ArrowException, OSError):
            if tables:
                raise StoreError(
                    f"{path}: expected the plan of clips tried again, found a damaged file: remove it"
                ) from None
            tables.append(plan_table(model, clips, settings))
            _write_plan(folder, 0, tables[0])
    if table_sha256(tables[0]) != run["plan_sha256"]:
        raise StoreError(f"{folder}: expected the plan that the run began with, found another: {store.ELSEWHERE}")
    return tables


def table_sha256(table: "pa.Table") -> str:
    """Hash of a table's columns, types and values, whatever wrote it."""
    digest = hashlib.sha256(str([(field.name, str(field.type)) for field in table.schema]).encode())
    for batch in table.to_batches(max_chunksize=4096):
        digest.update(json.dumps(batch.to_pylist(), default=str).encode())
    return digest.hexdigest()


def _totals(table: "pa.Table") -> dict[str, Any]:
    samples = table["samples"].to_numpy()
    return {
        "plan_sha256": table_sha256(table),
        "clips": len(table),
        "shards": len(np.unique(table["shard"].to_numpy())),
        "seconds": float(samples.sum() / SAMPLE_RATE),
    }


# What a run is: two that differ in any of these are different runs.
_IDENTITY = (
    "system", "random_weights", "dtype", "precision", "resampler", "sample_rate", "storage", "scene_embedding_size",
    "timestamp_embedding_size", "window", "max_duration", "shard_hours", "batch_seconds", "code_version",
    "inputs_sha256", "plan_sha256",
)  # fmt: skip


def _fingerprint(run: dict[str, Any]) -> str:
    content = {name: run[name] for name in _IDENTITY}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _description(model: Model, clips: "pa.Table", settings: Settings) -> dict[str, Any]:
    system = model.system
    members = []
    for member, fused in zip(system.members, model.fusion.members, strict=True):
        config = getattr(fused.encoder, "config", None)
        weights = dict(model.weights[member.name])
        if not isinstance(member.encoder, str):
            weights["fingerprint"] = _params_sha256(model.params[member.name])
        members.append(
            {
                "name": member.name,
                "encoder": member.encoder if isinstance(member.encoder, str) else type(member.encoder).__qualname__,
                "layers": json.loads(json.dumps(member.layers)),
                "architecture": json.loads(json.dumps(dataclasses.asdict(config))) if config is not None else None,
                "weights": weights,
            }
        )
    return {
        "system": {
            "name": system.name,
            "members": members,
            "combination": system.combination,
            "feature_size": system.feature_size,
            "scene_groups": system.scene_groups,
        },
        "random_weights": model.random_members,
        "dtype": model.dtype,
        "precision": model.compilation.precision,
        "resampler": f"soxr HQ {version('soxr')}",
        "sample_rate": SAMPLE_RATE,
        "storage": settings.storage,
        "scene_embedding_size": model.scene_embedding_size,
        "timestamp_embedding_size": model.timestamp_embedding_size if settings.timestamps else None,
        "window": settings.window,
        "max_duration": settings.max_duration,
        "shard_hours": settings.shard_hours,
        "batch_seconds": batch_seconds(model, settings),
        "code_version": version("gura-jax"),
        "inputs_sha256": table_sha256(clips),
        "versions": {name: version(name) for name in ("jax", "flax", "soundfile")},
    }


def _params_sha256(params: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    hashes = {jax.tree_util.keystr(path): checkpoint.array_sha256(np.asarray(leaf)) for path, leaf in leaves}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _check_same(folder: Path, run: dict[str, Any], description: dict[str, Any]) -> None:
    """Refuse to go on with another run, and say what differs."""
    then, now = _flat({k: run.get(k) for k in _IDENTITY}), _flat({k: description.get(k) for k in _IDENTITY})
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    names = [name for name in names if name != "plan_sha256"]
    if names:
        differences = "\n".join(f"    {name}: {then.get(name)} then, {now.get(name)} now" for name in names)
        raise StoreError(
            f"{folder}: expected the run that began here, found another:\n{differences}\n"
            f"go on with the same inputs and options, {store.ELSEWHERE}"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        items = ((x.get("name", i) if isinstance(x, dict) else i, x) for i, x in enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, x in items for k, v in _flat(x, f"{prefix}.{key}" if prefix else str(key)).items()}


class Run:
    """A run that is open: what there is to do, and the doing.

    Attributes:
        model, folder, settings: as given.
        fingerprint: of the run; each of its shards has it.
    """

    def __init__(
        self, model: Model, folder: Path, settings: Settings, fingerprint: str, tables: Sequence["pa.Table"]
    ) -> None:
        self.model, self.folder, self.settings, self.fingerprint = model, folder, settings, fingerprint
        self._shards: dict[int, pa.Table] = {}
        for table in tables:
            column = table["shard"].to_numpy()
            numbers, starts = np.unique(column, return_index=True)  # shards follow each other
            for number, start, stop in zip(numbers, starts, [*starts[1:], len(column)], strict=True):
                self._shards[int(number)] = table.slice(int(start), int(stop - start))

    @property
    def shards(self) -> list[int]:
        """All shards of the run."""
        return sorted(self._shards)

    def size(self, number: int) -> Done:
        """Clips and samples of a shard, as planned."""
        table = self._shards[number]
        samples = table["samples"].to_numpy()
        return Done(len(table), int(samples.sum()), int((samples == 0).sum()))

    def pending(self, numbers: Sequence[int] | None = None) -> list[int]:
        """The shards that are still to do; what is damaged is set aside.

        Every byte of the finished ones is read and compared with its checksum.

        Raises:
            StoreError: a damaged shard cannot be moved.
        """
        numbers = self.shards if numbers is None else numbers
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            check = functools.partial(store.check_shard, self.folder, run=self.fingerprint)
            records = list(threads.map(check, numbers))
        pending = [number for number, record in zip(numbers, records, strict=True) if record is None]
        for number in pending:
            with store.locked(self.folder):
                # Meanwhile another process may have finished it.
                if store.check_shard(self.folder, number, self.fingerprint) is None:
                    store.set_aside(self.folder, number)
        return pending

    def embed_shards(self, numbers: Iterable[int], report: Report = lambda done: None) -> Iterator[ShardRecord]:
        """Embed shards, in the order given, and write each when it is complete.

        The next batches are decoded while one computes, and a shard is written while the next computes.

        Args:
            numbers: of the shards; asked for as they are needed.
            report: called for each batch.

        Yields:
            What was written, once it is safe.

        Raises:
            StoreError: a shard cannot be written. Those before it are complete.
        """
        ahead: collections.deque[tuple[int, _Batch]] = collections.deque()

        def clips() -> Iterator[list[Clip]]:
            for number in numbers:
                for batch in self._batches(number):
                    ahead.append((number, batch))
                    yield batch.clips

        # On a CPU the batch at hand has all cores: another one in flight would but take memory.
        in_flight = 0 if jax.default_backend() == "cpu" else 1
        decoded = decode_ahead(clips(), self.settings.max_duration)
        computations = (_Computation(self, *ahead.popleft(), audio) for audio in decoded)
        shard: _Shard | None = None
        writing: Future[ShardRecord] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer, contextlib.closing(decoded):
            for computation in _started_ahead(computations, in_flight):
                shard = shard or _Shard(self, computation.number)
                report(computation.collect(shard))
                if computation.batch.last:
                    if writing is not None:
                        yield writing.result()
                    writing, shard = writer.submit(shard.write), None
            if writing is not None:
                yield writing.result()

    def _batches(self, number: int) -> Iterator["_Batch"]:
        """A shard's batches in order; the last is empty where clips cannot be read."""
        table = self._shards[number]
        batch, rows, padded = (table[name].to_numpy() for name in ("batch", "rows", "padded"))
        clips = [Clip(*row) for row in _where(table)]
        numbers, starts = np.unique(np.where(batch < 0, np.iinfo(np.int64).max, batch), return_index=True)
        stops = [*(int(x) for x in starts[1:]), len(clips)]
        for i, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True)):
            readable = batch[start] >= 0
            yield _Batch(
                start,
                stop,
                clips[start:stop] if readable else [],
                int(rows[start]),
                int(padded[start]),
                last=i == len(numbers) - 1,
            )


def _started_ahead(computations: Iterator["_Computation"], ahead: int) -> Iterator["_Computation"]:
    """Computations in order, each when so many after it have been started."""
    started: collections.deque[_Computation] = collections.deque()
    for computation in computations:
        started.append(computation)
        if len(started) > ahead:
            yield started.popleft()
    yield from started


class _Batch(NamedTuple):
    """Rows ``start`` to ``stop`` of a shard, with their clips (none: they cannot be read)."""

    start: int
    stop: int
    clips: list[Clip]
    rows: int
    samples: int
    last: bool


class _Computation:
    """A batch on the devices."""

    def __init__(self, run: Run, number: int, batch: "_Batch", clips: list[np.ndarray | AudioError]) -> None:
        self.run, self.number, self.batch, self.clips = run, number, batch, clips
        shortest = run.model.min_scene_samples
        self.audio = np.zeros((batch.rows, batch.samples), np.float32)
        self.lengths = np.full(batch.rows, batch.samples, np.int32)  # rows without a clip hold silence
        self.long: list[int] = []  # clips longer than their headers said
        for row, clip in enumerate(clips):
            if isinstance(clip, AudioError):
                continue
            if len(clip) < shortest:
                clips[row] = AudioError(too_short(run.model, len(clip)))
            elif len(clip) > batch.samples:
                self.long.append(row)
            else:
                self.audio[row, : len(clip)] = clip
                self.lengths[row] = len(clip)
        self.out: Any = None
        if len(self.long) < len(clips) and not all(isinstance(clip, AudioError) for clip in clips):
            try:
                self.out = self._dispatch(self.audio, self.lengths)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise

    def _dispatch(self, audio: np.ndarray, lengths: np.ndarray) -> Any:
        return self.run.model(audio, lengths, frames=self.run.settings.timestamps, scenes=True)

    def collect(self, shard: "_Shard") -> Done:
        """Wait for the results, and put them into the shard."""
        rows = [row for row, clip in enumerate(self.clips) if not isinstance(clip, AudioError)]
        together = [row for row in rows if row not in self.long]
        results: dict[int, _Result | AudioError] = dict(
            zip(together, self._results(self.out, self.audio, self.lengths, together), strict=True)
        )
        for row in self.long:
            clip = self.clips[row]
            assert isinstance(clip, np.ndarray)
            results[row] = self._results(None, clip[None], np.array([len(clip)], np.int32), [0])[0]
        samples = failed = 0
        for row in range(self.batch.stop - self.batch.start):
            if not self.clips:
                shard.fail(self.batch.start + row, None)
                failed += 1
                continue
            clip = self.clips[row]
            result = clip if isinstance(clip, AudioError) else results[row]
            if isinstance(result, AudioError):
                shard.fail(self.batch.start + row, result)
                failed += 1
            else:
                assert isinstance(clip, np.ndarray)
                shard.add(self.batch.start + row, len(clip), result)
                samples += len(clip)
        return Done(self.batch.stop - self.batch.start - failed, samples, failed)

    def _results(
        self, out: Any, audio: np.ndarray, lengths: np.ndarray, rows: list[int]
    ) -> list["_Result | AudioError"]:
        """What was computed of some rows; where memory did not suffice, of halves of the batch."""
        if not rows:
            return []
        try:
            out = jax.device_get(out if out is not None else self._dispatch(audio, lengths))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(audio) == 1:
                message = f"the devices have no memory for a clip of {lengths[0] / SAMPLE_RATE:.1f} s: see --window"
                return [AudioError(message)]
            half = len(audio) // 2
            first = self._results(None, audio[:half], lengths[:half], [row for row in rows if row < half])
            second = self._results(None, audio[half:], lengths[half:], [row - half for row in rows if row >= half])
            return first + second
        storage = self.run.settings.storage
        results: list[_Result | AudioError] = []
        for row in rows:
            scene = out.scenes[row].astype(storage)
            frames = out.frames[row, : out.counts[row]].astype(storage) if self.run.settings.timestamps else None
            finite = np.isfinite(scene).all() and (frames is None or np.isfinite(frames).all())
            wrong = f"its embedding has values that are not finite in {storage}"
            results.append(_Result(scene, frames) if finite else AudioError(wrong))
        return results


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says that a device, or its host, has no memory left."""
    return any(words in str(error) for words in _OUT_OF_MEMORY)


class _Result(NamedTuple):
    """What is stored of a clip; copies, as a view would keep its whole batch."""

    scene: np.ndarray  # [S]
    frames: np.ndarray | None  # [T, D]


class _Shard:
    """A shard that is being filled."""

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.number = run, number
        self.table = run._shards[number]
        self.rows: list[int] = []
        self.lengths: list[int] = []
        self.results: list[_Result] = []
        self.failed: list[Failure] = []

    def add(self, row: int, samples: int, result: _Result) -> None:
        self.rows.append(row)
        self.lengths.append(samples)
        self.results.append(result)

    def fail(self, row: int, error: AudioError | None) -> None:
        """A clip has no embedding: for this reason, or for that which the plan found."""
        name, path, problem = (self.table[column][row].as_py() for column in ("id", "path", "problem"))
        self.failed.append(Failure(name, path, problem if error is None else reason(error, path)))

    def write(self) -> ShardRecord:
        model, settings = self.run.model, self.run.settings
        scenes = np.zeros((len(self.rows), model.scene_embedding_size), settings.storage)
        for i, result in enumerate(self.results):
            scenes[i] = result.scene
        frames = [result.frames for result in self.results if result.frames is not None]
        if settings.timestamps and not frames:
            frames = [np.zeros((0, model.timestamp_embedding_size), settings.storage)]
        return store.write_shard(
            self.run.folder,
            self.number,
            run=self.run.fingerprint,
            scenes=scenes,
            frames=frames if settings.timestamps else None,
            meta=self._meta(),
            failed=self.failed,
        )

    def _meta(self) -> "pa.Table":
        import pyarrow as pa

        table = self.table.take(pa.array(self.rows, pa.int64()))
        columns: dict[str, Any] = {
            "id": table["id"],
            "path": table["path"],
            "offset": table["offset"],
            "duration": pa.array([n / SAMPLE_RATE for n in self.lengths], pa.float64()),
            "num_samples": pa.array(self.lengths, pa.int64()),
        }
        if self.run.settings.timestamps:
            counts = [len(result.frames) for result in self.results if result.frames is not None]
            times = [self.run.model.timestamps(n) for n in self.lengths]
            hops = [float(t[-1] - t[0]) / max(1, len(t) - 1) for t in times]
            columns |= {
                "num_frames": pa.array(counts, pa.int64()),
                "frame_start": pa.array(np.cumsum([0, *counts])[:-1], pa.int64()),
                "frame_offset_ms": pa.array([float(t[0]) for t in times], pa.float64()),
                "frame_hop_ms": pa.array(hops, pa.float64()),
            }
        further = [name for name in table.column_names if name not in columns and name not in _PLAN_COLUMNS]
        return pa.table(columns | {name: table[name] for name in further})
