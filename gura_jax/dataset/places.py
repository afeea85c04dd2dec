"""Where a store of embeddings is: a local folder, or a prefix of a bucket. The commit protocol sees no difference.

A folder promises that a renamed file is whole, and that of several the names change in order. A bucket promises that an
object is whole or absent, that a listing and a read after a write see it, and that of two writers of a new object one
is told so ("create"): no locks, no renames, no parts that are put together later.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gura_jax import files, objects
from gura_jax.errors import InputError, StoreError
from gura_jax.files import AtomicFiles

PROBE = ".probe"  # an object that is written to see whether it can be


class Writer(Protocol):
    """Files of a place that are published together; a context manager."""

    def __enter__(self) -> "Writer": ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        """Write a file; returns its size (``bytes``) and ``sha256``. It counts only with the last one.

        Raises:
            StoreError: it cannot be written.
        """
        ...

    def publish(self, name: str, content: bytes, is_there: Callable[[], bool]) -> None:
        """Write the last file, with which all count; unless they are there already.

        Raises:
            StoreError: they cannot be published.
        """
        ...


class Place(Protocol):
    """Files by plain names, in one folder or below one prefix."""

    def prepare(self) -> None:
        """Check that files can be written, before hours of work depend on it.

        Raises:
            StoreError: they cannot.
        """
        ...

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Keep other processes from planning and publishing here, where the place has locks."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Return the names that are here, and sizes in bytes.

        Raises:
            StoreError: there is no such place, or it cannot be listed.
        """
        ...

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it can seek.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        ...

    def writer(self) -> Writer:
        """Files that are published together."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, complete or not at all, in place of another one.

        Raises:
            StoreError: it cannot be written.
        """
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file if there is none, and say whether; the caller holds the lock.

        Raises:
            StoreError: it cannot be written.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: it cannot be removed.
        """
        ...

    def set_aside(self, names: list[str], folder: str) -> str:
        """Move files that are here into a folder within, in order, and return where they are now.

        Raises:
            OSError: they cannot be moved.
        """
        ...

    def remove_temporary(self, names: set[str]) -> None:
        """Remove what killed processes left of files with these names."""
        ...

    def cannot_write(self, error: OSError) -> StoreError:
        """Return the error to raise when writing fails."""
        ...

    def __truediv__(self, name: str) -> Any:
        """A file's path or URL, for messages."""
        ...


def find_place(location: "str | os.PathLike[str] | Place") -> Place:
    """Return the place of a path or URL.

    Raises:
        InputError: a URL that cannot be written to, or of no bucket.
    """
    if isinstance(location, (Folder, Bucket)):
        return location
    text = objects.check_place(os.fspath(location))  # pyright: ignore[reportArgumentType, reportCallIssue]
    kind = objects.scheme(text)
    if not kind:
        return Folder(Path(text))
    if kind not in objects.WRITTEN:
        raise InputError(f"{kind}://...: expected a folder, or a URL of {' or '.join(objects.WRITTEN)} for a store")
    return Bucket(objects.check_url(text))


class Folder:
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def prepare(self) -> None:
        """Create the folder if needed."""
        files.open_folder(self.path)

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """Hold the folder's lock."""
        return files.locked(self.path)

    def sizes(self) -> Mapping[str, int]:
        """Of the files, not of folders."""
        sizes: dict[str, int] = {}
        try:
            with os.scandir(self.path) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):  # another process renamed it meanwhile
                        if entry.is_file():
                            sizes[entry.name] = entry.stat().st_size
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(f"{self}: expected a folder of embeddings, found: {reason}") from None
        return sizes

    def open(self, name: str) -> BinaryIO:
        """Open a file; it can be mapped into memory."""
        return open(self.path / name, "rb")

    def writer(self) -> Writer:
        """Files that are renamed together, the last one last."""
        return _FolderWriter(self.path)

    def write(self, name: str, content: bytes) -> None:
        """By a temporary name."""
        files.write_file(self.path, name, content)

    def create(self, name: str, content: bytes) -> bool:
        """By a temporary name."""
        if (self.path / name).exists():
            return False
        files.write_file(self.path, name, content)
        return True

    def remove(self, name: str) -> None:
        """Unlink a file."""
        (self.path / name).unlink(missing_ok=True)

    def set_aside(self, names: list[str], folder: str) -> str:
        """Rename files into the folder."""
        target = self.path / folder
        target.mkdir(parents=True)
        for name in names:
            os.replace(self.path / name, target / name)
        return str(target)

    def remove_temporary(self, names: set[str]) -> None:
        """Remove files with temporary names."""
        files.remove_temporary(self.path, names)

    def cannot_write(self, error: OSError) -> StoreError:
        """Of this folder."""
        return files.cannot_write(self.path, error)


