"""Parquet alone: a row a clip with its embedding, which databases and data frames open as it stands.

- ``clips``: the metadata and ``scene`` (a list of S numbers, of fixed size), a row a clip.
- ``frames``: ``id``, ``time_ms`` and ``frame`` (D numbers), a row a frame, those of a clip one after the other; only
  with timestamps.
- ``states``: ``id`` and ``states`` (a list of numbers), a row a clip; only where hidden states are kept.

Neither compressed nor encoded by dictionaries, which embeddings do not gain from: a few clips are read without the
others of their file.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gura_jax.dataset.sinks.sink import Cells, Create, Open, Rows, Shard, Sink

if TYPE_CHECKING:
    import pyarrow as pa

CLIPS, FRAMES, STATES = "clips.parquet", "frames.parquet", "states.parquet"
SCENE, FRAME, STATE = "scene", "frame", "states"
GROUP_BYTES = 4 << 20  # of embeddings that are read together


class Parquet(Sink):
    """The format ``parquet``: DuckDB, Polars, pandas, Embedding Atlas and datasets read it."""

    def files(self, timestamps: bool, states: bool) -> tuple[str, ...]:
        """Return ``clips.parquet``; before it ``frames.parquet`` with timestamps, ``states.parquet`` with states."""
        return (*([FRAMES] if timestamps else []), *([STATES] if states else []), CLIPS)

    def write(self, shard: Shard, create: Create) -> None:
        """Write the frames, clip by clip, then the clips."""
        import pyarrow as pa
        from pyarrow import parquet

        plain: dict[str, Any] = {"compression": "none", "use_dictionary": False}
        if (frames := shard.frames) is not None:
            size = frames[0].shape[1]
            value = pa.from_numpy_dtype(frames[0].dtype)
            fields = [("id", pa.string()), ("time_ms", pa.float64()), (FRAME, pa.list_(value, size))]
            schema = pa.schema(fields)
            group = _group_rows(frames[0])

            def write_frames(file: Any) -> None:
                with parquet.ParquetWriter(file, schema, **plain) as writer:
                    rows = shard.meta.to_pylist()
                    for row, own in zip(rows, frames, strict=False):  # of no clips there is one array
                        times = row["frame_offset_ms"] + row["frame_hop_ms"] * np.arange(len(own))
                        columns = [pa.array([row["id"]] * len(own), pa.string()), pa.array(times), _lists(own)]
                        writer.write_table(pa.Table.from_arrays(columns, schema=schema), group)

            create(FRAMES, write_frames)
        if shard.states is not None:
            value = pa.from_numpy_dtype(shard.scenes.dtype)
            offsets = np.cumsum([0, *map(len, shard.states)]).astype(np.int64)
            numbers = np.concatenate([np.zeros(0, shard.scenes.dtype), *shard.states])
            lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(numbers, value))
            states = pa.table({"id": shard.meta["id"], STATE: lists})
            rows = max(1, GROUP_BYTES * len(states) // max(1, numbers.nbytes))
            create(STATES, lambda file: parquet.write_table(states, file, row_group_size=rows, **plain))
        table = shard.meta.append_column(SCENE, _lists(shard.scenes))
        group = _group_rows(shard.scenes)
        create(CLIPS, lambda file: parquet.write_table(table, file, row_group_size=group, **plain))

    def meta(self, open: Open, columns: list[str] | None = None) -> "pa.Table":
        """Read the metadata, or some columns of them."""
        from pyarrow import parquet

        with open(CLIPS) as file:
            source = parquet.ParquetFile(file)
            names = [name for name in source.schema_arrow.names if name != SCENE]
            return source.read(columns=names if columns is None else columns)

    def scenes(self, open: Open) -> Rows:
        """Return the scene embeddings, [n, S]; read in groups of rows."""
        return _ListRows(open, CLIPS, SCENE)

    def frames(self, open: Open) -> Rows:
        """Return the frames, [sum T, D]; read in groups of rows."""
        return _ListRows(open, FRAMES, FRAME)

    def states(self, open: Open) -> Cells:
        """Return the hidden states of each clip; read in groups of clips."""
        return _ListCells(open, STATES, STATE)


def _group_rows(array: np.ndarray) -> int:
    return max(1, GROUP_BYTES // max(1, array.itemsize * array.shape[1]))


def _lists(array: np.ndarray) -> Any:
    """[n, D] as a column of lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])


class _Groups:
    """A column of lists; only the groups of rows are read that are asked for."""

    def __init__(self, open: Open, name: str, column: str) -> None:
        from pyarrow import parquet

        self.open, self.name, self.column = open, name, column
        with open(name) as file:
            source = parquet.ParquetFile(file)
            self.metadata, self.kind = source.metadata, source.schema_arrow.field(column).type
        groups = [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        self._last: tuple[int, Any] | None = None  # group: clips are often read in order

    def group_of(self, rows: Any) -> Any:
        """Return the groups that have these rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def read(self, numbers: list[int]) -> Iterator[tuple[int, Any]]:
        """Read groups, but for the one that was read last: (number, Arrow array)."""
        from pyarrow import parquet

        if self._last is not None and numbers == [self._last[0]]:
            yield self._last
            return
        with self.open(self.name) as file:
            source = parquet.ParquetFile(file, metadata=self.metadata)
            for number in numbers:
                column = source.read_row_group(number, columns=[self.column])[self.column].combine_chunks()
                self._last = number, column
                yield number, column


class _ListCells:
    """The lists of a column, whatever their lengths."""

    def __init__(self, open: Open, name: str, column: str) -> None:
        self.groups = _Groups(open, name, column)

    def __getitem__(self, row: Any, /) -> np.ndarray:
        number = int(self.groups.group_of(row))
        if row < 0 or number >= len(self.groups.starts) - 1:
            raise ValueError(f"expected a row of the file, found {row}")
        ((_, column),) = self.groups.read([number])
        return column[int(row - self.groups.starts[number])].values.to_numpy()


class _ListRows:
    """Rows of a column of lists of one size."""

    def __init__(self, open: Open, name: str, column: str) -> None:
        self.groups = _Groups(open, name, column)
        kind = self.groups.kind
        self.size, self.dtype = kind.list_size, np.dtype(kind.value_type.to_pandas_dtype())

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        total = int(self.groups.starts[-1])
        chosen = np.arange(*rows.indices(total)) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        flat = chosen.reshape(-1)
        group = self.groups.group_of(flat)
        out = np.empty((len(flat), self.size), self.dtype)
        for number, column in self.groups.read(np.unique(group).tolist()):
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.size)
            own = group == number
            out[own] = values[flat[own] - self.groups.starts[number]]
        return out.reshape(*chosen.shape, self.size)
