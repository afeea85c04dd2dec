"""Files that hold many clips, local or in a bucket: tar archives and tables. Found by name or pattern, and opened."""

import glob
import hashlib
import json
import os
from typing import Any

from gura_jax import objects
from gura_jax.dataset.sources.buckets import listed
from gura_jax.errors import InputError


def containers(given: str) -> list[str]:
    """The files that an input names: one, or those that match a pattern, in order."""
    if objects.scheme(given):
        url = objects.pinned(objects.check_url(given))
        return sorted(listed(url)) if glob.has_magic(url) else [url]
    if glob.has_magic(given) and not os.path.isfile(given):
        return sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
    return [given]


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
