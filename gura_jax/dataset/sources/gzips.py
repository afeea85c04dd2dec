"""Archives that gzip compressed, read at any place: from points that are found in one pass and kept here."""

import collections
import contextlib
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

from gura_jax.dataset.sources.containers import open_container
from gura_jax.errors import InputError
from gura_jax.files import PositionedFile, cache_folder, locked, write_file
from gura_jax.objects import PINNED, scheme

SPACING = 2 << 20  # bytes between points, each of which takes 32 KiB
OPEN_ARCHIVES = 8
RATIO = 200  # of what is compressed to its archive: audio has 1 to 3, and a bomb 1000


class Gzip(PositionedFile):
    """The content of a compressed archive as a file.

    All that are open of one archive share its points, and read one after the other.

    Args:
        path: of the archive, or its URL.
        version: that it must have.

    Raises:
        InputError: indexed_gzip is missing.
        OSError: it cannot be read.

    Attributes:
        limit: bytes; where the content goes on beyond, it is a bomb.
    """

    def __init__(self, path: str, version: str | None = None) -> None:
        self._shared = _archive(path, version)
        self.version, self.limit = self._shared.version, RATIO * self._shared.size

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, unless the content ends before."""
        view = memoryview(buffer).cast("B")
        found = self._shared.read(self._position, len(view))
        view[: len(found)] = found
        self._position += len(found)
        return len(found)

    def keep(self) -> None:
        """Keep the points that were found for later runs."""
        self._shared.keep()


class _Archive:
    """An open archive and its points."""

    def __init__(self, key: tuple[Any, ...], path: str, version: str | None) -> None:
        self.key = key
        try:
            import indexed_gzip
        except ModuleNotFoundError:
            raise InputError(
                f"{path}: expected indexed_gzip, to read within a compressed archive, found none: "
                "pip install 'gura-jax[tar]'"
            ) from None
        file = open_container(path, version=version)
        self._file = _Watched(file)
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.version: str | None = getattr(file, "version", None)
        self._index = _index(path, file, self.size)
        self._lock = threading.Lock()
        self._errors = (indexed_gzip.ZranError, indexed_gzip.NotCoveredError, EOFError, ValueError)
        self._content: Any = indexed_gzip.IndexedGzipFile(fileobj=self._file, spacing=SPACING, buffer_size=1 << 20)
        if self._index is not None:
            with contextlib.suppress(*self._errors, OSError):
                self._content.import_index(str(self._index))

    def read(self, start: int, size: int) -> bytes:
        try:
            with self._lock:
                self._file.error = None
                self._content.seek(start)
                return self._content.read(size)
        except (*self._errors, OSError):  # indexed_gzip says the same of damage and of a file that cannot be read
            if (error := self._file.error) is None:
                raise OSError(5, "its compressed data are damaged or end too early") from None
        with _lock:  # whoever opens it next sees it as it is then
            _archives.pop(self.key, None)
        raise error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def keep(self) -> None:
        if self._index is None or self._index.exists():
            return
        with contextlib.suppress(OSError), self._lock:
            self._index.parent.mkdir(parents=True, exist_ok=True)
            points = io.BytesIO()
            self._content.export_index(fileobj=points)
            with locked(self._index.parent):
                write_file(self._index.parent, self._index.name, points.getvalue())


class _Watched:
    """A file that remembers why it could not be read."""

    error: OSError | None = None

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self.close, self._read = file.seek, file.tell, file.close, file.read

    def read(self, size: int = -1) -> bytes:
        try:
            return self._read(size)
        except OSError as error:
            self.error = error
            raise


def _index(path: str, file: Any, size: int) -> Path | None:
    """Where an archive's points are kept: by its name, its size, and what tells one content from another, if any."""
    if scheme(path) in PINNED:
        content = ""  # the name tells it
    elif scheme(path):
        content = file.version or file.modified
    else:
        content = os.stat(path).st_mtime_ns
    if content is None:
        return None
    name = hashlib.sha256(f"{path}\n{size}\n{content}".encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / "gzip" / name


_archives: "collections.OrderedDict[tuple[Any, ...], _Archive]" = collections.OrderedDict()
_lock = threading.Lock()


def _archive(path: str, version: str | None) -> _Archive:
    with _lock:
        key: tuple[Any, ...] = path, version
        if not scheme(path):
            status = os.stat(path)
            key = path, status.st_size, status.st_mtime_ns
        if key not in _archives:
            _archives[key] = _Archive(key, path, version)
            while len(_archives) > OPEN_ARCHIVES:
                _archives.popitem(last=False)
        _archives.move_to_end(key)
        return _archives[key]