class _FolderWriter(AtomicFiles):
    """Files of a folder that are published together."""

    def __enter__(self) -> "_FolderWriter":
        return self

    def publish(self, name: str, content: bytes, is_there: Callable[[], bool]) -> None:
        self.write(name, lambda file: file.write(content))
        with files.locked(self.folder):
            # Another process may have been given the same work, and have been faster.
            if not is_there():
                self.commit()


class Bucket:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = objects.locate(url)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def __reduce__(self) -> Any:
        return Bucket, (self.url,)

    def _place(self, name: str) -> objects.Place:
        return objects.Place(self._root.store, f"{self._root.key}/{name}".lstrip("/"))

    def prepare(self) -> None:
        """Write an object, list, and remove it; one that a killed process left is the same."""
        try:
            objects.put(self._place(PROBE), b"")
            objects.children(self._root)
            objects.delete(self._place(PROBE))
        except OSError as error:
            raise self.cannot_write(error) from None

    def locked(self) -> contextlib.AbstractContextManager[object]:
        """There are no locks in a bucket."""
        return contextlib.nullcontext()

    def sizes(self) -> Mapping[str, int]:
        """Of the objects right below the prefix."""
        try:
            return objects.children(self._root)
        except OSError as error:
            raise StoreError(f"{self}: expected a bucket that can be listed, found: {error.strerror}") from None

    def open(self, name: str) -> BinaryIO:
        """Open an object by ranges."""
        return objects.ObjectFile(self._place(name), f"{self}/{name}")  # pyright: ignore[reportReturnType]

    def writer(self) -> Writer:
        """Objects that count with the last one."""
        return _BucketWriter(self)

    def write(self, name: str, content: bytes) -> None:
        """By one request."""
        self.put(name, content)

    def put(self, name: str, content: bytes | memoryview) -> str | None:
        """Write an object by one request, and return its version."""
        try:
            return objects.put(self._place(name), content)
        except OSError as error:
            raise self.cannot_write(error) from None

    def create(self, name: str, content: bytes) -> bool:
        """By one request, which fails where there is an object."""
        try:
            return objects.create(self._place(name), content)
        except OSError as error:
            raise self.cannot_write(error) from None

    def has(self, name: str, content: bytes) -> bool:
        """Whether an object has this content."""
        try:
            return objects.get(self._place(name)) == content
        except OSError:
            return False

    def version(self, name: str) -> str | None:
        """The version that an object has now; None if there is none."""
        try:
            return objects.entry(self._place(name)).version
        except OSError:
            return None

    def matches(self, name: str, described: Mapping[str, Any]) -> bool:
        """Whether an object has this size and sha256."""
        try:
            with self.open(name) as file:
                return files.matches(file, described)
        except OSError:
            return False

    def remove(self, name: str) -> None:
        """Delete an object."""
        objects.delete(self._place(name))

    def set_aside(self, names: list[str], folder: str) -> str:
        """Copy objects, through this machine, and delete them."""
        for name in names:
            objects.put(self._place(f"{folder}/{name}"), objects.get(self._place(name)))
            objects.delete(self._place(name))
        return f"{self}/{folder}"

    def remove_temporary(self, names: set[str]) -> None:
        """There are none: an object is whole or absent."""

    def cannot_write(self, error: OSError) -> StoreError:
        """Of this prefix."""
        return objects.cannot_write(str(self), error)


class _BucketWriter:
    """Objects of a bucket that count with the last one."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._written: dict[str, dict[str, Any]] = {}
        self._versions: dict[str, str | None] = {}

    def __enter__(self) -> "_BucketWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """What was written stays: without the last one it counts for nothing, and is written again."""

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        buffer = io.BytesIO()
        write(buffer)
        content = buffer.getbuffer()
        self._versions[name] = self.bucket.put(name, content)
        described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self._written[name] = described
        return described

    def publish(self, name: str, content: bytes, is_there: Callable[[], bool]) -> None:
        created = self.bucket.create(name, content)
        if created and self._is_whole():
            return
        # Another process was given the same work, and was faster; or an older run left it.
        if not created and (self.bucket.has(name, content) or is_there()):
            return
        if not self._is_whole(read=True):
            # Each has written over some of the other's: neither is whole.
            with contextlib.suppress(OSError):
                self.bucket.remove(name)
            raise StoreError(
                f"{self.bucket / name}: two processes wrote different embeddings at once: run again, with the same "
                "arguments, to compute that shard anew"
            )
        self.bucket.write(name, content)

    def _is_whole(self, *, read: bool = False) -> bool:
        """Whether the objects are still those that were written: by their versions, or by every byte."""
        if read:
            return all(self.bucket.matches(each, described) for each, described in self._written.items())
        return all(self.bucket.version(each) == version for each, version in self._versions.items())
