"""Scene embeddings and metadata of stores, as the clips of a map."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gura_jax.dataset.columns import is_written
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.search import StoredVectors
from gura_jax.dataset.sources import printable, read_inputs
from gura_jax.errors import InputError, StoreError
from gura_jax.nearest import Vectors

if TYPE_CHECKING:
    import pyarrow as pa

MIN_CLIPS = 5
BLOCK_BYTES = 64 << 20  # of float32 scenes in memory at once
DATA_SET = "data set"  # a column: the store that a clip is from, or the HEAR task


class Scenes:
    """Scene embeddings of one store after the other, as rows [n, S] that are read a slice at a time."""

    def __init__(self, parts: Sequence[StoredVectors]) -> None:
        self.size = parts[0].size
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [stop - start, S]."""
        found = []
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            first, last = max(start, end - len(part)), min(stop, end)
            if first < last:
                found.append(part.read(first - end + len(part), last - end + len(part)))
        return np.concatenate(found)

    def describe(self, row: int) -> str:
        """Name a row by its store and clip."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self._parts[part].describe(row - int(self._ends[part]) + len(self._parts[part]))


class Clips(NamedTuple):
    """Clips of one store or several.

    Attributes:
        title: the systems and the number of clips.
        scenes: n rows of S numbers, not all the same.
        table: metadata, an Arrow table with a row a clip.
        folders: the stores.
        origins: [n], which of the stores a clip is from.
    """

    title: str
    scenes: Vectors
    table: "pa.Table"
    folders: Sequence[Path]
    origins: np.ndarray

    @property
    def columns(self) -> list[str]:
        """Columns of the metadata that describe a clip."""
        return [name for name in self.table.column_names if not is_written(name)]

    def row(self, clip: int) -> dict[str, Any]:
        """Return the metadata of one clip."""
        return self.table.slice(clip, 1).to_pylist()[0]


def read_clips(folders: Sequence[str | os.PathLike[str]], *, inputs: Sequence[str | os.PathLike[str]] = ()) -> Clips:
    """Open the scene embeddings and read the metadata of stores.

    Args:
        folders: the stores, at least one, all of one embedding size.
        inputs: the stores' inputs, as ``gura-jax embed`` took them, for columns that the stores lack (the labels of
            HEAR tasks); joined by id.

    Raises:
        StoreError: a folder is no store, sizes differ, or embeddings are all the same or not finite.
        InputError: too few clips, or inputs that cannot be read.
    """
    stores = [EmbeddingStore(folder) for folder in folders]
    size = stores[0].run["scene_embedding_size"]
    names = [Path(embeddings.folder).resolve().name for embeddings in stores]
    if len(set(names)) < len(names):
        names = [str(embeddings.folder) for embeddings in stores]
    for embeddings in stores:
        if (found := embeddings.run["scene_embedding_size"]) != size:
            raise StoreError(
                f"expected stores of one embedding size, found {size} in {stores[0].folder} and {found} in "
                f"{embeddings.folder}"
            )
    tables = [_with_data_set(each.meta, printable(name), len(stores)) for name, each in zip(names, stores, strict=True)]
    if inputs:
        more = read_inputs(inputs)
        tables = [_joined(table, more) for table in tables]
    table = _concatenated(tables)
    if len(table) < MIN_CLIPS:
        raise InputError(f"expected at least {MIN_CLIPS} clips to lay out, found {len(table)}")
    filled = [embeddings for embeddings in stores if len(embeddings)]
    scenes = Scenes([StoredVectors(embeddings) for embeddings in filled])
    if not 0 < (width := spread(scenes)) < math.inf:
        found = "all the same" if width == 0 else "NaN or infinity"
        raise StoreError(f"expected embeddings that are finite and differ, found {found} in {', '.join(names)}")
    systems = ", ".join(dict.fromkeys(embeddings.run["system"]["name"] for embeddings in stores))
    random = sorted({name for embeddings in stores for name in embeddings.run["random_weights"]})
    marked = f"{systems} (random weights: {', '.join(random)})" if random else systems
    origins = np.repeat(np.arange(len(stores)), [len(embeddings) for embeddings in stores])
    places = [Path(embeddings.folder) for embeddings in stores]
    return Clips(f"{marked}: {len(table)} clips", scenes, table, places, origins)


def _with_data_set(table: "pa.Table", name: str, stores: int) -> "pa.Table":
    """Put the data set before the other columns: the HEAR task where there is one store, else the store's name."""
    import pyarrow as pa

    values = [name] * len(table)
    if stores == 1 and "task" in table.column_names:
        values = [task or name for task in table["task"].to_pylist()]
    kept = table.drop_columns([DATA_SET]) if DATA_SET in table.column_names else table
    return kept.add_column(0, DATA_SET, pa.array(values, pa.string()))


def _joined(table: "pa.Table", more: "pa.Table") -> "pa.Table":
    """Add the inputs' columns to the clips of the same id; columns that there are stay as they are."""
    import pyarrow as pa

    index = {name: i for i, name in enumerate(more["id"].to_pylist())}
    rows = pa.array([index.get(name) for name in table["id"].to_pylist()], pa.int64())
    for name in more.column_names:
        if name not in table.column_names:
            table = table.append_column(name, more[name].take(rows))
    return table


def _concatenated(tables: "Sequence[pa.Table]") -> "pa.Table":
    """Put one table after the other; a column whose type differs becomes text."""
    import pyarrow as pa

    kinds: dict[str, set[Any]] = {}
    for table in tables:
        for field in table.schema:
            if not pa.types.is_null(field.type):
                kinds.setdefault(field.name, set()).add(field.type)
    for name in (name for name, found in kinds.items() if len(found) > 1):
        if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds[name]):
            kind = pa.float64()
        else:
            kind = pa.string()
        tables = [_cast(table, name, kind) for table in tables]
    return pa.concat_tables(tables, promote_options="default")


def _cast(table: "pa.Table", name: str, kind: Any) -> "pa.Table":
    import pyarrow as pa

    if name not in table.column_names:
        return table
    column: Any = table[name]
    if pa.types.is_string(kind):
        column = pa.array([None if value is None else shown(value) for value in column.to_pylist()], kind)
    return table.set_column(table.column_names.index(name), name, column.cast(kind))


def blocks(scenes: Vectors) -> Iterator[tuple[int, np.ndarray]]:
    """Read all rows: the first of each block, and the block as float32."""
    count = max(1, BLOCK_BYTES // (4 * scenes.size))
    for start in range(0, len(scenes), count):
        yield start, scenes.read(start, min(start + count, len(scenes))).astype(np.float32)


def spread(scenes: Vectors) -> float:
    """Return the widest range of any feature; NaN or infinity where numbers are not finite."""
    ends = [(block.min(0), block.max(0)) for _, block in blocks(scenes)]
    lows, highs = np.min([low for low, _ in ends], axis=0), np.max([high for _, high in ends], axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        return float((highs - lows).max())


def shown(value: Any) -> str:
    """Format a value of the metadata as text; the labels of a HEAR task, which are JSON, as a plain list."""
    if isinstance(value, str) and value.startswith("["):
        try:
            labels = json.loads(value)
            names = [str(label["label"]) if isinstance(label, dict) else str(label) for label in labels]
        except (ValueError, KeyError, RecursionError):  # other text that starts with a bracket
            return value
        return ", ".join(dict.fromkeys(names))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
