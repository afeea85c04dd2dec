"""Manifests as inputs: CSV, JSON Lines or Parquet, a row a clip."""

import functools
import hashlib
import io
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gura_jax.dataset.columns import STORE_COLUMNS, is_written
from gura_jax.dataset.sources.source import Options, Source, check_inside, encoded
from gura_jax.errors import InputError, reason
from gura_jax.objects import SCHEMES, WRITTEN, check_url, pinned, read_object, scheme

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {".csv": "CSV", ".jsonl": "JSON Lines", ".parquet": "Parquet"}
ROWS_AT_ONCE = 1 << 16
# URLs of buckets that check_url returns as they are: of plain characters, without a query.
_PLAIN_URL = rf"^(?:{'|'.join(WRITTEN)})://[A-Za-z0-9._-]+(?:/[ !-%'-.0->@-\[\]-~]+)+$"
_DOTS = r"/\.\.?(?:/|$)"


class Manifest(Source):
    """A table with the columns ``id`` and ``path``, perhaps ``offset`` and ``duration`` in seconds, and any others."""

    distinct = True

    def recognises(self, given: str) -> bool:
        return os.path.splitext(given)[1].lower() in FORMATS and (scheme(given) in SCHEMES or os.path.isfile(given))

    def signature(self, given: str, options: Options) -> str | None:
        try:
            content = read_object(pinned(check_url(given))) if scheme(given) else Path(given).read_bytes()
        except OSError:
            return None  # the table's error says why
        root = os.path.abspath(options.root or ".") if not scheme(options.root or "") else options.root
        return f"{hashlib.sha256(content).hexdigest()} {os.path.abspath(given)} {root} {options.allow_outside}"

    def table(self, given: str, options: Options) -> "pa.Table":
        import pyarrow as pa

        path = pinned(check_url(given)) if scheme(given) else given
        table = _read_table(path)
        _check_names(path, table)
        columns = _typed_columns(path, table)
        root = options.root if options.root is not None else os.path.dirname(path)
        columns["path"] = _checked_paths(path, columns, root, options.allow_outside)
        return pa.table(columns | {name: table[name] for name in table.column_names if name not in columns})


def _read_table(path: str) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv, parquet
    from pyarrow import json as arrow_json

    strings = {"id": pa.string(), "path": pa.string()}
    suffix = os.path.splitext(path)[1].lower()
    try:
        # Arrow itself opens no file whose name is not UTF-8.
        with io.BytesIO(read_object(path)) if scheme(path) else open(path, "rb") as file:
            if suffix == ".csv":
                options = csv.ConvertOptions(column_types=strings, strings_can_be_null=True)
                table = csv.read_csv(file, convert_options=options)
            elif suffix == ".jsonl":
                table = arrow_json.read_json(file)
            else:
                table = parquet.read_table(file)
        table.validate(full=True)
        str(table.column_names)  # may not be Unicode
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a manifest in {FORMATS[suffix]}, found one that cannot be read: {reason(error)}"
        ) from None


def _check_names(path: str, table: "pa.Table") -> None:
    names = table.column_names
    if "id" not in names or "path" not in names:
        raise InputError(
            f"{path}: expected the columns id and path (and perhaps offset and duration, in seconds), "
            f"found {', '.join(names) or 'none'}"
        )
    refused = {name for name in names if names.count(name) > 1 or is_written(name)}
    if refused:
        raise InputError(
            f"{path}: expected each column once, and none that the store writes ({', '.join(STORE_COLUMNS)}), "
            f"found {', '.join(sorted(refused))}: rename it"
        )
    if not len(table):
        raise InputError(f"{path}: expected rows, found an empty manifest")


