"""The store: a folder of shards of embeddings, each complete or absent.

A shard k is, in one order of clips:

- ``scene-0000k.npy``: [num_clips, S] float32, or float16 where asked for.
- ``frames-0000k.npy``: [sum T, D], the same, the frames of its clips one after the other; only with timestamps.
- ``meta-0000k.parquet``: a row a clip: ``id`` and ``path`` (string), ``offset`` (seconds into the file, float64),
  ``duration`` (seconds, float64) and ``num_samples`` (int64), both at 16 kHz; with timestamps also ``num_frames`` and
  ``frame_start`` (int64, the clip's first row in the frames file), ``frame_offset_ms`` and ``frame_hop_ms`` (float64):
  the time of frame i is ``frame_offset_ms + i * frame_hop_ms``; then a manifest's further columns.
- ``shard-0000k.json``: sizes and sha256 of the others, the run they belong to, and the clips that failed. It comes
  last: where it stands, the shard is complete.

``run.json`` says how the store was made, ``plan-00000.parquet`` which clips belong to which shard and batch, and
``failed.csv`` which clips could not be embedded, and why.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np

from gura_jax.errors import StoreError

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa
    import pyarrow.compute as pc

RUN_FILE = "run.json"
FAILED_FILE = "failed.csv"
LOCK_FILE = ".lock"
ELSEWHERE = "choose another folder, or remove this one (gura-jax embed: --overwrite)"
ASIDE = "aside"  # folder for shards that were found damaged
STORE_FILE = re.compile(
    r"(?:scene|frames)-\d{5,}\.npy|(?:meta|plan)-\d{5,}\.parquet|shard-\d{5,}\.json|run\.json|failed\.csv"
)
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
_SHARD = re.compile(r"shard-(\d{5,})\.json")

Storage = Literal["float32", "float16"]


class Failure(NamedTuple):
    """A clip that could not be embedded."""

    id: str
    path: str
    reason: str


class ShardRecord(NamedTuple):
    """What ``shard-0000k.json`` says."""

    number: int
    run: str
    clips: int
    samples: int
    files: Mapping[str, Mapping[str, Any]]
    failed: tuple[Failure, ...]


def shard_names(number: int, timestamps: bool) -> list[str]:
    """The files of a shard, in the order in which they are written."""
    frames = [f"frames-{number:05d}.npy"] if timestamps else []
    return [f"scene-{number:05d}.npy", *frames, f"meta-{number:05d}.parquet", f"shard-{number:05d}.json"]


def open_folder(folder: Path) -> None:
    """Make a folder, and see that it can be written to: better now than after an hour of embedding.

    Raises:
        StoreError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While this holds, no other process plans or commits in the folder; where the file system knows locks."""
    from filelock import FileLock

    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield  # processes that meet then write the same bytes
        return
    try:
        yield
    finally:
        lock.release()


def write_shard(
    folder: Path,
    number: int,
    *,
    run: str,
    scenes: np.ndarray,
    frames: Sequence[np.ndarray] | None,
    meta: "pa.Table",
    failed: Sequence[Failure],
) -> ShardRecord:
    """Write a shard whole or not at all.

    Args:
        folder: of the store.
        number: of the shard.
        run: fingerprint of the run.
        scenes: [n, S].
        frames: of each clip, [T, D], one array at least; None without timestamps.
        meta: n rows.
        failed: clips of the shard that have no row.

    Raises:
        StoreError: it cannot be written; nothing of it is there then.
    """
    from pyarrow import parquet

    names = shard_names(number, frames is not None)
    writers: list[Callable[[BinaryIO], object]] = [lambda file: np.save(file, scenes)]
    if frames is not None:
        writers.append(lambda file: _save_joined(file, frames))
    writers.append(lambda file: parquet.write_table(meta, file))
    samples = sum(meta["num_samples"].to_pylist())
    with _Temporary(folder) as temporary:
        files = {name: temporary.write(name, write) for name, write in zip(names, writers, strict=False)}
        record = ShardRecord(number, run, len(scenes), samples, files, tuple(failed))
        content = record._asdict() | {"failed": [failure._asdict() for failure in failed]}
        temporary.write(names[-1], lambda file: file.write(_json(content)))
        with locked(folder):
            there = read_shard(folder, number)
            # Another process may have been given the same shard, and have been faster.
            if there is None or there.run != run:
                temporary.commit()
        remove_temporary(folder, set(names))
    return record


def _save_joined(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    """``np.save`` of arrays one after the other, without a copy of all of them."""
    first = arrays[0]
    shape = (sum(map(len, arrays)), *first.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(np.ascontiguousarray(array).data)  # pyright: ignore[reportArgumentType]


class _Temporary:
    """Files under temporary names, which become files of the store all at once, in the order written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, Path] = {}

    def __enter__(self) -> "_Temporary":
        return self

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        """Write a file to the disk; its size and sha256."""
        path = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
        self.files[path] = self.folder / name
        try:
            with open(path, "xb") as raw:
                file = _Hashed(raw)
                write(file)  # pyright: ignore[reportArgumentType]
                raw.flush()
                os.fsync(raw.fileno())
            return {"bytes": file.size, "sha256": file.digest.hexdigest()}
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def commit(self) -> None:
        """Give the files their names, and see that the names are on the disk."""
        try:
            for path, final in self.files.items():
                os.replace(path, final)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def __exit__(self, *_: object) -> None:
        for path in self.files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Write one file whole or not at all; its folder is :func:`locked`.

    Raises:
        StoreError: it cannot be written.
    """
    with _Temporary(folder) as temporary:
        temporary.write(name, lambda file: file.write(content))
        temporary.commit()
    remove_temporary(folder, {name})


def write_json(folder: Path, name: str, value: Any) -> None:
    """:func:`write_file` of JSON."""
    write_file(folder, name, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """What to say of a folder that cannot be written to."""
    return StoreError(
        f"{folder}: expected a folder that can be written to, found: {error.strerror or error}: "
        "make room or choose another folder"
    )


def remove_temporary(folder: Path, names: set[str]) -> None:
    """Remove what a killed process left of files that are complete by now."""
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["name"] in names:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any] | None:
    """``run.json``; None where there is none.

    Raises:
        StoreError: it is damaged.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
            raise ValueError("no fingerprint")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: expected what a run of this version wrote, found: {error}: {ELSEWHERE}") from None
    return content


