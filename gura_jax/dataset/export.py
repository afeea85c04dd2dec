"""Export of a store to the formats of other tools."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from gura_jax.dataset.reader import EmbeddingStore, StoredClip
from gura_jax.errors import StoreError
from gura_jax.files import cannot_write, new_folder

Format = Literal["datasets", "hear"]
ROW_GROUP = 256  # clips


def export(store: EmbeddingStore, out: Path, form: Format, *, timestamps: bool = False) -> int:
    """Write a store in another format, into a folder that is new or empty.

    ``datasets``: Parquet files in ``data/``, which ``datasets.load_dataset(out)`` reads: the metadata, ``scene`` [S],
    and with ``timestamps`` ``frames`` [T, D]. ``hear``: ``TASK/SPLIT/FILE.embedding.npy``, as HEAR's kit has them
    (``ID.embedding.npy`` for clips that are of no task): the scene embedding, or with ``timestamps`` the frames, and
    their times in ``FILE.timestamps.json``.

    Returns:
        The number of clips.

    Raises:
        StoreError: the folder is not empty or cannot be written, the store has no frames, or has ids that are no file
            names.
    """
    if timestamps and store.run["timestamp_embedding_size"] is None:
        raise StoreError(f"{store.folder}: expected a store with timestamps, found scene embeddings alone")
    writers: dict[Format, Callable[[EmbeddingStore, Path, bool], None]] = {"datasets": _datasets, "hear": _hear}
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StoreError(f"{out}: expected a folder that is new or empty: choose another")
        with new_folder(out) as temporary:
            writers[form](store, temporary, timestamps)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()  # refuses if another process has filled it meanwhile
    except OSError as error:
        raise cannot_write(out, error) from None
    return len(store)


def _datasets(store: EmbeddingStore, out: Path, timestamps: bool) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    (out / "data").mkdir()
    shards = store.meta["shard"].unique().to_pylist()
    value = pa.from_numpy_dtype(np.dtype(store.run["storage"]))
    schema = pa.schema(
        [
            *(field for field in store.meta.schema if field.name not in ("shard", "row", "frame_start")),
            pa.field("scene", pa.list_(value, store.run["scene_embedding_size"])),
            *([pa.field("frames", pa.list_(pa.list_(value)))] if timestamps else []),
        ]
    )
    for index, shard in enumerate(shards):
        part = store.filter(pc.field("shard") == shard)
        path = out / "data" / f"train-{index:05d}-of-{len(shards):05d}.parquet"
        with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(part):
                columns = {name: [clip.meta[name] for clip in group] for name in schema.names if name in group[0].meta}
                columns["scene"] = [clip.scene for clip in group]
                arrays = [pa.array(columns[f.name], f.type) for f in schema if f.name in columns]
                if timestamps:
                    arrays.append(_nested([clip.frames for clip in group if clip.frames is not None]))
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _nested(frames: list[np.ndarray]) -> "object":
    """Return arrays [T, D] as a column of lists of lists, without a Python object for each number."""
    import pyarrow as pa

    joined = np.concatenate(frames)
    rows = pa.ListArray.from_arrays(
        pa.array(np.arange(len(joined) + 1, dtype=np.int32) * joined.shape[1], pa.int32()), pa.array(joined.ravel())
    )
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, frames)]), pa.int32()), rows)


def _groups(store: EmbeddingStore) -> Iterator[list[StoredClip]]:
    group: list[StoredClip] = []
    for clip in store:
        group.append(clip)
        if len(group) == ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def _hear(store: EmbeddingStore, out: Path, timestamps: bool) -> None:
    of_task = {"task", "split", "file"} <= set(store.meta.column_names)
    for clip in store:
        meta = clip.meta
        name = "/".join(meta[key] for key in ("task", "split", "file")) if of_task and meta["file"] else meta["id"]
        path = Path(os.path.normpath(out / f"{name}.embedding.npy"))
        if not path.is_relative_to(out) or "\0" in name:
            raise StoreError(f"{store.folder}: expected ids that are names of files, found {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        embedding = clip.frames if timestamps else clip.scene
        assert embedding is not None
        with open(path, "xb") as file:
            np.save(file, np.asarray(embedding, np.float32))
        if timestamps and clip.times is not None:
            times = path.with_name(path.name.removesuffix(".embedding.npy") + ".timestamps.json")
            times.write_text(json.dumps(clip.times.tolist()) + "\n")
