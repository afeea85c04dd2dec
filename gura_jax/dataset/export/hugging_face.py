"""Parquet files that Hugging Face's datasets reads: ``datasets.load_dataset(folder)``."""

from pathlib import Path

import numpy as np

from gura_jax.dataset.columns import READ_COLUMNS, STATE_COLUMNS, STATE_FRAMES
from gura_jax.dataset.reader import EmbeddingStore

ROW_GROUP = 256  # clips
_PLACES = {*READ_COLUMNS, *STATE_COLUMNS, "frame_start"}  # of rows in the store's files, which are not written here


def write_datasets(store: EmbeddingStore, out: Path, timestamps: bool) -> None:
    """Write ``data/train-*.parquet``: the metadata, ``scene`` [S], and with ``timestamps`` ``frames`` [T, D]."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    (out / "data").mkdir()
    shards = store.meta["shard"].unique().to_pylist()
    value = pa.from_numpy_dtype(np.dtype(store.run["storage"]))
    schema = pa.schema(
        [
            *(field for field in store.meta.schema if _describes(field.name)),
            pa.field("scene", pa.list_(value, store.run["scene_embedding_size"])),
            *([pa.field("frames", pa.list_(pa.list_(value)))] if timestamps else []),
        ]
    )
    for index, shard in enumerate(shards):
        part = store.filter(pc.field("shard") == shard)
        path = out / "data" / f"train-{index:05d}-of-{len(shards):05d}.parquet"
        with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
            for group in part.batches(ROW_GROUP):
                columns = {name: [clip.meta[name] for clip in group] for name in schema.names if name in group[0].meta}
                columns["scene"] = [clip.scene for clip in group]
                arrays = [pa.array(columns[f.name], f.type) for f in schema if f.name in columns]
                if timestamps:
                    arrays.append(_nested([clip.frames for clip in group if clip.frames is not None]))
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _describes(column: str) -> bool:
    """Whether a column says something of what is written here."""
    return column not in _PLACES and not column.startswith(STATE_FRAMES)


def _nested(frames: list[np.ndarray]) -> "object":
    """Return arrays [T, D] as a column of lists of lists, without a Python object for each number."""
    import pyarrow as pa

    joined = np.concatenate(frames)
    rows = pa.ListArray.from_arrays(
        pa.array(np.arange(len(joined) + 1, dtype=np.int32) * joined.shape[1], pa.int32()), pa.array(joined.ravel())
    )
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, frames)]), pa.int32()), rows)
