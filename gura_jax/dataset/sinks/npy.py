"""NumPy arrays beside Parquet metadata.

- ``scene``: [num_clips, S] float32, or float16 where asked for.
- ``frames``: [sum T, D], of the same type, the frames of all clips one after the other; only with timestamps.
- ``states``: [numbers], of the same type, the hidden states of all clips one after the other, of which ``states_start``
  and ``states_size`` in the metadata are a clip's; only where states are kept.
- ``meta``: Parquet, a row a clip.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gura_jax.dataset.sinks.sink import Cells, Create, Open, Rows, Shard, Sink
from gura_jax.objects import BLOCK_BYTES, ObjectFile

if TYPE_CHECKING:
    import pyarrow as pa

SCENE, FRAMES, STATES, META = "scene.npy", "frames.npy", "states.npy", "meta.parquet"


class Npy(Sink):
    """The format ``npy``: arrays can be mapped into memory, metadata queried by any Parquet tool."""

    def files(self, timestamps: bool, states: bool) -> tuple[str, ...]:
        """Return ``scene.npy``, ``frames.npy`` with timestamps, ``states.npy`` with states, ``meta.parquet``."""
        return (SCENE, *([FRAMES] if timestamps else []), *([STATES] if states else []), META)

    def write(self, shard: Shard, create: Create) -> None:
        """Write the arrays, then the metadata."""
        from pyarrow import parquet

        create(SCENE, lambda file: np.save(file, shard.scenes))
        if (frames := shard.frames) is not None:
            create(FRAMES, lambda file: _save_joined(file, frames))
        if (states := shard.states) is not None:
            joined = states or [np.zeros(0, shard.scenes.dtype)]
            create(STATES, lambda file: _save_joined(file, joined))
        create(META, lambda file: parquet.write_table(shard.meta, file))

    def meta(self, open: Open, columns: list[str] | None = None) -> "pa.Table":
        """Read the metadata, or some columns of them."""
        from pyarrow import parquet

        with open(META) as file:  # opened by Python: Arrow refuses paths that are not UTF-8
            return parquet.read_table(file, columns=columns)

    def scenes(self, open: Open) -> Rows:
        """Return the scene embeddings, [n, S], mapped into memory or read by ranges."""
        with open(SCENE) as file:
            return _map(file)

    def frames(self, open: Open) -> Rows:
        """Return the frames, [sum T, D], mapped into memory or read by ranges."""
        with open(FRAMES) as file:
            return _map(file)

    def states(self, open: Open) -> Cells:
        """Return the hidden states of each clip, mapped into memory or read by ranges."""
        table = self.meta(open, ["states_start", "states_size"])
        with open(STATES) as file:
            return _FlatCells(_map(file), table["states_start"].to_numpy(), table["states_size"].to_numpy())


@dataclasses.dataclass(frozen=True)
class _FlatCells:
    """Parts of one array."""

    flat: Rows  # [numbers]
    starts: np.ndarray  # [n]
    sizes: np.ndarray  # [n]

    def __getitem__(self, row: Any, /) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row] + self.sizes[row]]


def _save_joined(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    """Write what ``np.save`` of the arrays one after the other would, without a copy of all of them."""
    first = arrays[0]
    shape = (sum(map(len, arrays)), *first.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(np.ascontiguousarray(array).data)  # pyright: ignore[reportArgumentType]


def _map(file: Any) -> Rows:
    """The array of an open file: mapped into memory as ``np.load(path, mmap_mode="r")`` would, or read by ranges."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"expected version 1.0 of the npy format, found {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("expected numbers, found Python objects")
    if isinstance(file, ObjectFile):
        if fortran_order:
            raise ValueError("expected rows one after the other, found columns")
        return _RangedRows(file, file.tell(), dtype, shape)
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


class _RangedRows:
    """Rows of an array [n, D] in an object; those near each other are read together."""

    def __init__(self, file: ObjectFile, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.file, self.start, self.dtype, self.shape = file, start, dtype, shape

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        if isinstance(rows, slice):
            first, stop, step = rows.indices(self.shape[0])
            return self._read(first, max(first, stop))[::step]
        chosen = np.asarray(rows, np.int64)
        wanted, inverse = np.unique(chosen, return_inverse=True)
        row_bytes = max(1, self._row_bytes())
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) * row_bytes > BLOCK_BYTES) + 1) if len(wanted) else []
        parts = [self._read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
        found = np.concatenate(parts) if parts else self._read(0, 0)
        return found[inverse].reshape(*chosen.shape, *self.shape[1:])

    def _row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def _read(self, first: int, stop: int) -> np.ndarray:
        size = self._row_bytes()
        content = self.file.range(self.start + first * size, self.start + stop * size)
        return np.frombuffer(content, self.dtype).reshape(stop - first, *self.shape[1:])
