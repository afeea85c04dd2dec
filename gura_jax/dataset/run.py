"""A run: embed a collection of clips into a store, shard by shard, and resume where it stopped.

Every process of a run, on whatever machine, opens it with the same arguments, finds or makes the same plan, and
computes shards of its own. Nothing is shared but the folder, so no process waits for another.
"""

import collections
import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gura_jax.batching import Padded
from gura_jax.dataset import commit
from gura_jax.dataset.columns import STATE_COLUMNS, STATE_FRAMES
from gura_jax.dataset.commit import Failure, Location, ShardRecord
from gura_jax.dataset.decode import Clip, decode_ahead, reason
from gura_jax.dataset.identity import check_same, describe, describe_plan, fingerprint, table_sha256
from gura_jax.dataset.places import Place, find_place
from gura_jax.dataset.plan import COLUMNS
from gura_jax.dataset.sinks import SINKS, Shard
from gura_jax.dataset.sources import Inputs
from gura_jax.dataset.states import States
from gura_jax.dataset.table import Settings, clip_rows, frame_columns, plan_table, too_short
from gura_jax.errors import AudioError, StoreError
from gura_jax.files import json_bytes
from gura_jax.model import Model

if TYPE_CHECKING:
    import pyarrow as pa

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


class Done(NamedTuple):
    """Progress by a batch: clips embedded and their samples at the model's rate, and clips that failed."""

    clips: int
    samples: int
    failed: int


Report = Callable[[Done], None]


