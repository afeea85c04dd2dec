"""The commit protocol of a store: shards of embeddings, each complete or absent, in whatever place and format.

A shard k is its data files (:mod:`gura_jax.dataset.sinks`) and a record:

- ``shard-0000k.json``: size and sha256 of each data file, the run that they belong to, and the clips that failed. It
  is written last: where it stands, the shard is complete.

The metadata of a shard have a row a clip: ``id`` and ``path`` (string), ``offset`` (seconds into the file, float64),
``duration`` (seconds, float64) and ``num_samples`` (int64), both at the sample rate of ``run.json``; with timestamps
also ``num_frames`` and ``frame_start`` (int64, the clip's first row among the shard's frames), ``frame_offset_ms`` and
``frame_hop_ms`` (float64): the time of frame i is ``frame_offset_ms + i * frame_hop_ms``; with hidden states
``states_start`` and ``states_size`` (int64, see :mod:`gura_jax.dataset.states`); then a manifest's further columns.

Beside the shards, ``run.json`` says how the store was made, ``plan-00000.parquet`` which clips belong to which shard
and batch, and ``failed.csv`` which clips could not be embedded, and why.
"""

import csv
import functools
import io
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from gura_jax.dataset.places import Place, find_place
from gura_jax.dataset.sinks import DEFAULT, SINKS, Open, Shard, Sink
from gura_jax.errors import StoreError
from gura_jax.files import final_name, json_bytes, matches

if TYPE_CHECKING:
    import pyarrow as pa

RUN_FILE = "run.json"
FAILED_FILE = "failed.csv"
ELSEWHERE = "choose another folder, or remove this one (gura-jax embed: --overwrite)"
RECORD_THREADS = 8  # read records at once: they wait for disks and networks
ASIDE = "aside"  # folder for shards that were found damaged
_RECORD = re.compile(r"shard-(\d{5,})\.json")
PLAN = re.compile(r"plan-\d{5,}\.parquet")
_NUMBERED = re.compile(r"(?P<kind>[^.]+)-\d{5,}\.(?P<suffix>.+)")

Storage = Literal["float32", "float16"]
Location = str | PathLike[str] | Place
"""Where a store is: a folder, the URL of a bucket's prefix, or what :func:`find_place` makes of them."""


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

    def opener(self, location: Location) -> Open:
        """Return a function that opens the data files, for a sink to read."""
        place = find_place(location)
        return lambda file: place.open(data_file(file, self.number))


def data_file(file: str, number: int) -> str:
    """Return the name of a shard's data file: ``scene-00007.npy`` for ``scene.npy`` of shard 7."""
    kind, suffix = file.split(".", 1)
    return f"{kind}-{number:05d}.{suffix}"


def record_file(number: int) -> str:
    """Return the name of a shard's record."""
    return f"shard-{number:05d}.json"


def _all_data_files() -> list[str]:
    """Return the data files that a shard may have, of all formats, in the order of writing."""
    return list(dict.fromkeys(file for sink in SINKS.values() for file in sink.files(True, True)))


def is_store_file(name: str) -> bool:
    """Whether a file of this name belongs to a store: a shard's, a plan, ``run.json`` or ``failed.csv``."""
    if name in (RUN_FILE, FAILED_FILE) or _RECORD.fullmatch(name) or PLAN.fullmatch(name):
        return True
    match = _NUMBERED.fullmatch(name)
    return match is not None and f"{match['kind']}.{match['suffix']}" in _all_data_files()


def _find_sink(number: int, names: Iterable[str]) -> Sink | None:
    """Return the format with data files of these names; None if there is none."""
    found = set(names)
    for sink in SINKS.values():
        for timestamps, states in itertools.product((False, True), repeat=2):
            if found == {data_file(file, number) for file in sink.files(timestamps, states)}:
                return sink
    return None


