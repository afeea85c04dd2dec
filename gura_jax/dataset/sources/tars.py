"""Tar archives as inputs, as WebDataset has them: audio beside ``.json``, ``.txt`` and ``.cls``, local or in a bucket.

Nothing is unpacked: a clip is a range of bytes of its archive, which its path names:
``tar://OFFSET+SIZE/ARCHIVE!MEMBER``.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from gura_jax.dataset.sources.containers import Container, open_container
from gura_jax.dataset.sources.folders import is_audio
from gura_jax.dataset.sources.gzips import RATIO, Gzip
from gura_jax.dataset.sources.source import clip_table
from gura_jax.errors import AudioError, InputError, reason
from gura_jax.files import PositionedFile

if TYPE_CHECKING:
    import pyarrow as pa

SIDECARS = ("json", "txt", "cls")  # kept as text, in columns of these names
MAX_SIDECAR = MAX_HEADER = 1 << 20  # bytes
GZIPPED, REFUSED = (".tar.gz", ".tgz"), (".tar.bz2", ".tar.xz", ".tar.zst")
_PATH = re.compile(r"tar://(\d+)\+(\d+)/(.+?\.(?i:tar|tar\.gz|tgz))!(.+)", re.DOTALL)


class Tar(Container):
    """An archive, or a pattern of archives; ids are the names of the members."""

    scheme = "tar"
    distinct = False
    suffixes = (".tar", *GZIPPED, *REFUSED)

    def recognises(self, given: str) -> bool:
        return given.lower().endswith(self.suffixes) and not os.path.isdir(given)

    def read(self, path: str) -> "pa.Table | None":
        if path.lower().endswith(REFUSED):
            raise InputError(
                f"{path}: expected a .tar or .tar.gz, found one compressed otherwise, which can only be read from its "
                "start: decompress it first"
            )
        return _members(path)

    def open_clip(self, path: str, version: str | None) -> BinaryIO:
        match = _PATH.fullmatch(path)
        if match is None:
            raise AudioError(f"{path}: expected tar://OFFSET+SIZE/ARCHIVE!MEMBER")
        offset, size, archive = int(match[1]), int(match[2]), match[3]
        try:
            return _Part(_open(archive, offset, version), offset, size)  # pyright: ignore[reportReturnType]
        except FileNotFoundError:
            raise AudioError(f"{path}: expected an archive {archive}, found none") from None


def _open(archive: str, at: int = 0, version: str | None = None) -> Any:
    gzipped = archive.lower().endswith(GZIPPED)
    return Gzip(archive, version) if gzipped else open_container(archive, at, version)


def _members(archive: str) -> "pa.Table | None":
    """The clips of an archive, and the texts beside them.

    Raises:
        InputError: it cannot be read, is cut short, or has two members of one name.
    """
    clips: list[tuple[str, str]] = []
    keys: list[str] = []
    texts: dict[str, dict[str, str]] = {name: {} for name in SIDECARS}
    try:
        with _open(archive) as file:
            for member in _walk(archive, file):
                folder, _, name = member.name.rpartition("/")
                key, _, field = name.partition(".")
                key = f"{folder}/{key}"
                if field in SIDECARS and member.size <= MAX_SIDECAR:
                    file.seek(member.offset_data)
                    texts[field][key] = file.read(member.size).decode("utf-8", "backslashreplace")
                elif is_audio(member.name):
                    path = f"tar://{member.offset_data}+{member.size}/{archive}!{member.name}"
                    clips.append((member.name, path))
                    keys.append(key)
            if isinstance(file, Gzip):
                file.keep()
    except InputError:
        raise
    except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
        raise InputError(f"{archive}: expected a tar archive, found one that cannot be read: {reason(error)}") from None
    columns = {name: [found.get(key) for key in keys] for name, found in texts.items() if found}
    return clip_table(clips, **columns)  # pyright: ignore[reportArgumentType]


def _walk(archive: str, file: Any) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, in order, by their headers alone."""
    seen: set[str] = set()
    size = None
    if not isinstance(file, Gzip):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        end = before = 0
        while (member := tar.next()) is not None:
            end = tar.offset
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - else it keeps all
            if member.issparse():
                raise InputError(
                    f"{archive}: expected files as they are, found {member.name!r}, packed as a sparse file"
                )
            if end <= before:
                raise InputError(f"{archive}: expected a tar archive, found a header that leads back, at {before}")
            before = end
            if not member.isreg():
                continue
            stop = member.offset_data + member.size
            if isinstance(file, Gzip) and stop > file.limit:
                raise InputError(
                    f"{archive}: expected audio, found {stop} bytes, more than {RATIO} times the compressed: a bomb?"
                )
            if size is not None and stop > size:
                raise InputError(f"{archive}: expected a whole archive, found one that is cut within {member.name!r}")
            if member.name in seen:
                raise InputError(
                    f"{archive}: expected members that differ, found {member.name!r} twice: pack it again, without one"
                )
            seen.add(member.name)
            yield member
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{archive}: expected a whole archive, found no end after {len(seen)} files: it was cut")
    # Tools that pack fill their last record, with zeros.
    if any(file.read(tarfile.RECORDSIZE)):
        raise InputError(f"{archive}: expected one archive, found more after its end: unpack and pack it as one")


class _Headers:
    """A file for :mod:`tarfile`, which reads a header whole, however long it says that it is."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


class _Part(PositionedFile):
    """Some bytes of a file, as a file."""

    def __init__(self, file: Any, offset: int, size: int) -> None:
        self.file, self.offset, self.size = file, offset, size
        self.version = getattr(file, "version", None)

    def end(self) -> int:
        return self.size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._position)]
        self.file.seek(self.offset + self._position)
        done = 0
        while done < len(view) and (more := self.file.readinto(view[done:])):
            done += more
        self._position += done
        return done

    def close(self) -> None:
        self.file.close()
        super().close()