def open_run(
    model: Model,
    clips: "pa.Table | Inputs",
    folder: Location,
    settings: Settings,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> "Run":
    """Open a run: begin it, or resume it if the folder holds it already.

    Args:
        model: the system.
        clips: as from :func:`gura_jax.dataset.sources.read_inputs`, or what this would read: a run that goes on does so
            without it where :attr:`Inputs.signature` is as it was.
        folder: of the store, or the URL of a bucket's prefix.
        settings: of the run.
        overwrite: delete the store in the folder first.
        retry_failed: plan the clips that failed once more, in shards of their own.

    Raises:
        StoreError: the folder cannot be written, or holds another run: the message names what differs.
        InputError: ``clips`` has a column that the plan has.
    """
    place = find_place(folder)
    place.prepare()
    with place.locked():
        if overwrite:
            commit.remove_store(place)
        run = None if overwrite else commit.read_run(place)
        signature = clips.signature if isinstance(clips, Inputs) else None
        if run is not None and signature is not None and run.get("inputs_signature") == signature:
            inputs = run["inputs_sha256"]
        else:
            inputs = table_sha256(_table(clips))
        description = describe(model, inputs, settings)
        tables = None
        if run is None:
            commit.check_free(place)
            table = plan_table(model, _table(clips), settings)
            run = description | describe_plan(table, model.sample_rate)
            run["fingerprint"] = fingerprint(run)
            if signature is not None:
                run["inputs_signature"] = signature
            if place.create(commit.RUN_FILE, json_bytes(run)):
                _write_plan(place, 0, table)
                tables = [table]
            else:
                run = commit.read_run(place) or run
        if tables is None:
            check_same(place, run, description)
            tables = _read_plans(model, place, run, clips, settings)
        if retry_failed:
            names = {failure.id for failure in commit.failures(place, commit.shard_numbers(place))}
            if names:
                tables.append(_plan_again(model, place, tables, names, settings))
    return Run(model, place, settings, run["fingerprint"], tables)


def _table(clips: "pa.Table | Inputs") -> "pa.Table":
    return clips.table if isinstance(clips, Inputs) else clips


def _plan_again(
    model: Model, place: Place, tables: list["pa.Table"], names: set[str], settings: Settings
) -> "pa.Table":
    """Plan the clips that failed once more, in shards after all others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [name for name in tables[0].column_names if name not in COLUMNS]
    all_clips = tables[0].select(columns)
    chosen = pc.is_in(all_clips["id"], pa.array(sorted(names)))  # pyright: ignore[reportAttributeAccessIssue]
    settings = dataclasses.replace(settings, window=None)  # the clips are windows already
    first = 1 + max(int(table["shard"].to_numpy().max()) for table in tables)
    table = plan_table(model, all_clips.filter(chosen), settings, first_shard=first)
    _write_plan(place, len(tables), table)
    return table


def _write_plan(place: Place, number: int, table: "pa.Table") -> None:
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    place.write(f"plan-{number:05d}.parquet", sink.getvalue().to_pybytes())


def _read_plans(
    model: Model, place: Place, run: dict[str, Any], clips: "pa.Table | Inputs", settings: Settings
) -> list["pa.Table"]:
    """Read the plans in a folder. If the first is damaged, it is made again: it depends on the inputs alone."""
    import pyarrow as pa
    from pyarrow import parquet

    tables: list[pa.Table] = []
    for name in sorted(filter(commit.PLAN.fullmatch, place.sizes())) or ["plan-00000.parquet"]:
        try:
            with place.open(name) as file:
                tables.append(parquet.read_table(io.BytesIO(file.read())))
        except (pa.ArrowException, OSError):
            if tables:
                raise StoreError(
                    f"{place / name}: expected the plan of clips tried again, found a damaged file: remove it"
                ) from None
            tables.append(plan_table(model, _table(clips), settings))
            _write_plan(place, 0, tables[0])
    if table_sha256(tables[0]) != run["plan_sha256"]:
        raise StoreError(f"{place}: expected the plan that the run began with, found another: {commit.ELSEWHERE}")
    return tables


class Run:
    """An open run: its shards, and the way to embed them.

    Attributes:
        model, settings: as given.
        place: where the store is.
        fingerprint: of the run; each of its shards has it.
        states: what it keeps of hidden states, if any.
    """

    def __init__(
        self, model: Model, place: Place, settings: Settings, fingerprint: str, tables: Sequence["pa.Table"]
    ) -> None:
        self.model, self.place, self.settings, self.fingerprint = model, place, settings, fingerprint
        self.states = None if settings.keep is None else States.of_model(model, settings.keep)
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
        """Return clips and samples of a shard, as planned."""
        table = self._shards[number]
        samples = table["samples"].to_numpy()
        return Done(len(table), int(samples.sum()), int((samples == 0).sum()))

    def pending(self, numbers: Sequence[int] | None = None, *, verify: bool = False) -> list[int]:
        """Return the shards that are still to do, and move damaged ones aside.

        Args:
            numbers: of the shards in question; by default all.
            verify: read every byte of the finished ones and compare it with its checksum, not their sizes alone.

        Raises:
            StoreError: a damaged shard cannot be moved.
        """
        return commit.find_pending(
            self.place, self.fingerprint, self.shards if numbers is None else numbers, verify=verify
        )

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

        decoded = decode_ahead(clips(), self.model.sample_rate, self.settings.max_duration)
        computations = (_Computation(self, *ahead.popleft(), audio) for audio in decoded)
        shard: _Shard | None = None
        writing: Future[ShardRecord] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer, contextlib.closing(decoded):
            for computation in _started_ahead(computations, self.model.platform.batches_in_flight):
                shard = shard or _Shard(self, computation.number)
                report(computation.collect(shard))
                if computation.batch.last:
                    if writing is not None:
                        yield writing.result()
                    writing, shard = writer.submit(shard.write), None
            if writing is not None:
                yield writing.result()

    def _batches(self, number: int) -> Iterator["_Batch"]:
        """Iterate over a shard's batches in order. Rows that cannot be read come last, as a batch without clips."""
        table = self._shards[number]
        batch, rows, padded = (table[name].to_numpy() for name in ("batch", "rows", "padded"))
        clips = [Clip(*row) for row in clip_rows(table)]
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
    """Iterate over computations in order, each as soon as ``ahead`` more have been started."""
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
        self.long: list[int] = []  # clips longer than their headers said: each is computed by itself
        rows: list[np.ndarray | None] = [None] * len(clips)
        shortest = run.model.shortest(frames=run.settings.timestamps, scenes=True)
        for row, clip in enumerate(clips):
            if isinstance(clip, AudioError):
                continue
            if len(clip) < shortest:
                clips[row] = AudioError(too_short(run.model, len(clip), shortest))
            elif len(clip) > batch.samples:
                self.long.append(row)
            else:
                rows[row] = clip
        self.together = [row for row, clip in enumerate(rows) if clip is not None]
        self.padded: Padded | None = None
        self.out: Any = None
        if self.together:
            self.padded = run.model.pad(rows, batch.rows, batch.samples)
            try:
                self.out = self._dispatch(self.padded)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise

    def _dispatch(self, padded: Padded) -> Any:
        settings = self.run.settings
        return self.run.model(*padded, frames=settings.timestamps, scenes=True, keep=settings.keep)

    def collect(self, shard: "_Shard") -> Done:
        """Wait for the results, and put them into the shard."""
        results: dict[int, _Result | AudioError] = {}
        if self.padded is not None:
            results |= zip(self.together, self._results(self.out, self.padded, self.together), strict=True)
        for row in self.long:
            clip = self.clips[row]
            assert isinstance(clip, np.ndarray)
            (results[row],) = self._results(None, self.run.model.pad([clip], 1, len(clip)), [0])
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

    def _results(self, out: Any, padded: Padded, rows: list[int]) -> list["_Result | AudioError"]:
        """Return the results of some rows; when memory does not suffice, halves of the batch are computed instead."""
        if not rows:
            return []
        try:
            out = jax.device_get(out if out is not None else self._dispatch(padded))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rate, lengths = next(iter(padded.lengths.items()))
            if len(lengths) == 1:
                message = f"the devices have no memory for a clip of {lengths[0] / rate:.1f} s: see --window"
                return [AudioError(message)]
            half = len(lengths) // 2
            first = self._results(None, _rows(padded, slice(half)), [row for row in rows if row < half])
            second = self._results(None, _rows(padded, slice(half, None)), [row - half for row in rows if row >= half])
            return first + second
        storage = self.run.settings.storage
        results: list[_Result | AudioError] = []
        for row in rows:
            scene = out.scenes[row].astype(storage)
            frames = out.frames[row, : out.counts[row]].astype(storage) if self.run.settings.timestamps else None
            states, counts = None, {}
            if self.run.states is not None:
                states, counts = self.run.states.pack(out.states, row)
                states = states.astype(storage)
            finite = all(np.isfinite(array).all() for array in (scene, frames, states) if array is not None)
            wrong = f"its embedding has values that are not finite in {storage}"
            results.append(_Result(scene, frames, states, counts) if finite else AudioError(wrong))
        return results


def _rows(padded: Padded, rows: slice) -> Padded:
    """Return some rows of a batch, at every rate."""
    return Padded(*({rate: array[rows] for rate, array in by_rate.items()} for by_rate in padded))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says that a device, or its host, has no memory left."""
    return any(words in str(error) for words in _OUT_OF_MEMORY)


class _Result(NamedTuple):
    """Embeddings of a clip as they are stored; copies, as a view would keep its whole batch in memory."""

    scene: np.ndarray  # [S]
    frames: np.ndarray | None  # [T, D]
    states: np.ndarray | None  # [numbers]
    state_frames: Mapping[str, int]  # of each member, where its frames are kept


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
        """Record that a clip has no embedding, because of this error or, if None, the problem that the plan found."""
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
        states = [result.states for result in self.results if result.states is not None]
        return commit.write_shard(
            self.run.place,
            self.number,
            run=self.run.fingerprint,
            shard=Shard(
                self._meta(),
                scenes,
                frames if settings.timestamps else None,
                states if settings.keep is not None else None,
            ),
            failed=self.failed,
            sink=SINKS[settings.format],
        )

    def _meta(self) -> "pa.Table":
        import pyarrow as pa

        table = self.table.take(pa.array(self.rows, pa.int64()))
        columns: dict[str, Any] = {
            "id": table["id"],
            "path": table["path"],
            "offset": table["offset"],
            "duration": pa.array([n / self.run.model.sample_rate for n in self.lengths], pa.float64()),
            "num_samples": pa.array(self.lengths, pa.int64()),
        }
        if self.run.settings.timestamps:
            counts = [len(result.frames) for result in self.results if result.frames is not None]
            columns |= frame_columns(self.run.model, self.lengths, counts)
        if self.run.states is not None:
            sizes = np.array([len(result.states) for result in self.results if result.states is not None], np.int64)
            places = np.cumsum([0, *sizes])[:-1], sizes
            columns |= {name: pa.array(x, pa.int64()) for name, x in zip(STATE_COLUMNS, places, strict=True)}
            for name in self.run.states.frames_of:
                counts = [result.state_frames[name] for result in self.results]
                columns[STATE_FRAMES + name] = pa.array(counts, pa.int64())
        further = [name for name in table.column_names if name not in columns and name not in COLUMNS]
        return pa.table(columns | {name: table[name] for name in further})
