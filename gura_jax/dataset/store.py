"""The store: a folder of shards of embeddings, each complete or absent.

A shard k is, in one order of clips:

- ``scene-0000k.npy``: [num_clips, S] float32.
- ``frames-0000k.npy``: [sum T, D] float32, the frames of its clips one after the other; only with timestamps.
- ``meta-0000k.parquet``: a row a clip: ``id`` and ``path`` (string), ``duration`` (seconds, float64) and
  ``num_samples`` (int64), both at 16 kHz; with timestamps also ``num_frames`` and ``frame_start`` (int64, the clip's
  first row in the frames file), ``frame_offset_ms`` and ``frame_hop_ms`` (float64): the time of frame i is
  ``frame_offset_ms + i * frame_hop_ms``.

The meta file comes last: where it stands, the shard is complete. ``run.json`` says how the store was made.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gura_jax.audio import SAMPLE_RATE
from gura_jax.errors import StoreError

SHARD_CLIPS = 1024  # few enough that little is lost when a job is killed
SHARD_BYTES = 256 << 20  # held in memory, twice while it is written
RUN_FILE = "run.json"
_STORE_FILE = re.compile(r"(?:scene|frames)-\d{5}\.npy|meta-\d{5}\.parquet|run\.json")


class ShardWriter:
    """Writes embeddings into a folder, shard by shard; call :meth:`finish` at the end, whatever happened.

    Args:
        folder: made if it is missing.
        timestamps: whether frames are stored beside scene embeddings.
        overwrite: replace a store that is in the folder. Its files go when the first new ones are ready, and nothing
            else in the folder is touched.

    Raises:
        StoreError: the folder cannot be made or written, or holds a store already.
    """

    def __init__(self, folder: str | os.PathLike[str], *, timestamps: bool, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self.timestamps = timestamps
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # better now than after an hour of embedding
                pass
            # In the order to delete them: a meta file goes first, as it vouches for the others.
            old = [p for p in self.folder.iterdir() if _STORE_FILE.fullmatch(p.name)]
            self._old = sorted(old, key=lambda p: (not p.name.startswith("meta"), p.name))
        except OSError as error:
            raise _cannot_write(self.folder, error) from None
        if self._old and not overwrite:
            raise StoreError(
                f"{self.folder}: expected a folder without embeddings, found {self._old[0].name}: "
                "choose another folder, or overwrite (--overwrite)"
            )
        self._shard = 0
        self._start_shard()

    @property
    def replaces(self) -> bool:
        """Whether an older store is still there, to be replaced by the first files that are written."""
        return bool(self._old)

    def _start_shard(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._scenes: list[np.ndarray] = []
        self._frames: list[np.ndarray] = []
        self._num_frames = self._bytes = 0

    def add(
        self,
        id: str,
        path: str,
        num_samples: int,
        scene: np.ndarray,
        frames: np.ndarray | None = None,
        times: np.ndarray | None = None,
    ) -> None:
        """Add a clip, and write the shard that it fills.

        Args:
            id: the clip's name in the store.
            path: the file it came from.
            num_samples: its length at 16 kHz.
            scene: [S].
            frames: [T, D], T >= 1; given if and only if the store has timestamps.
            times: [T] in milliseconds, evenly spaced.

        Raises:
            StoreError: the shard cannot be written; the clips added stay in memory for another try.
        """
        row: dict[str, Any] = {
            "id": _unicode(id),
            "path": _unicode(path),
            "duration": num_samples / SAMPLE_RATE,
            "num_samples": num_samples,
        }
        if self.timestamps:
            if frames is None or times is None:
                raise ValueError("a store with timestamps expects the frames and times of each clip")
            row |= {
                "num_frames": len(frames),
                "frame_start": self._num_frames,
                "frame_offset_ms": float(times[0]),
                "frame_hop_ms": float(times[-1] - times[0]) / max(1, len(times) - 1),
            }
            self._frames.append(np.array(frames, np.float32))  # a copy: a view keeps its whole batch in memory
            self._num_frames += len(frames)
            self._bytes += self._frames[-1].nbytes
        self._rows.append(row)
        self._scenes.append(np.array(scene, np.float32))
        self._bytes += self._scenes[-1].nbytes
        if len(self._rows) >= SHARD_CLIPS or self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the clips that no shard holds yet, and ``run.json``.

        Raises:
            StoreError: they cannot be written.
        """
        if self._rows:
            self._flush()
        write_json(self.folder / RUN_FILE, summary, replacing=self._old)

    def _flush(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        number = f"{self._shard:05d}"
        scenes, frames, rows = self._scenes, self._frames, self._rows
        files: dict[str, Callable[[BinaryIO], object]] = {
            f"scene-{number}.npy": lambda file: np.save(file, np.stack(scenes)),
        }
        if self.timestamps:
            files[f"frames-{number}.npy"] = lambda file: np.save(file, np.concatenate(frames))
        files[f"meta-{number}.parquet"] = lambda file: parquet.write_table(pa.Table.from_pylist(rows), file)
        _write_files(self.folder, files, self._old)
        self._old = []
        self._shard += 1
        self._start_shard()


def write_json(path: str | os.PathLike[str], value: Any, *, replacing: Iterable[Path] = ()) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: of the file.
        value: anything that :mod:`json` writes.
        replacing: files to delete once the new one is ready to take its place.

    Raises:
        StoreError: it cannot be written.
    """
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path = Path(path)
    _write_files(path.parent, {path.name: lambda file: file.write(text.encode())}, replacing)


def _write_files(folder: Path, files: Mapping[str, Callable[[BinaryIO], object]], replacing: Iterable[Path]) -> None:
    """Write files under temporary names, delete those they replace, then give them their names, in order."""
    temporary = {folder / f".{name}.tmp": folder / name for name in files}
    try:
        for path, write in zip(temporary, files.values(), strict=True):
            with open(path, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path in replacing:
            path.unlink(missing_ok=True)
        for path, final in temporary.items():
            os.replace(path, final)
        descriptor = os.open(folder, os.O_RDONLY)  # the new names are on the disk only once the folder is
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _cannot_write(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{folder}: expected a folder that can be written to, found: {error.strerror or error}: "
        "make room or choose another folder"
    )


def _unicode(text: str) -> str:
    """File names need not be Unicode, Parquet's strings must: bytes that are not become ``\\udcXX`` in letters."""
    return text.encode(errors="backslashreplace").decode()
