"""Files that hold many clips, local or in a bucket: tar archives and tables. Found by name or pattern, and opened."""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from gura_jax import objects
from gura_jax.dataset.sources.buckets import is_one, listed
from gura_jax.dataset.sources.source import Options, Source, clip_table, joined, printable
from gura_jax.errors import AudioError, InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Container(Source):
    """A kind of file that holds many clips; an input is one, or a pattern of them.

    Attributes:
        suffixes: of its files, in small letters.
    """

    distinct = True
    suffixes: tuple[str, ...]

    def own(self, paths: Sequence[str]) -> list[str]:
        """Those of a folder's files that are of this kind."""
        return [path for path in paths if path.lower().endswith(self.suffixes)]

    def read(self, path: str) -> "pa.Table | None":
        """List the clips of one file, as :meth:`Source.table` does.

        Raises:
            InputError: it cannot be read.
        """
        ...

    def open_clip(self, path: str, version: str | None) -> BinaryIO:
        """As :meth:`Source.open`."""
        ...

    def table(self, given: str, options: Options) -> "pa.Table | None":
        """The clips of all files: see :meth:`clips`."""
        return self.clips(containers(given))

    def clips(self, paths: Sequence[str]) -> "pa.Table | None":
        """The clips of files; None if there are none.

        Of several, one that cannot be read is a row that cannot be opened, and the others go on. Names that repeat from
        one file to another have its name before them.

        Raises:
            InputError: the only one cannot be read; or columns differ in type.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        tables: list[pa.Table] = []
        owners: list[str] = []
        for path in paths:
            try:
                table = self.read(path)
            except InputError:
                if len(paths) == 1:
                    raise
                table = clip_table([(path, f"{self._unread}{path}")])
            if table is not None:
                tables.append(table)
                owners += [_stem(path)] * len(table)
        if not tables:
            return None
        c: Any = pc  # its functions are made when it is imported
        found = joined(tables)
        if len(tables) == 1 or c.count_distinct(found["id"]).as_py() == len(found):
            return found
        ids = c.binary_join_element_wise(pa.array(owners, pa.string()), found["id"], "/")
        return found.set_column(found.column_names.index("id"), "id", ids)

    def signature(self, given: str, options: Options) -> str | None:
        """A hash of the files' names, sizes and versions."""
        try:
            found = _described(given)
        except OSError as error:
            raise InputError(f"{given}: cannot be read: {error.strerror or error}") from None
        return hashlib.sha256(json.dumps(found).encode("utf-8", "backslashreplace")).hexdigest()

    def open(self, path: str, version: str | None = None) -> BinaryIO:
        if not path.startswith(self._unread):
            return self.open_clip(path, version)
        file = path[len(self._unread) :]
        try:
            self.read(file)
        except InputError as error:
            raise AudioError(str(error)) from None
        raise AudioError(f"{file}: it could not be read when the run was planned: try again")

    @property
    def _unread(self) -> str:
        """The start of the path of a file that could not be read."""
        return f"{self.scheme}://?/"


def _stem(path: str) -> str:
    return printable(path.rsplit("/", 1)[-1].split(".", 1)[0])


def containers(given: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """The files that an input names: one, or those that match a pattern and have such a suffix, in order."""
    if objects.scheme(given):
        url = objects.pinned(objects.check_url(given))
        return [url] if is_one(url) else sorted(key for key, *_ in listed(url) if key.lower().endswith(suffixes))
    if glob.has_magic(given) and not os.path.isfile(given):
        found = (path for path in glob.iglob(given, recursive=True) if path.lower().endswith(suffixes))
        return sorted(path for path in found if os.path.isfile(path))
    return [given]


def _described(given: str) -> list[objects.Entry]:
    """The same, with sizes and versions; of local files the times of change."""
    if objects.scheme(given):
        url = objects.pinned(objects.check_url(given))
        return [objects.entry(objects.locate(url))._replace(key=url)] if is_one(url) else sorted(listed(url))
    found = [(os.path.abspath(path), os.stat(path)) for path in containers(given)]
    return [objects.Entry(path, status.st_size, str(status.st_mtime_ns)) for path, status in found]


def open_container(path: str, at: int = 0, version: str | None = None) -> Any:
    """Open one of the files, unbuffered: see :func:`gura_jax.objects.open_object`."""
    return objects.open_object(path, at, version) if objects.scheme(path) else open(path, "rb")