def _typed_columns(path: str, table: "pa.Table") -> dict[str, Any]:
    """Cast id and path to strings, offset and duration to seconds."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: dict[str, Any] = {}
    for name in ("id", "path"):
        if not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)) and not (
            name == "id" and pa.types.is_integer(table[name].type)
        ):
            raise InputError(f"{path}: expected the column {name} to hold strings, found {table[name].type}")
        columns[name] = table[name].cast(pa.string())
    for name in ("offset", "duration"):
        values = table[name] if name in table.column_names else pa.nulls(len(table), pa.float64())
        try:
            columns[name] = values.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{path}: expected the column {name} to hold seconds, found: {error}") from None
    columns["offset"] = pc.fill_null(columns["offset"], 0.0)  # pyright: ignore[reportAttributeAccessIssue]
    return columns


def _checked_paths(path: str, columns: Mapping[str, Any], root: str, allow_outside: bool) -> "pa.ChunkedArray":
    """Check all rows, and return the encoded paths of their files."""
    import pyarrow as pa
    import pyarrow.compute as pc

    c: Any = pc  # its functions are made when it is imported
    ids, files, offsets, durations = (columns[name] for name in ("id", "path", "offset", "duration"))
    faults = [
        c.fill_null(c.equal(c.binary_length(ids), 0), True),
        c.fill_null(c.equal(c.binary_length(files), 0), True),
        c.fill_null(c.match_substring(files, "\0"), False),
        c.invert(c.and_(c.is_finite(offsets), c.greater_equal(offsets, 0))),
        c.fill_null(c.invert(c.and_(c.is_finite(durations), c.greater(durations, 0))), False),
    ]
    faulty = c.index(functools.reduce(c.or_, faults), True).as_py()
    if faulty >= 0:
        row = [column[faulty].as_py() for column in (ids, files, offsets, durations)]
        raise InputError(f"{path}, row {faulty + 1}: {_fault(*row)}")
    if c.count_distinct(ids).as_py() < len(ids):
        seen: dict[str, int] = {}
        for number, name in enumerate(ids.to_pylist(), 1):
            if name in seen:
                raise InputError(
                    f"{path}, row {number}: expected ids that differ, found {name!r} of row {seen[name]} again"
                )
            seen[name] = number
    paths: list[pa.Array] = []
    parents: dict[str, str] = {}
    for start in range(0, len(files), ROWS_AT_ONCE):
        part = files.slice(start, ROWS_AT_ONCE).combine_chunks()
        part = part.chunk(0) if isinstance(part, pa.ChunkedArray) else part
        plain = c.and_not(c.match_substring_regex(part, _PLAIN_URL), c.match_substring_regex(part, _DOTS))
        # Where every row is a URL that needs no change, there is nothing to do a row at a time.
        if not c.all(plain).as_py():
            made = [
                encoded(_full_path(file, root, f"{path}, row {number}: ", allow_outside, parents))
                for number, file in enumerate(part.to_pylist(), start + 1)
            ]
            part = pa.array(made, pa.string())
        paths.append(part)
    return pa.chunked_array(paths, pa.string())


def _fault(name: str | None, file: str | None, offset: float, duration: float | None) -> str:
    if not name or not file:
        return f"expected an id and a path, found id {name!r} and path {file!r}"
    if "\0" in file:
        return f"expected a path, found {file!r}"
    return f"expected an offset of 0 s or more and a duration over 0 s, found {offset} and {duration}"


def _full_path(file: str, root: str, where: str, allow_outside: bool, parents: dict[str, str]) -> str:
    """The path or URL of a row's file."""
    if scheme(file):
        try:
            return check_url(file)
        except InputError as error:
            raise InputError(f"{where}{error}") from None
    if not scheme(root):
        full = os.path.join(root, file)
        if not allow_outside:
            check_inside(full, root, where, parents)
        return full
    inside = posixpath.normpath(file)
    if inside.startswith(("/", "../")) or inside in (".", ".."):
        raise InputError(f"{where}expected a path below {root}, or a URL, found {file!r}: name another --root")
    return f"{root.rstrip('/')}/{inside}"
