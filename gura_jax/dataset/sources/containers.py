"""Files that hold many clips, local or in a bucket: tar archives and tables. Found by name or pattern, and opened."""

import glob
import hashlib
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gura_jax import objects
from gura_jax.dataset.sources.buckets import is_one, listed
from gura_jax.dataset.sources.source import clip_table, printable
from gura_jax.errors import AudioError, InputError

if TYPE_CHECKING:
    import pyarrow as pa


def containers(given: str) -> list[str]:
    """The files that an input names: one, or those that match a pattern, in order."""
    if objects.scheme(given):
        url = objects.pinned(objects.check_url(given))
        return [url] if is_one(url) else sorted(listed(url))
    if glob.has_magic(given) and not os.path.isfile(given):
        return sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
    return [given]


def joined(paths: list[str], read: "Callable[[str], pa.Table | None]", kind: str) -> "pa.Table | None":
    """The clips of several files; None if there are none.

    Of several, one that cannot be read is a row that cannot be opened, and the others go on. Names that repeat from one
    file to another have its name before them.

    Raises:
        InputError: the only one cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tables: list[pa.Table] = []
    owners: list[str] = []
    for path in paths:
        try:
            table = read(path)
        except InputError:
            if len(paths) == 1:
                raise
            table = clip_table([(path, f"{kind}://?/{path}")])
        if table is not None:
            tables.append(table)
            owners += [_stem(path)] * len(table)
    if not tables:
        return None
    c: Any = pc  # its functions are made when it is imported
    found = pa.concat_tables(tables, promote_options="permissive")
    if c.count_distinct(found["id"]).as_py() == len(found) or len(tables) == 1:
        return found
    ids = c.binary_join_element_wise(pa.array(owners, pa.string()), found["id"], "/")
    return found.set_column(found.column_names.index("id"), "id", ids)


def _stem(path: str) -> str:
    return printable(path.rsplit("/", 1)[-1].split(".", 1)[0])


def raise_again(path: str, read: "Callable[[str], Any]", kind: str) -> None:
    """Say why a file cannot be read, where a path is that of such a row of :func:`joined`.

    Raises:
        AudioError: it is.
    """
    start = f"{kind}://?/"
    if path.startswith(start):
        try:
            read(path[len(start) :])
        except InputError as error:
            raise AudioError(str(error)) from None
        raise AudioError(f"{path[len(start) :]}: it could not be read when the run was planned: try again")


def signature(given: str) -> str:
    """A hash of the files' names, sizes and versions (local ones: times of change).

    Raises:
        InputError: one cannot be found.
    """
    found: list[tuple[str, int, str | int | None]] = []
    for path in containers(given):
        try:
            if objects.scheme(path):
                entry = objects.entry(path)
                found.append((path, entry.size, entry.version))
            else:
                status = os.stat(path)
                found.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return hashlib.sha256(json.dumps(found).encode("utf-8", "backslashreplace")).hexdigest()


def open_container(path: str, at: int = 0, version: str | None = None) -> Any:
    """Open one of the files, unbuffered: see :func:`gura_jax.objects.open_object`."""
    return objects.open_object(path, at, version) if objects.scheme(path) else open(path, "rb")