def read_shard(folder: Path, number: int) -> ShardRecord | None:
    """What ``shard-0000k.json`` says; None where there is none, or one that is damaged."""
    try:
        content = json.loads((folder / f"shard-{number:05d}.json").read_bytes())
        failed = tuple(Failure(**failure) for failure in content.pop("failed"))
        record = ShardRecord(**content, failed=failed)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    names = shard_names(number, False)[:-1]
    well_formed = record.number == number and isinstance(record.files, dict) and set(names) <= set(record.files)
    return record if well_formed else None


def check_shard(folder: Path, number: int, run: str) -> ShardRecord | None:
    """A shard's record if it is complete, unharmed, and of this run: every byte is read."""
    record = read_shard(folder, number)
    if record is None or record.run != run:
        return None
    try:
        for name, expected in record.files.items():
            with open(folder / name, "rb") as file:
                if os.fstat(file.fileno()).st_size != expected["bytes"]:
                    return None
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return None
    except (OSError, KeyError, TypeError):
        return None
    return record


def set_aside(folder: Path, number: int) -> Path | None:
    """Move what there is of a damaged shard out of the way; where to, or None if there is nothing.

    Raises:
        StoreError: it cannot be moved.
    """
    there = [folder / name for name in reversed(shard_names(number, True)) if (folder / name).exists()]
    if not there:
        return None
    target = folder / ASIDE / f"{number:05d}-{secrets.token_hex(4)}"
    try:
        target.mkdir(parents=True)
        for path in there:
            os.replace(path, target / path.name)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return target


