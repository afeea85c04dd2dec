"""Parquet tables with a column of audio as inputs, as Hugging Face datasets writes them, local or by URL.

A table is read by groups of rows, of which each is compressed by itself: a clip's path names its group and its row,
``parquet://GROUP/FILE!ROW/NAME``. A group is fetched once for all of its clips, which the plan keeps together.
"""

import collections
import io
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from gura_jax.dataset.columns import is_written
from gura_jax.dataset.plan import COLUMNS
from gura_jax.dataset.sources.containers import Container, containers, open_container
from gura_jax.dataset.sources.source import decoded, encoded, printable
from gura_jax.errors import AudioError, InputError, reason

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
CACHE_BYTES = 1 << 31  # of groups that are held; one by itself may exceed them
_PATH = re.compile(r"parquet://(\d+)/(.+?\.parquet)!(\d+)/(.*)", re.DOTALL)


class AudioTable(Container):
    """A table, or a pattern of tables; ids are the names that the column of audio has. Other columns are kept."""

    scheme = "parquet"
    suffixes = (SUFFIX,)
    unit = r"^parquet://\d+/.+?\.parquet!"

    def recognises(self, given: str) -> bool:
        try:
            return given.endswith(SUFFIX) and bool(self.own(containers(given)))
        except (OSError, ValueError):
            return False  # a manifest's error says what it is

    def own(self, paths: Sequence[str]) -> list[str]:
        """All tables, if any has audio: others beside it are refused when they are read."""
        tables = [path for path in paths if path.endswith(SUFFIX)]
        return tables if any(map(_has_audio, tables)) else []

    def read(self, path: str) -> "pa.Table | None":
        return _rows(path)

    def open_clip(self, path: str, version: str | None) -> BinaryIO:
        match = _PATH.fullmatch(path)
        if match is None:
            raise AudioError(f"{path}: expected parquet://GROUP/FILE!ROW/NAME")
        group, file, row = int(match[1]), match[2], int(match[3])
        found = _groups.get((file, group, version), lambda reserve: _read_group(file, group, version, reserve))
        values, own = found
        content = values[row].as_py()
        if content is None:
            raise AudioError(f"{path}: expected the bytes of a file, found none in this row of the table")
        clip = _Clip(content)
        clip.version = own
        return clip


class _Clip(io.BytesIO):
    version: str | None = None  # of the table


def _schema(path: str) -> "pa.Schema":
    from pyarrow import parquet

    with open_container(decoded(path)) as file:
        return parquet.read_schema(file)


def _has_audio(path: str) -> bool:
    """Whether a file is a table with one column of audio, or several; not a manifest, which may have such columns."""
    import pyarrow as pa

    try:
        schema = _schema(path)
    except (pa.ArrowException, OSError, ValueError):
        return False
    manifest = {"id", "path"} <= set(schema.names)
    return _audio_column(schema) is not None or (not manifest and bool(_audio_columns(schema)))


def _audio_columns(schema: "pa.Schema") -> list[str]:
    """The columns with ``bytes`` inside."""
    import pyarrow as pa

    return [
        field.name
        for field in schema
        if pa.types.is_struct(field.type)
        and (index := field.type.get_field_index("bytes")) >= 0
        and (pa.types.is_binary(kind := field.type.field(index).type) or pa.types.is_large_binary(kind))
    ]


def _audio_column(schema: "pa.Schema") -> str | None:
    """The column of audio: what Hugging Face's metadata say, else one with ``bytes`` inside. Several: ``audio``."""
    found = _audio_columns(schema)
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        said = [name for name in found if features[name]["_type"] == "Audio"]
    except (KeyError, TypeError, ValueError):
        said = found
    return "audio" if "audio" in said else said[0] if len(said) == 1 else None


