"""The commit protocol of a store: a folder of shards of embeddings, each complete or absent, in whatever format.

A shard k is its data files (:mod:`gura_jax.dataset.sinks`) and a record:

- ``shard-0000k.json``: size and sha256 of each data file, the run that they belong to, and the clips that failed. It
  is written last: where it stands, the shard is complete.

The metadata of a shard have a row a clip: ``id`` and ``path`` (string), ``offset`` (seconds into the file, float64),
``duration`` (seconds, float64) and ``num_samples`` (int64), both at the sample rate of ``run.json``; with timestamps
also ``num_frames`` and ``frame_start`` (int64, the clip's first row among the shard's frames), ``frame_offset_ms`` and
``frame_hop_ms`` (float64): the time of frame i is ``frame_offset_ms + i * frame_hop_ms``; then a manifest's further
columns.

Beside the shards, ``run.json`` says how the store was made, ``plan-00000.parquet`` which clips belong to which shard
and batch, and ``failed.csv`` which clips could not be embedded, and why.
"""

import csv
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np

from gura_jax.dataset.sinks import DEFAULT, SINKS, Open, Shard, Sink
from gura_jax.errors import StoreError
from gura_jax.files import (
    AtomicFiles,
    cannot_write,
    final_name,
    json_bytes,
    locked,
    matches,
    remove_temporary,
    write_file,
)

if TYPE_CHECKING:
    import pyarrow as pa

RUN_FILE = "run.json"
FAILED_FILE = "failed.csv"
ELSEWHERE = "choose another folder, or remove this one (gura-jax embed: --overwrite)"
ASIDE = "aside"  # folder for shards that were found damaged
_RECORD = re.compile(r"shard-(\d{5,})\.json")
_PLAN = re.compile(r"plan-\d{5,}\.parquet")
_NUMBERED = re.compile(r"(?P<kind>[^.]+)-\d{5,}\.(?P<suffix>.+)")

Storage = Literal["float32", "float16"]


class Failure(NamedTuple):
    """A clip that could not be embedded."""

    id: str
    path: str
    reason: str


class ShardRecord(NamedTuple):
    """Content of ``shard-0000k.json``."""

    number: int
    run: str
    clips: int
    samples: int
    files: Mapping[str, Mapping[str, Any]]
    failed: tuple[Failure, ...]

    @property
    def sink(self) -> Sink:
        """The format of the data files."""
        sink = _find_sink(self.number, self.files)
        assert sink is not None, "read_shard returns no other records"
        return sink

    def opener(self, folder: Path) -> Open:
        """Return a function that opens the data files, for a sink to read."""
        return lambda file: open(folder / data_file(file, self.number), "rb")


def data_file(file: str, number: int) -> str:
    """Return the name of a shard's data file: ``scene-00007.npy`` for ``scene.npy`` of shard 7."""
    kind, suffix = file.split(".", 1)
    return f"{kind}-{number:05d}.{suffix}"


def record_file(number: int) -> str:
    """Return the name of a shard's record."""
    return f"shard-{number:05d}.json"


def _all_data_files() -> list[str]:
    """Return the data files that a shard may have, of all formats, in the order of writing."""
    return list(dict.fromkeys(file for sink in SINKS.values() for file in sink.files(True)))


def is_store_file(name: str) -> bool:
    """Whether a file of this name belongs to a store: a shard's, a plan, ``run.json`` or ``failed.csv``."""
    if name in (RUN_FILE, FAILED_FILE) or _RECORD.fullmatch(name) or _PLAN.fullmatch(name):
        return True
    match = _NUMBERED.fullmatch(name)
    return match is not None and f"{match['kind']}.{match['suffix']}" in _all_data_files()


def _find_sink(number: int, names: Iterable[str]) -> Sink | None:
    """Return the format with data files of these names; None if there is none."""
    found = set(names)
    for sink in SINKS.values():
        for timestamps in (False, True):
            if found == {data_file(file, number) for file in sink.files(timestamps)}:
                return sink
    return None


