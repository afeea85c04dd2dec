"""Stored embeddings, read clip by clip."""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from gura_jax.dataset.commit import (
    RECORD_THREADS,
    RUN_FILE,
    ShardRecord,
    data_file,
    read_run,
    read_shard,
    record_file,
    shard_numbers,
)
from gura_jax.dataset.places import Place, find_place
from gura_jax.dataset.sinks import Cells, Open, Rows, Shard
from gura_jax.dataset.states import States
from gura_jax.errors import StoreError
from gura_jax.objects import scheme

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa
    import pyarrow.compute as pc

    from gura_jax.dataset.search import Matches, Of
    from gura_jax.nearest import Metric

T = TypeVar("T")


class StoredClip(NamedTuple):
    """A clip of a store: its row of the metadata, its scene embedding, and with timestamps its frames and times."""

    meta: Mapping[str, Any]
    scene: np.ndarray  # [S]
    frames: np.ndarray | None  # [T, D]
    times: np.ndarray | None  # [T], milliseconds


class EmbeddingStore:
    """Embeddings that ``gura-jax embed`` wrote, read from their files as they are asked for.

    ``store["id"]`` is a clip, ``len(store)`` and iteration are over clips, ``store.filter(...)`` is a part.
    Shards that are not complete are left out, so a store can be read while it is written.

    Args:
        folder: the store, or the URL of a bucket's prefix (``s3://bucket/prefix``).

    Raises:
        StoreError: there is no store, or files of a shard are missing or differ in size from its record.

    Attributes:
        run: content of ``run.json``.
        meta: an Arrow table with a row a clip; ``shard`` and ``row`` say where the clip is stored.
        records: of the complete shards, by their numbers.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import pyarrow as pa

        self.place = find_place(folder)
        self.folder = folder if scheme(os.fspath(folder)) else Path(folder)
        run = read_run(self.place)
        if run is None:
            raise StoreError(f"{self.folder}: expected a folder of embeddings with a {RUN_FILE}, found none")
        self.run: Mapping[str, Any] = run
        sizes = self.place.sizes()
        numbers = shard_numbers(sizes)
        with ThreadPoolExecutor(RECORD_THREADS) as threads:
            found = list(threads.map(functools.partial(read_shard, self.place), numbers))
        self.records: dict[int, ShardRecord] = {}
        for number, record in zip(numbers, found, strict=True):
            if record is None or record.run != run["fingerprint"]:
                raise _damaged(self.place / record_file(number))
            for name, expected in record.files.items():
                if name not in sizes:  # a list in pages is older at its start than at its end
                    sizes = self.place.sizes()
                if sizes.get(name) != expected["bytes"]:
                    raise _damaged(self.place / name)
            self.records[number] = record
        with ThreadPoolExecutor(RECORD_THREADS) as threads:
            tables = list(threads.map(self._meta, self.records))
        self.meta: pa.Table = (
            pa.concat_tables(tables, promote_options="default")
            if tables
            else pa.table(
                {"id": pa.array([], pa.string()), "shard": pa.array([], pa.int64()), "row": pa.array([], pa.int64())}
            )
        )
        self._scenes: dict[int, Rows] = {}
        self._frames: dict[int, Rows] = {}
        self._states: dict[int, Cells] = {}
        self._index: dict[str, int] | None = None

    def __repr__(self) -> str:
        return f"<gura_jax.EmbeddingStore {self.folder}: {len(self)} clips by {self.run['system']['name']}>"

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def ids(self) -> list[str]:
        """Ids of the clips, in order."""
        return self.meta["id"].to_pylist()

    def __contains__(self, name: object) -> bool:
        return name in self._positions()

    def __getitem__(self, name: str) -> StoredClip:
        """Return the clip of this id.

        Raises:
            KeyError: there is none.
        """
        return self._clip(self._row(name))

    def __iter__(self) -> Iterator[StoredClip]:
        for row in self.iterate_meta():
            yield self._clip(row)

    def batches(self, size: int) -> Iterator[list[StoredClip]]:
        """Iterate over clips in order, at most ``size`` of one shard at once; their scenes are read together."""
        for batch in self.meta.to_batches(max_chunksize=size):
            for shard, group in itertools.groupby(batch.to_pylist(), key=lambda row: row["shard"]):
                rows = list(group)
                scenes = self._shard_scenes(shard)[[row["row"] for row in rows]]
                yield [self._clip(row, scene) for row, scene in zip(rows, scenes, strict=True)]

    def filter(self, expression: "pc.Expression") -> "EmbeddingStore":
        """Return the clips whose metadata fulfil an Arrow expression: ``pyarrow.compute.field("split") == "train"``.

        Raises:
            StoreError: the metadata have no such column, or one of another type.
        """
        import pyarrow as pa

        part = object.__new__(EmbeddingStore)
        try:
            meta = self.meta.filter(expression)
        except (pa.ArrowException, KeyError) as error:
            columns = ", ".join(self.meta.column_names)
            raise StoreError(f"{self.folder}: expected a filter on {columns}, found: {error}") from None
        part.__dict__ |= self.__dict__ | {"meta": meta, "_index": None}
        return part

    def read_shard(self, number: int, place: Place | None = None) -> Shard:
        """Return a shard as it was written; all of it, whatever part of the store this is.

        Args:
            number: of the shard.
            place: that has a copy of its files; by default the store's.

        Raises:
            StoreError: it cannot be read, or is damaged.
        """
        sink = self.records[number].sink
        meta = self._read(number, sink.meta, place)
        scenes = self._read(number, lambda open: sink.scenes(open)[:], place)
        frames = None
        if self.run["timestamp_embedding_size"] is not None:
            rows = self._read(number, lambda open: sink.frames(open)[:], place)
            counts = meta["num_frames"].to_pylist()
            frames = np.split(rows, np.cumsum(counts)[:-1]) if counts else [rows]
        states = None
        if "states" in self.run:
            states = self._read(number, lambda open: _all_cells(sink.states(open), len(meta)), place)
        return Shard(meta, scenes, frames, states)

    def scenes(self) -> np.ndarray:
        """Return the scene embeddings of all clips in order, [n, S], in memory."""
        shards, rows = (self.meta[name].to_numpy() for name in ("shard", "row"))
        size, dtype = self.run["scene_embedding_size"], self.run["storage"]
        out = np.empty((len(rows), size), dtype)
        for shard in dict.fromkeys(shards.tolist()):
            chosen = shards == shard
            out[chosen] = self._shard_scenes(shard)[rows[chosen]]
        return out

    def states(self, member: str | None = None) -> np.ndarray:
        """Return the means of a member's hidden states over time, of all clips in order, in memory.

        Args:
            member: by default the system's first with hidden states.

        Returns:
            [n, K, groups * D], at the member's own frame rate; K is 1 for a member without hidden states.

        Raises:
            StoreError: the store has no means of hidden states, or no such member.
        """
        states = self.kept_states
        if states.of != "mean":
            raise StoreError(f"{self.folder}: expected means of hidden states, found {states.of}: see state_frames")
        found = states.find(member)
        rows = [own[found.name][0][:, 0] for own in self.iterate_states()]
        shape = (0, found.kept, states.groups * found.size)
        return np.stack(rows) if rows else np.empty(shape, self.run["storage"])

    def state_frames(self, name: str, member: str | None = None) -> np.ndarray:
        """Return the frames of a member's hidden states, of one clip.

        Args:
            name: id of the clip.
            member: by default the system's first with hidden states.

        Returns:
            [K, T, D].

        Raises:
            KeyError: there is no such clip.
            StoreError: the store has no frames of hidden states, or no such member.
        """
        states = self.kept_states
        if states.of != "frames":
            raise StoreError(f"{self.folder}: expected frames of hidden states, found {states.of}: see states")
        found = states.find(member)
        return self._states_of(self._row(name), states)[found.name][0].swapaxes(0, 1)

    def iterate_states(self) -> Iterator[Mapping[str, tuple[np.ndarray, np.ndarray]]]:
        """Iterate over the hidden states of the clips, in order, by member: see :mod:`gura_jax.dataset.states`.

        Raises:
            StoreError: the store has none.
        """
        states = self.kept_states
        for row in self.iterate_meta():
            yield self._states_of(row, states)

    def iterate_meta(self) -> Iterator[dict[str, Any]]:
        """Iterate over the metadata of the clips, in order."""
        for batch in self.meta.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    @property
    def kept_states(self) -> States:
        """What the store has of hidden states.

        Raises:
            StoreError: it has none.
        """
        try:
            return States.of_run(self.run)
        except StoreError as error:
            raise StoreError(f"{self.folder}: {error}") from None

    def _states_of(self, row: dict[str, Any], states: States) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        shard = row["shard"]
        if shard not in self._states:
            self._states[shard] = self._read(shard, self.records[shard].sink.states)
        numbers = self._read(shard, lambda open: self._states[shard][row["row"]])
        try:
            return states.unpack(numbers, row)
        except StoreError as error:
            raise StoreError(f"{self.place / record_file(shard)}: {error}") from None

    def rows(self, shard: int, of: "Of" = "scenes") -> Rows:
        """Open the scenes [n, S] or frames [sum T, D] of a whole shard, to read rows of them."""
        sink = self.records[shard].sink
        return self._read(shard, sink.scenes if of == "scenes" else sink.frames)

    def search(
        self, vectors: np.ndarray, top: int = 10, *, of: "Of" = "scenes", metric: "Metric" = "cosine"
    ) -> "Matches":
        """Find the clips that are most similar to each of some vectors, exactly: see :mod:`gura_jax.dataset.search`.

        Args:
            vectors: [Q, S], or [Q, D] for frames; or one of them.
            top: clips for each vector.
            of: ``"scenes"``; or ``"frames"``: where in a clip, the best frame of each.
            metric: ``"cosine"`` or ``"dot"``.

        Raises:
            InputError: vectors of another size, not finite, or zero.
            StoreError: no clips, no frames, a file that cannot be read, or an embedding that is not finite.
        """
        from gura_jax.dataset.search import search

        return search(self, vectors, top, of=of, metric=metric)

    def to_arrow(self, *, embeddings: bool = False) -> "pa.Table":
        """Return the metadata, and with ``embeddings`` a column ``scene`` of lists."""
        import pyarrow as pa

        if not embeddings:
            return self.meta
        scenes = self.scenes()
        values = pa.FixedSizeListArray.from_arrays(pa.array(scenes.ravel()), scenes.shape[1])
        return self.meta.append_column("scene", values)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the metadata as a data frame (needs pandas)."""
        try:
            import pandas  # noqa: F401
        except ModuleNotFoundError:
            raise StoreError("expected pandas: pip install pandas, or use to_arrow()") from None
        return self.meta.to_pandas()

    def _meta(self, number: int) -> "pa.Table":
        import pyarrow as pa

        table = self._read(number, self.records[number].sink.meta)
        table = table.append_column("shard", pa.array([number] * len(table), pa.int64()))
        return table.append_column("row", pa.array(range(len(table)), pa.int64()))

    def _row(self, name: str) -> dict[str, Any]:
        """The metadata of the clip of this id.

        Raises:
            KeyError: there is none.
        """
        positions = self._positions()
        if name not in positions:
            raise KeyError(f"{self.folder}: no clip {name!r}")
        return self.meta.slice(positions[name], 1).to_pylist()[0]

    def _positions(self) -> dict[str, int]:
        if self._index is None:
            self._index = {name: i for i, name in enumerate(self.ids)}
        return self._index

    def _shard_scenes(self, shard: int) -> Rows:
        if shard not in self._scenes:
            self._scenes[shard] = self._read(shard, self.records[shard].sink.scenes)
        return self._scenes[shard]

    def _shard_frames(self, shard: int) -> Rows:
        if shard not in self._frames:
            self._frames[shard] = self._read(shard, self.records[shard].sink.frames)
        return self._frames[shard]

    def _clip(self, row: dict[str, Any], scene: np.ndarray | None = None) -> StoredClip:
        shard, number = row["shard"], row["row"]
        frames = times = None
        if "frame_start" in row and row["frame_start"] is not None:
            start = row["frame_start"]
            frames = self._shard_frames(shard)[start : start + row["num_frames"]]
            times = row["frame_offset_ms"] + row["frame_hop_ms"] * np.arange(row["num_frames"])
        scene = self._shard_scenes(shard)[number] if scene is None else scene
        return StoredClip(row, scene, frames, times)

    def _read(self, shard: int, read: Callable[[Open], T], place: Place | None = None) -> T:
        """Let a sink read from a shard; an error names the file that it opened last."""
        import pyarrow as pa

        place = place or self.place
        path = place / record_file(shard)

        def open_file(file: str) -> BinaryIO:
            nonlocal path
            path = place / data_file(file, shard)
            return place.open(data_file(file, shard))

        try:
            return read(open_file)
        except FileNotFoundError:
            raise _damaged(path) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (pa.ArrowException, ValueError, EOFError):
            raise _damaged(path) from None


def _all_cells(cells: Cells, count: int) -> list[np.ndarray]:
    return [cells[row] for row in range(count)]


def _damaged(path: Any) -> StoreError:
    return StoreError(
        f"{path}: expected a file as its shard describes it, found one that is missing or damaged: "
        "run gura-jax embed again, with the same arguments, to compute that shard anew"
    )