def _rows(path: str) -> "pa.Table | None":
    """The rows of a table as clips, without their audio; None if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    c: Any = pc  # its functions are made when it is imported
    try:
        with open_container(path) as file:
            source = parquet.ParquetFile(file)
            schema = source.schema_arrow
            if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
                raise InputError(f"{path}: expected each column once, found more of {', '.join(twice)}: rename them")
            audio = _audio_column(schema)
            if audio is None:
                raise InputError(
                    f"{path}: expected one column of audio (a struct of bytes and path, one of several called audio), "
                    f"found the columns {', '.join(schema.names)}"
                )
            named = schema.field(audio).type.get_field_index("path") >= 0
            kept = [field.name for field in schema if not _holds_bytes(field.type)]
            rows = source.read(columns=[*kept, *([f"{audio}.path"] if named else [])])
            sizes = [source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet table, found one that cannot be read: {reason(error)}") from None
    groups = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    names = c.struct_field(rows[audio], "path").to_pylist() if named else [None] * len(rows)
    stem = os.path.splitext(os.path.basename(path))[0]
    ids = [printable(name) if name else f"{stem}#{number}" for number, name in enumerate(names)]
    paths = [
        f"parquet://{group}/{encoded(path)}!{row}/{encoded(name or '')}"
        for (group, row), name in zip(groups, names, strict=True)
    ]
    columns: dict[str, Any] = {
        "id": pa.array(ids, pa.string()),
        "path": pa.array(paths, pa.string()),
        "offset": pa.array([0.0] * len(ids), pa.float64()),
        "duration": pa.nulls(len(ids), pa.float64()),
    }
    taken = (*columns, *COLUMNS)
    for name in kept:
        free = name
        while free in taken or is_written(free) or (free != name and free in kept):
            free = f"row_{free}"
        columns[free] = rows[name]
    return pa.table(columns) if ids else None


def _holds_bytes(kind: "pa.DataType") -> bool:
    """Whether values of a type may be whole files: audio, pictures."""
    import pyarrow as pa

    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _read_group(
    path: str, group: int, version: str | None, reserve: Callable[[int], None]
) -> tuple["pa.ChunkedArray", str | None]:
    """The bytes of each row of a group, and the version of the table."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    try:
        with open_container(path, version=version) as file:
            source = parquet.ParquetFile(file)
            audio = _audio_column(source.schema_arrow)
            metadata = source.metadata.row_group(group)
            chunks = [metadata.column(i) for i in range(metadata.num_columns)]
            reserve(sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == f"{audio}.bytes"))
            found = source.read_row_group(group, columns=[f"{audio}.bytes"])[audio]
            values = pc.struct_field(found, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
            return values, getattr(file, "version", None)
    except FileNotFoundError:
        raise AudioError(f"{path}: expected a table, found none") from None
    except (pa.ArrowException, IndexError, ValueError, KeyError) as error:
        raise AudioError(f"{path}: expected a Parquet table, found one that is damaged: {reason(error)}") from None


class _Groups:
    """What was read lately, each once, however many threads ask for it; and a bound on how much is held."""

    def __init__(self) -> None:
        self._found: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._sizes: dict[Any, int] = {}
        self._reading: set[Any] = set()
        self._changed = threading.Condition()

    def get(self, key: Any, read: Callable[[Callable[[int], None]], Any]) -> Any:
        """Return what is held, or read it; ``read`` says how much it will be, before it takes memory."""
        with self._changed:
            while key in self._reading:
                self._changed.wait()
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
            self._reading.add(key)
        try:
            value = read(lambda size: self._reserve(key, size))
            with self._changed:
                self._found[key] = value
            return value
        except BaseException:
            with self._changed:
                self._sizes.pop(key, None)
            raise
        finally:
            with self._changed:
                self._reading.discard(key)
                self._changed.notify_all()

    def _reserve(self, key: Any, size: int) -> None:
        with self._changed:
            while self._sizes and sum(self._sizes.values()) + size > CACHE_BYTES:
                if self._found:
                    oldest, _ = self._found.popitem(last=False)
                    del self._sizes[oldest]
                else:
                    self._changed.wait()  # for what others read
            self._sizes[key] = size


_groups = _Groups()
