"""A format of a store: what a shard's data files are, how they are written and read back."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Create = Callable[[str, Callable[[BinaryIO], object]], None]
"""``create(file, write)``: create a data file of the shard; ``write`` gets it open, may write and tell, not seek."""

Open = Callable[[str], BinaryIO]
"""``open(file)``: open a data file of the shard for reading. It seeks, and is closed by whoever opened it."""


class Shard(NamedTuple):
    """Content of a shard: n clips in one order."""

    meta: "pa.Table"  # n rows; with frames, ``frame_start`` and ``num_frames`` are each clip's part of all frames
    scenes: np.ndarray  # [n, S]
    frames: Sequence[np.ndarray] | None  # [T, D] of each clip, one array at least; None without timestamps
    states: Sequence[np.ndarray] | None = None  # of each clip [numbers]: see gura_jax.dataset.states; None: not kept


class Rows(Protocol):
    """Rows that are read when they are asked for, as those of an array in a file."""

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Cells(Protocol):
    """Arrays [numbers], one a clip, that are read when they are asked for."""

    def __getitem__(self, row: int, /) -> np.ndarray: ...


class Sink(Protocol):
    """A format of a store.

    A data file is called ``KIND.SUFFIX`` here, as ``scene.npy``; shard 7 has it under the name ``scene-00007.npy``. The
    names tell the format, so no two formats share all of theirs. A sink has no state, and neither opens nor names
    files by itself.
    """

    def files(self, timestamps: bool, states: bool) -> tuple[str, ...]:
        """Return a shard's data files, with frames or hidden states if it has them, in the order of writing."""
        ...

    def write(self, shard: Shard, create: Create) -> None:
        """Write all data files of a shard, each by ``create``; equal content gives equal bytes."""
        ...

    def meta(self, open: Open, columns: list[str] | None = None) -> "pa.Table":
        """Read the metadata, or some columns of them."""
        ...

    def scenes(self, open: Open) -> Rows:
        """Return the scene embeddings, [n, S]."""
        ...

    def frames(self, open: Open) -> Rows:
        """Return the frames of all clips one after the other, [sum T, D]."""
        ...

    def states(self, open: Open) -> Cells:
        """Return the hidden states of each clip, [numbers]."""
        ...
