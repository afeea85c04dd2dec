"""Copies of a store: to another format of the store, or to another place."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gura_jax.dataset import commit
from gura_jax.dataset.commit import Location
from gura_jax.dataset.identity import check_same, in_format
from gura_jax.dataset.places import Folder, Place, find_place
from gura_jax.dataset.reader import EmbeddingStore
from gura_jax.dataset.sinks import DEFAULT, SINKS, Shard, Sink
from gura_jax.errors import StoreError
from gura_jax.files import json_bytes

BLOCK_BYTES = 1 << 23  # fetched at once


def copy_store(store: EmbeddingStore, out: Location, form: str) -> None:
    """Copy a store, shard by shard, through the commit protocol.

    The copy has the bytes of a run in that format, and ``gura-jax embed`` resumes it. Shards that it has are kept, so a
    copy that was killed goes on where it stopped. A shard is checked against its checksums before it is copied; one in
    a bucket is first fetched into a temporary folder.

    Args:
        store: the whole store.
        out: folder, or the URL of a bucket's prefix.
        form: a name in :data:`gura_jax.dataset.sinks.SINKS`.

    Raises:
        StoreError: ``store`` is a part of one or damaged, or the output cannot be written or holds something else.
    """
    copy_shards(store, out, in_format(store.run, form), lambda shard: shard)


def copy_shards(
    store: EmbeddingStore, out: Location, run: Mapping[str, Any], change: Callable[[Shard], Shard]
) -> list[commit.Failure]:
    """Write what becomes of each shard of a store to another place, through the commit protocol; or go on.

    Args:
        store: the whole store.
        out: folder, or the URL of a bucket's prefix.
        run: the ``run.json`` of what is written; its plan is the store's.
        change: what becomes of a shard.

    Returns:
        The clips that have no embedding.

    Raises:
        StoreError: see :func:`copy_store`.
    """
    from tqdm import tqdm

    if len(store) != sum(record.clips for record in store.records.values()):
        raise StoreError(f"{store.folder}: expected a whole store to copy, found a part: open it again")
    place = find_place(out)
    place.prepare()
    with place.locked():
        run = _begin(place, run)
        _copy_plans(store.place, place)
    sink = SINKS[run.get("format", DEFAULT)]
    pending = commit.find_pending(place, run["fingerprint"], list(store.records))
    for number in tqdm(pending, desc=str(place), unit="shard", disable=None):
        _copy_shard(store, number, place, run["fingerprint"], sink, change)
    failed = commit.write_failed(place)
    commit.remove_temporary(place, commit.shard_numbers(place))
    return failed


def _begin(place: Place, run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write ``run.json``, or return the one that is there, if it is of the same run."""
    there = commit.read_run(place)
    if there is None:
        commit.check_free(place)
        if place.create(commit.RUN_FILE, json_bytes(run)):
            return run
        there = commit.read_run(place) or run
    check_same(place, there, run)
    if there["plan_sha256"] != run["plan_sha256"]:
        raise StoreError(f"{place}: expected the plan of the store to copy, found another: {commit.ELSEWHERE}")
    return there


def _copy_plans(source: Place, place: Place) -> None:
    """Copy the plans that are not there: the first, which ``run.json`` has the hash of, and those of retries."""
    there = place.sizes()
    for number, name in enumerate(sorted(filter(commit.PLAN.fullmatch, source.sizes()))):
        if name in there and number == 0:
            continue
        content = _read(source, name)
        if name not in there:
            place.write(name, content)
        elif _read(place, name) != content:
            raise StoreError(
                f"{place / name}: expected the store's plan of clips tried again, found another: copy to another place"
            )


def _copy_shard(
    store: EmbeddingStore, number: int, place: Place, run: str, sink: Sink, change: Callable[[Shard], Shard]
) -> None:
    """Copy a shard; nothing of it stays in memory."""
    with _verified(store, number) as near:
        shard = change(store.read_shard(number, near))
        commit.write_shard(
            place,
            number,
            run=run,
            shard=shard,
            failed=store.records[number].failed,
            sink=sink,
        )


def _read(place: Place, name: str) -> bytes:
    try:
        with place.open(name) as file:
            return file.read()
    except OSError as error:
        raise StoreError(f"{place / name}: cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def _verified(store: EmbeddingStore, number: int) -> Iterator[Place]:
    """Give a folder with the files of a shard, whose bytes are those that its record describes."""
    record = store.records[number]
    with contextlib.ExitStack() as stack:
        near = store.place
        if not isinstance(near, Folder):
            near = Folder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gura-jax-export-"))))
            for name in [*record.files, commit.record_file(number)]:
                _fetch(store.place, name, near)
        if commit.check_shard(near, number, record.run) is None:
            raise StoreError(
                f"{store.place / commit.record_file(number)}: expected files with the checksums in it, found others: "
                "run gura-jax embed again, with the same arguments and --verify, to compute that shard anew"
            )
        yield near


def _fetch(source: Place, name: str, near: Folder) -> None:
    try:
        file = source.open(name)
    except OSError as error:
        raise StoreError(f"{source / name}: cannot be read: {error.strerror or error}") from None
    try:
        with file, open(near / name, "wb") as copy:
            shutil.copyfileobj(file, copy, BLOCK_BYTES)
    except OSError as error:
        raise StoreError(
            f"{source / name}: cannot be copied to {near}: {error.strerror or error}: make room there, or set TMPDIR "
            "to another folder"
        ) from None
