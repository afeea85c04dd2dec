"""NumPy arrays beside Parquet metadata.

- ``scene``: [num_clips, S] float32, or float16 where asked for.
- ``frames``: [sum T, D], of the same type, the frames of all clips one after the other; only with timestamps.
- ``meta``: Parquet, a row a clip.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gura_jax.dataset.sinks.sink import Create, Open, Shard, Sink

if TYPE_CHECKING:
    import pyarrow as pa

SCENE, FRAMES, META = "scene.npy", "frames.npy", "meta.parquet"


class Npy(Sink):
    """The format ``npy``: arrays can be mapped into memory, metadata queried by any Parquet tool."""

    def files(self, timestamps: bool) -> tuple[str, ...]:
        """Return ``scene.npy``, ``frames.npy`` with timestamps, ``meta.parquet``."""
        return (SCENE, FRAMES, META) if timestamps else (SCENE, META)

    def write(self, shard: Shard, create: Create) -> None:
        """Write the arrays, then the metadata."""
        from pyarrow import parquet

        create(SCENE, lambda file: np.save(file, shard.scenes))
        if (frames := shard.frames) is not None:
            create(FRAMES, lambda file: _save_joined(file, frames))
        create(META, lambda file: parquet.write_table(shard.meta, file))

    def meta(self, open: Open, columns: list[str] | None = None) -> "pa.Table":
        """Read the metadata, or some columns of them."""
        from pyarrow import parquet

        with open(META) as file:  # opened by Python: Arrow refuses paths that are not UTF-8
            return parquet.read_table(file, columns=columns)

    def scenes(self, open: Open) -> np.ndarray:
        """Map the scene embeddings into memory, [n, S]."""
        with open(SCENE) as file:
            return _map(file)

    def frames(self, open: Open) -> np.ndarray:
        """Map the frames into memory, [sum T, D]."""
        with open(FRAMES) as file:
            return _map(file)


def _save_joined(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    """Write what ``np.save`` of the arrays one after the other would, without a copy of all of them."""
    first = arrays[0]
    shape = (sum(map(len, arrays)), *first.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(np.ascontiguousarray(array).data)  # pyright: ignore[reportArgumentType]


def _map(file: BinaryIO) -> np.memmap:
    """Map an open file as ``np.load(path, mmap_mode="r")`` would, which takes paths alone."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"expected version 1.0 of the npy format, found {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("expected numbers, found Python objects")
    return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")  # pyright: ignore