def write_shard(
    folder: Path,
    number: int,
    *,
    run: str,
    scenes: np.ndarray,
    frames: Sequence[np.ndarray] | None,
    meta: "pa.Table",
    failed: Sequence[Failure],
    sink: Sink = SINKS[DEFAULT],
) -> ShardRecord:
    """Write a shard, complete or not at all.

    Args:
        folder: the store.
        number: the shard's number.
        run: fingerprint of the run.
        scenes: [n, S].
        frames: [T, D] of each clip, one array at least; None without timestamps.
        meta: n rows.
        failed: clips of the shard that have no row.
        sink: the store's format.

    Raises:
        StoreError: it cannot be written; no file of it is there then.
    """
    samples = sum(meta["num_samples"].to_pylist())
    files: dict[str, Mapping[str, Any]] = {}
    with AtomicFiles(folder) as atomic:

        def create(file: str, write: Callable[[BinaryIO], object]) -> None:
            name = data_file(file, number)
            files[name] = atomic.write(name, write)

        sink.write(Shard(meta, scenes, frames), create)
        assert list(files) == [data_file(file, number) for file in sink.files(frames is not None)], "those it names"
        record = ShardRecord(number, run, len(scenes), samples, files, tuple(failed))
        content = record._asdict() | {"failed": [failure._asdict() for failure in failed]}
        atomic.write(record_file(number), lambda file: file.write(json_bytes(content)))
        with locked(folder):
            there = read_shard(folder, number)
            # Another process may have been given the same shard, and have been faster.
            if there is None or there.run != run:
                atomic.commit()
        remove_temporary(folder, {*files, record_file(number)})
    return record


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read ``run.json``; None if there is none.

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
    """Read a shard's record; None if there is none, or a damaged one."""
    try:
        content = json.loads((folder / record_file(number)).read_bytes())
        failed = tuple(Failure(**failure) for failure in content.pop("failed"))
        record = ShardRecord(**content, failed=failed)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    well_formed = record.number == number and isinstance(record.files, dict) and _find_sink(number, record.files)
    return record if well_formed else None


def check_shard(folder: Path, number: int, run: str) -> ShardRecord | None:
    """Return a shard's record if the shard is complete, undamaged and of this run; every byte is read."""
    record = read_shard(folder, number)
    if record is None or record.run != run:
        return None
    try:
        complete = all(matches(folder / name, described) for name, described in record.files.items())
    except (OSError, KeyError, TypeError):
        return None
    return record if complete else None


def set_aside(folder: Path, number: int) -> Path | None:
    """Move the files of a damaged shard out of the way, the record first.

    Returns:
        The folder that holds them now; None if there were none.

    Raises:
        StoreError: they cannot be moved.
    """
    names = [record_file(number), *(data_file(file, number) for file in reversed(_all_data_files()))]
    there = [folder / name for name in names if (folder / name).exists()]
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
    """Delete the files of a store and nothing else in the folder: ``run.json`` first, then records, then the others.

    Raises:
        StoreError: they cannot be deleted.
    """
    try:
        found = [p for p in folder.iterdir() if is_store_file(p.name) or final_name(p.name)]
        for path in sorted(found, key=lambda p: (p.name != RUN_FILE, not _RECORD.fullmatch(p.name), p.name)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def shard_numbers(folder: Path) -> list[int]:
    """Return the numbers of the shards that have a record, in order."""
    try:
        return sorted(int(match[1]) for path in folder.iterdir() if (match := _RECORD.fullmatch(path.name)))
    except OSError as error:
        raise StoreError(f"{folder}: expected a folder of embeddings, found: {error.strerror or error}") from None


def failures(folder: Path, numbers: Sequence[int]) -> list[Failure]:
    """Return the clips that failed in one of these shards, and that no shard has."""
    records = [record for number in numbers if (record := read_shard(folder, number)) is not None]
    failed = {failure.id: failure for record in records for failure in record.failed}
    if not failed:
        return []
    first = min(record.number for record in records if record.failed)
    for record in records:
        if record.number > first:
            for name in record.sink.meta(record.opener(folder), ["id"])["id"].to_pylist():
                failed.pop(name, None)
    return list(failed.values())


def write_failed(folder: Path) -> list[Failure]:
    """Write ``failed.csv``, the :func:`failures` of all shards; remove it if there are none."""
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