def write_shard(
    location: Location,
    number: int,
    *,
    run: str,
    shard: Shard,
    failed: Sequence[Failure],
    sink: Sink = SINKS[DEFAULT],
) -> ShardRecord:
    """Write a shard, complete or not at all.

    Args:
        location: of the store.
        number: the shard's number.
        run: fingerprint of the run.
        shard: its content.
        failed: clips of the shard that have no row.
        sink: the store's format.

    Raises:
        StoreError: it cannot be written; no file of it is there then.
    """
    samples = sum(shard.meta["num_samples"].to_pylist())
    files: dict[str, Mapping[str, Any]] = {}
    place = find_place(location)
    with place.writer() as writer:
        # Where there are no locks, what another process has finished meanwhile is not to be touched.
        if (found := check_shard(place, number, run)) is not None:
            return found

        def create(file: str, write: Callable[[BinaryIO], object]) -> None:
            name = data_file(file, number)
            files[name] = writer.write(name, write)

        # In one piece: the bytes of a file depend on where a table is split.
        sink.write(shard._replace(meta=as_read(shard.meta).combine_chunks()), create)
        named = sink.files(shard.frames is not None, shard.states is not None)
        assert list(files) == [data_file(file, number) for file in named], "those it names"
        record = ShardRecord(number, run, len(shard.scenes), samples, files, tuple(failed))
        content = record._asdict() | {"failed": [failure._asdict() for failure in failed]}
        writer.publish(record_file(number), json_bytes(content), lambda: check_shard(place, number, run) is not None)
    return record


def remove_temporary(location: Location, numbers: Iterable[int]) -> None:
    """Remove what killed processes left of shards that are complete."""
    files = _all_data_files()
    find_place(location).remove_temporary(
        {name for n in numbers for name in (record_file(n), *(data_file(file, n) for file in files))}
    )


def as_read(table: "pa.Table") -> "pa.Table":
    """Return a table with the types that it has when read from a Parquet file, so that it is the same when resumed.

    Writing renames the elements of lists, and may drop the values of dictionaries that no row has.
    """
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table.schema.empty_table(), sink)
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type) and not field.type.ordered:
            table = table.set_column(i, field.name, table[i].cast(field.type.value_type).dictionary_encode())
    return table.cast(parquet.read_schema(pa.BufferReader(sink.getvalue())))


def check_free(location: Location) -> None:
    """Check that a place without ``run.json`` has no other files of a store.

    Raises:
        StoreError: it has.
    """
    place = find_place(location)
    there = sorted(name for name in place.sizes() if is_store_file(name))
    # Where there are no locks, another process may have begun meanwhile.
    if there and RUN_FILE not in there:
        raise StoreError(
            f"{place}: expected a folder without embeddings, or with a {RUN_FILE} to go on with, found "
            f"{there[0]}: {ELSEWHERE}"
        )


def read_run(location: Location) -> dict[str, Any] | None:
    """Read ``run.json``; None if there is none.

    Raises:
        StoreError: it is damaged, or cannot be read.
    """
    place = find_place(location)
    try:
        with place.open(RUN_FILE) as file:
            content = json.loads(file.read())
        if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
            raise ValueError("no fingerprint")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{place / RUN_FILE}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise StoreError(
            f"{place / RUN_FILE}: expected what a run of this version wrote, found: {error}: {ELSEWHERE}"
        ) from None
    return content


def read_shard(location: Location, number: int) -> ShardRecord | None:
    """Read a shard's record; None if there is none, or a damaged one.

    Raises:
        StoreError: it cannot be read.
    """
    place = find_place(location)
    try:
        with place.open(record_file(number)) as file:
            content = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise StoreError(f"{place / record_file(number)}: cannot be read: {error.strerror or error}") from None
    try:
        failed = tuple(Failure(**failure) for failure in content.pop("failed"))
        record = ShardRecord(**content, failed=failed)
    except (TypeError, AttributeError, KeyError):
        return None
    well_formed = record.number == number and isinstance(record.files, dict) and _find_sink(number, record.files)
    return record if well_formed else None


def check_shard(
    location: Location, number: int, run: str, sizes: Mapping[str, int] | None = None
) -> ShardRecord | None:
    """Return a shard's record if the shard is complete, undamaged and of this run.

    Args:
        location: of the store.
        number: the shard's number.
        run: fingerprint of the run.
        sizes: of all files, which are compared with the record's; None: every byte is read.
    """
    place = find_place(location)
    record = read_shard(place, number)
    if record is None or record.run != run:
        return None
    try:
        if sizes is not None:
            complete = all(sizes.get(name) == described["bytes"] for name, described in record.files.items())
        else:
            complete = all(_matches(place, name, described) for name, described in record.files.items())
    except (FileNotFoundError, KeyError, TypeError):
        return None
    except OSError as error:
        raise StoreError(f"{place}: shard {number} cannot be read: {error.strerror or error}") from None
    return record if complete else None


