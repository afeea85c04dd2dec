"""Parquet alone: a row a clip with its embedding, which databases and data frames open as it stands.

- ``clips``: the metadata and ``scene`` (a list of S numbers, of fixed size), a row a clip.
- ``frames``: ``id``, ``time_ms`` and ``frame`` (D numbers), a row a frame, those of a clip one after the other; only
  with timestamps.

Neither compressed nor encoded by dictionaries, which embeddings do not gain from: a few clips are read without the
others of their file.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gura_jax.dataset.sinks.sink import Create, Open, Rows, Shard, Sink

if TYPE_CHECKING:
    import pyarrow as pa

CLIPS, FRAMES = "clips.parquet", "frames.parquet"
SCENE, FRAME = "scene", "frame"
GROUP_BYTES = 4 << 20  # of embeddings that are read together


class Parquet(Sink):
    """The format ``parquet``: DuckDB, Polars, pandas, Embedding Atlas and datasets read it."""

    def files(self, timestamps: bool) -> tuple[str, ...]:
        """Return ``clips.parquet``, and with timestamps ``frames.parquet`` before it."""
        return (FRAMES, CLIPS) if timestamps else (CLIPS,)

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


def _group_rows(array: np.ndarray) -> int:
    return max(1, GROUP_BYTES // max(1, array.itemsize * array.shape[1]))


def _lists(array: np.ndarray) -> Any:
    """[n, D] as a column of lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])


class _ListRows:
    """Rows of a column of lists; only the groups are read that have them."""

    def __init__(self, open: Open, name: str, column: str) -> None:
        from pyarrow import parquet

        self.open, self.name, self.column = open, name, column
        with open(name) as file:
            source = parquet.ParquetFile(file)
            self.metadata, kind = source.metadata, source.schema_arrow.field(column).type
        self.size, self.dtype = kind.list_size, np.dtype(kind.value_type.to_pandas_dtype())
        groups = [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        self._last: tuple[int, np.ndarray] | None = None  # group: clips are often read in order

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        total = int(self.starts[-1])
        chosen = np.arange(*rows.indices(total)) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        flat = chosen.reshape(-1)
        group = np.searchsorted(self.starts, flat, side="right") - 1
        out = np.empty((len(flat), self.size), self.dtype)
        for number, values in self._groups(np.unique(group).tolist()):
            own = group == number
            out[own] = values[flat[own] - self.starts[number]]
        return out.reshape(*chosen.shape, self.size)

    def _groups(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read groups, but for the one that was read last."""
        from pyarrow import parquet

        if self._last is not None and numbers == [self._last[0]]:
            yield self._last
            return
        with self.open(self.name) as file:
            source = parquet.ParquetFile(file, metadata=self.metadata)
            for number in numbers:
                column = source.read_row_group(number, columns=[self.column])[self.column].combine_chunks()
                values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.size)
                self._last = number, values
                yield number, values
