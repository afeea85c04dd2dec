"""Files and folders that are complete or absent, whatever kills the process that writes them.

A file is written under a temporary name, ``.NAME.<16 hex digits>.tmp``, and renamed when it is on the disk; a folder is
filled as ``.NAME.<random>`` and renamed. Files are named by a folder and a plain name in it.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gura_jax.errors import InputError, StoreError

LOCK_FILE = ".lock"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")


def cache_folder() -> Path:
    """Return the user's cache folder of gura_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gura_jax"


class PositionedFile(io.RawIOBase):
    """A file for reading that keeps its own position; subclasses read from there (``readinto``)."""

    _position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, from the start, from here (1) or from the end (2), where that is known."""
        base = self.end() if whence == io.SEEK_END else (0, self._position)[whence]
        self._position = max(0, base + offset)
        return self._position

    def end(self) -> int:
        """The place after the last byte.

        Raises:
            io.UnsupportedOperation: nobody knows it.
        """
        raise io.UnsupportedOperation("from the end, which is not known")


def is_folder(path: Path) -> bool:
    """Whether a folder is there, whatever text was given as its path."""
    try:
        return bool(path.name) and path.is_dir()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def open_folder(folder: Path) -> None:
    """Create a folder if needed, and check that it is writable before hours of work depend on it.

    Raises:
        StoreError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no other process plans or commits in it.

    Where the file system has no locks, nothing is held: processes that meet then write the same bytes.
    """
    from filelock import FileLock

    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


class AtomicFiles:
    """Files written under temporary names, and renamed in the order of writing by :meth:`commit`.

    A context manager: what was not committed when it ends is removed.

    Args:
        folder: the folder of all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Path] = {}

    def __enter__(self) -> "AtomicFiles":
        return self

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        """Write a file to the disk under a temporary name.

        Args:
            name: final name.
            write: gets the open file. It may write and tell, not seek.

        Returns:
            Size (``bytes``) and ``sha256`` of the file, as :func:`matches` takes them.

        Raises:
            StoreError: the file cannot be written.
        """
        path = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
        self._files[path] = self.folder / name
        try:
            with open(path, "xb") as raw:
                file = _Hashed(raw)
                write(file)  # pyright: ignore[reportArgumentType]
                raw.flush()
                os.fsync(raw.fileno())
            return {"bytes": file.size, "sha256": file.digest.hexdigest()}
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def commit(self) -> None:
        """Rename the files to their final names, and flush the folder to the disk.

        Raises:
            StoreError: a file cannot be renamed.
        """
        try:
            for path, final in self._files.items():
                os.replace(path, final)
            _sync(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from None

    def __exit__(self, *_: object) -> None:
        for path in self._files:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


class _Hashed(io.RawIOBase):
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        self.file.write(view)
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def _sync(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Write one file, complete or not at all. The caller holds the folder's lock (:func:`locked`).

    Raises:
        StoreError: it cannot be written.
    """
    with AtomicFiles(folder) as files:
        files.write(name, lambda file: file.write(content))
        files.commit()
    remove_temporary(folder, {name})


def write_json(folder: Path, name: str, value: Any) -> None:
    """Write a value as JSON by :func:`write_file`."""
    write_file(folder, name, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file that a user gave.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, found: {error}") from None


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file or folder in its own folder, and no path."""
    return name not in ("", ".", "..") and os.path.basename(name) == name and "\0" not in name


def plain_name(name: str, where: Path) -> str:
    """Return a name from an untrusted file, if it is no path.

    Args:
        name: the name.
        where: the file or folder that it comes from, for the message.

    Raises:
        InputError: it could lead to another folder.
    """
    if not is_plain_name(name):
        raise InputError(f"{where}: expected the name of a file in its folder, found {name!r}")
    return name


def matches(file: Any, described: Mapping[str, Any]) -> bool:
    """Whether an open file has the size and sha256 that :meth:`AtomicFiles.write` returned; reads every byte.

    Raises:
        OSError: it cannot be read.
        KeyError: the description lacks one of both.
    """
    if file.seek(0, os.SEEK_END) != described["bytes"]:
        return False
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest() == described["sha256"]


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Return the error for a folder that cannot be written to."""
    return StoreError(
        f"{folder}: expected a folder that can be written to, found: {error.strerror or error}: "
        "make room or choose another folder"
    )


def final_name(name: str) -> str | None:
    """Return the final name of a temporary file; None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None


def remove_temporary(folder: Path, names: set[str]) -> None:
    """Remove the temporary files that killed processes left of files with these names."""
    for path in folder.iterdir():
        if final_name(path.name) in names:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, which replaces ``target`` when the block ends without an error.

    Raises:
        OSError: a folder cannot be created or renamed. An older ``target`` is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, target: Path) -> None:
    """Rename a folder to ``target``. An older ``target`` is moved away first, and back if the renaming fails.

    A process that is killed between the two renames leaves no ``target``: see :func:`recover_folder`.
    """
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / "old"
        try:
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(old, target)
                raise
        finally:
            if target.exists():
                shutil.rmtree(old.parent, ignore_errors=True)
    else:
        os.rename(temporary, target)
    _sync(target.parent)


def recover_folder(target: Path) -> None:
    """Restore an older folder whose replacement was killed between its two renames."""
    if not target.exists():
        for old in target.parent.glob(f".{glob.escape(target.name)}.old.*/old"):
            with contextlib.suppress(OSError):
                os.rename(old, target)
                old.parent.rmdir()
                return