def _matches(place: Place, name: str, described: Mapping[str, Any]) -> bool:
    with place.open(name) as file:
        return matches(file, described)


def find_pending(location: Location, run: str, numbers: Sequence[int], *, verify: bool = False) -> list[int]:
    """Return the shards that are still to do, and move damaged ones aside.

    Args:
        location: of the store.
        run: fingerprint of the run.
        numbers: of the shards in question.
        verify: read every byte of the finished ones and compare it with its checksum, not their sizes alone.

    Raises:
        StoreError: a damaged shard cannot be moved.
    """
    place = find_place(location)
    with ThreadPoolExecutor(RECORD_THREADS) as threads:
        sizes = None if verify else place.sizes()
        check = functools.partial(check_shard, place, run=run, sizes=sizes)
        there = numbers if sizes is None else [n for n in numbers if record_file(n) in sizes]
        found = dict(zip(there, threads.map(check, there), strict=True))
    pending = [number for number in numbers if found.get(number) is None]
    for number in pending:
        if number not in found:
            continue  # it has no record: what is there of it will be written over
        with place.locked():
            # Meanwhile another process may have finished it.
            if check_shard(place, number, run) is None:
                set_aside(place, number)
    return pending


def set_aside(location: Location, number: int) -> str | None:
    """Move the files of a damaged shard out of the way, the record first.

    Returns:
        The folder that holds them now; None if there were none.

    Raises:
        StoreError: they cannot be moved.
    """
    place = find_place(location)
    sizes = place.sizes()
    names = [record_file(number), *(data_file(file, number) for file in reversed(_all_data_files()))]
    there = [name for name in names if name in sizes]
    if not there:
        return None
    try:
        return place.set_aside(there, f"{ASIDE}/{number:05d}-{secrets.token_hex(4)}")
    except OSError as error:
        raise place.cannot_write(error) from None


def remove_store(location: Location) -> None:
    """Delete the files of a store and nothing else there: ``run.json`` first, then records, then the others.

    Raises:
        StoreError: they cannot be deleted.
    """
    place = find_place(location)
    found = [name for name in place.sizes() if is_store_file(name) or final_name(name)]
    try:
        for name in sorted(found, key=lambda name: (name != RUN_FILE, not _RECORD.fullmatch(name), name)):
            place.remove(name)
    except OSError as error:
        raise place.cannot_write(error) from None


def shard_numbers(location: Location | Mapping[str, int]) -> list[int]:
    """Return the numbers of the shards that have a record, in order; of a store, or of the names in it."""
    names = location if isinstance(location, Mapping) else find_place(location).sizes()
    return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))


def failures(location: Location, numbers: Sequence[int]) -> list[Failure]:
    """Return the clips that failed in one of these shards, and that no shard has."""
    place = find_place(location)
    with ThreadPoolExecutor(RECORD_THREADS) as threads:
        found = threads.map(functools.partial(read_shard, place), numbers)
        records = [record for record in found if record is not None]
    failed = {failure.id: failure for record in records for failure in record.failed}
    if not failed:
        return []
    first = min(record.number for record in records if record.failed)
    for record in records:
        if record.number > first:
            for name in record.sink.meta(record.opener(place), ["id"])["id"].to_pylist():
                failed.pop(name, None)
    return list(failed.values())


def write_failed(location: Location) -> list[Failure]:
    """Write ``failed.csv``, the :func:`failures` of all shards; remove it if there are none."""
    place = find_place(location)
    with place.locked():
        failed = failures(place, shard_numbers(place))
        if failed:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(Failure._fields)
            writer.writerows(failed)
            place.write(FAILED_FILE, text.getvalue().encode())
        else:
            place.remove(FAILED_FILE)
            place.remove_temporary({FAILED_FILE})
    return failed