def remove_store(folder: Path) -> None:
    """Delete a store's files, those first that vouch for others, and nothing else in the folder.

    Raises:
        StoreError: they cannot be deleted.
    """
    try:
        found = [p for p in folder.iterdir() if STORE_FILE.fullmatch(p.name) or _TEMPORARY.fullmatch(p.name)]
        for path in sorted(found, key=lambda p: (p.name != RUN_FILE, not p.name.startswith("shard"), p.name)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def shard_numbers(folder: Path) -> list[int]:
    """The shards that are complete, by their names."""
    try:
        return sorted(int(match[1]) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name)))
    except OSError as error:
        raise StoreError(f"{folder}: expected a folder of embeddings, found: {error.strerror or error}") from None


def write_failed(folder: Path) -> list[Failure]:
    """Write ``failed.csv``: the clips that failed and that no later shard has; none, no file."""
    with locked(folder):
        failed = failures(folder, shard_numbers(folder))
        if failed:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(Failure._fields)
            writer.writerows(failed)
            write_file(folder, FAILED_FILE, text.getvalue().encode())
        else:
            (folder / FAILED_FILE).unlink(missing_ok=True)
            remove_temporary(folder, {FAILED_FILE})
    return failed


def read_parquet(path: Path, columns: list[str] | None = None) -> "pa.Table":
    """A Parquet file, whatever its folder's name: Arrow opens none whose path is not UTF-8."""
    from pyarrow import parquet

    with open(path, "rb") as file:
        return parquet.read_table(file, columns=columns)


def failures(folder: Path, numbers: Sequence[int]) -> list[Failure]:
    """The clips that failed in some shard, and that no shard has."""
    records = [record for number in numbers if (record := read_shard(folder, number)) is not None]
    failed = {failure.id: failure for record in records for failure in record.failed}
    if not failed:
        return []
    first = min(record.number for record in records if record.failed)
    for record in records:
        if record.number > first:
            path = folder / f"meta-{record.number:05d}.parquet"
            for name in read_parquet(path, ["id"])["id"].to_pylist():
                failed.pop(name, None)
    return list(failed.values())


class StoredClip(NamedTuple):
    """A clip of a store: its row of the metadata, its scene embedding, and with timestamps its frames and times."""

    meta: Mapping[str, Any]
    scene: np.ndarray  # [S]
    frames: np.ndarray | None  # [T, D]
    times: np.ndarray | None  # [T], milliseconds


