"""Manifests as inputs: CSV, JSON Lines or Parquet, a row a clip."""

import io
import math
import os
import posixpath
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gura_jax.dataset.sources.source import Options, Source, check_inside, encoded
from gura_jax.errors import InputError
from gura_jax.objects import SCHEMES, check_url, read_object, scheme

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {".csv": "CSV", ".jsonl": "JSON Lines", ".parquet": "Parquet"}
# Columns that the store writes: a manifest may not have them, but for those that it gives.
RESERVED = ("num_samples", "num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")


class Manifest(Source):
    """A table with the columns ``id`` and ``path``, perhaps ``offset`` and ``duration`` in seconds, and any others."""

    distinct = True

    def recognises(self, given: str) -> bool:
        return os.path.splitext(given)[1].lower() in FORMATS and (scheme(given) in SCHEMES or os.path.isfile(given))

    def table(self, given: str, options: Options) -> "pa.Table":
        import pyarrow as pa

        path = check_url(given) if scheme(given) else given
        table = _read_table(path)
        _check_names(path, table)
        columns = _typed_columns(path, table)
        root = options.root if options.root is not None else os.path.dirname(path)
        columns["path"] = pa.array(_checked_paths(path, columns, root, options.allow_outside), pa.string())
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
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: expected a manifest in {FORMATS[suffix]}, found one that cannot be read: {reason}"
        ) from None


def _check_names(path: str, table: "pa.Table") -> None:
    names = table.column_names
    if "id" not in names or "path" not in names:
        raise InputError(
            f"{path}: expected the columns id and path (and perhaps offset and duration, in seconds), "
            f"found {', '.join(names) or 'none'}"
        )
    refused = {name for name in names if names.count(name) > 1 or name in RESERVED}
    if refused:
        raise InputError(
            f"{path}: expected each column once, and none that the store writes ({', '.join(RESERVED)}), "
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


def _checked_paths(path: str, columns: Mapping[str, Any], root: str, allow_outside: bool) -> list[str]:
    """Check each row, and return the encoded path of its file."""
    seen: dict[str, int] = {}
    paths: list[str] = []
    parents: dict[str, str] = {}
    rows = zip(*(columns[name].to_pylist() for name in ("id", "path", "offset", "duration")), strict=True)
    for number, (name, file, offset, duration) in enumerate(rows, 1):
        where = f"{path}, row {number}: "
        if not name or not file:
            raise InputError(f"{where}expected an id and a path, found id {name!r} and path {file!r}")
        if name in seen:
            raise InputError(f"{where}expected ids that differ, found {name!r} of row {seen[name]} again")
        seen[name] = number
        if "\0" in file:
            raise InputError(f"{where}expected a path, found {file!r}")
        if not (math.isfinite(offset) and offset >= 0 and (duration is None or 0 < duration < math.inf)):
            raise InputError(
                f"{where}expected an offset of 0 s or more and a duration over 0 s, found {offset} and {duration}"
            )
        paths.append(encoded(_full_path(file, root, where, allow_outside, parents)))
    return paths


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