class EmbeddingStore:
    """Embeddings that ``gura-jax embed`` wrote: read where they are, never all at once.

    ``store["id"]`` is a clip, ``len(store)`` and iteration are over clips, ``store.filter(...)`` is a part.
    Shards that are not complete are left out, so a store can be read while it is written.

    Args:
        folder: the store.

    Raises:
        StoreError: there is no store, or a shard's files are missing or of other sizes than it says.

    Attributes:
        run: what ``run.json`` says.
        meta: a row a clip, an Arrow table; ``shard`` and ``row`` are where it is.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import pyarrow as pa

        self.folder = Path(folder)
        run = read_run(self.folder) if self.folder.is_dir() else None
        if run is None:
            raise StoreError(f"{self.folder}: expected a folder of embeddings with a {RUN_FILE}, found none")
        self.run: Mapping[str, Any] = run
        tables = []
        for number in shard_numbers(self.folder):
            record = read_shard(self.folder, number)
            if record is None or record.run != run["fingerprint"]:
                raise _damaged(self.folder, f"shard-{number:05d}.json")
            for name, expected in record.files.items():
                path = self.folder / name
                if not path.is_file() or path.stat().st_size != expected["bytes"]:
                    raise _damaged(self.folder, name)
            try:
                table = read_parquet(self.folder / f"meta-{number:05d}.parquet")
            except (pa.ArrowException, OSError):
                raise _damaged(self.folder, f"meta-{number:05d}.parquet") from None
            table = table.append_column("shard", pa.array([number] * len(table), pa.int64()))
            tables.append(table.append_column("row", pa.array(range(len(table)), pa.int64())))
        self.meta: pa.Table = (
            pa.concat_tables(tables, promote_options="default")
            if tables
            else pa.table(
                {"id": pa.array([], pa.string()), "shard": pa.array([], pa.int64()), "row": pa.array([], pa.int64())}
            )
        )
        self._arrays: dict[str, np.ndarray] = {}
        self._rows: dict[str, int] | None = None

    def __repr__(self) -> str:
        return f"<gura_jax.EmbeddingStore {self.folder}: {len(self)} clips by {self.run['system']['name']}>"

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def ids(self) -> list[str]:
        """Ids of the clips, in order."""
        return self.meta["id"].to_pylist()

    def __contains__(self, name: object) -> bool:
        return name in self._index()

    def __getitem__(self, name: str) -> StoredClip:
        """The clip of this id.

        Raises:
            KeyError: there is none.
        """
        index = self._index()
        if name not in index:
            raise KeyError(f"{self.folder}: no clip {name!r}")
        return self._clip(self.meta.slice(index[name], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[StoredClip]:
        for batch in self.meta.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield self._clip(row)

    def filter(self, expression: "pc.Expression") -> "EmbeddingStore":
        """The clips whose metadata fulfil an Arrow expression, as ``pyarrow.compute.field("split") == "train"``.

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
        part.__dict__ |= self.__dict__ | {"meta": meta, "_rows": None}
        return part

    def scenes(self) -> np.ndarray:
        """Scene embeddings of all clips in order, [n, S], in memory."""
        shards, rows = (self.meta[name].to_numpy() for name in ("shard", "row"))
        size, dtype = self.run["scene_embedding_size"], self.run["storage"]
        out = np.empty((len(rows), size), dtype)
        for shard in dict.fromkeys(shards.tolist()):
            chosen = shards == shard
            out[chosen] = self._array("scene", shard)[rows[chosen]]
        return out

    def to_arrow(self, *, embeddings: bool = False) -> "pa.Table":
        """The metadata, and with ``embeddings`` a column ``scene`` of lists."""
        import pyarrow as pa

        if not embeddings:
            return self.meta
        scenes = self.scenes()
        values = pa.FixedSizeListArray.from_arrays(pa.array(scenes.ravel()), scenes.shape[1])
        return self.meta.append_column("scene", values)

    def to_pandas(self) -> "pandas.DataFrame":
        """The metadata as a data frame (needs pandas)."""
        try:
            import pandas  # noqa: F401
        except ModuleNotFoundError:
            raise StoreError("expected pandas: pip install pandas, or use to_arrow()") from None
        return self.meta.to_pandas()

    def _index(self) -> dict[str, int]:
        if self._rows is None:
            self._rows = {name: i for i, name in enumerate(self.ids)}
        return self._rows

    def _array(self, kind: str, shard: int) -> np.ndarray:
        name = f"{kind}-{shard:05d}.npy"
        if name not in self._arrays:
            try:
                self._arrays[name] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                raise _damaged(self.folder, name) from None
        return self._arrays[name]

    def _clip(self, row: dict[str, Any]) -> StoredClip:
        shard, number = row["shard"], row["row"]
        frames = times = None
        if "frame_start" in row and row["frame_start"] is not None:
            start = row["frame_start"]
            frames = self._array("frames", shard)[start : start + row["num_frames"]]
            times = row["frame_offset_ms"] + row["frame_hop_ms"] * np.arange(row["num_frames"])
        return StoredClip(row, self._array("scene", shard)[number], frames, times)


def _damaged(folder: Path, name: str) -> StoreError:
    return StoreError(
        f"{folder / name}: expected a file as its shard describes it, found one that is missing or damaged: "
        "run gura-jax embed again, with the same arguments, to compute that shard anew"
    )
