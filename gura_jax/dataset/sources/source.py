"""What an input of ``gura-jax embed`` provides: a table of its clips, and their bytes."""

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from gura_jax import audio
from gura_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Options(NamedTuple):
    """What applies to all inputs of a run.

    Attributes:
        sample_rate: of the model, in Hz; for inputs that hold the same clips at several rates.
        root: what a manifest's paths are relative to; None: the manifest's folder.
        allow_outside: allow paths and links that lead out of the root, or out of a folder that is searched.
    """

    sample_rate: int
    root: str | None
    allow_outside: bool


class Source(Protocol):
    """A kind of input. Subclasses inherit the defaults, which are those of local files.

    Attributes:
        scheme: of the paths of its clips, as ``s3`` in ``s3://bucket/clip.wav``; empty for local paths.
        distinct: each row is a clip of its own, even if another input has the same file.
        unit: a regular expression for the part of a path that clips share which can only be read together.
    """

    scheme: str = ""
    distinct: bool = False
    unit: str = ""

    def recognises(self, given: str) -> bool:
        """Whether an input is of this kind."""
        ...

    def table(self, given: str, options: Options) -> "pa.Table | None":
        """List the clips of an input.

        Returns:
            The columns ``id`` and ``path`` (string, :func:`encoded`), ``offset`` and ``duration`` (seconds, float64;
            null: to the end), then any others. None: there are no clips.

        Raises:
            InputError: the input is damaged, or refused.
        """
        ...

    def signature(self, given: str, options: Options) -> str | None:
        """Say shortly what :meth:`table` depends on: where it is the same, so is the table. None: read the table.

        Raises:
            InputError: the input cannot be read.
        """
        return None

    def open(self, path: str, version: str | None = None) -> BinaryIO:
        """Open a clip's file to read it; the result can seek. Its attribute ``version`` names its content, if any.

        Args:
            path: :func:`decoded`, with its scheme.
            version: that the file must have, where files have versions.

        Raises:
            AudioError: there is no file; names it.
            OSError: it cannot be read, or was replaced.
        """
        return audio.open_file(path)


def clip_table(files: Sequence[tuple[str, str]], **columns: Sequence[Any]) -> "pa.Table | None":
    """Make the table of whole files, each (id, path), with further columns of strings; None if there are none."""
    import pyarrow as pa

    if not files:
        return None
    names, paths = zip(*files, strict=True)
    return pa.table(
        {
            "id": pa.array([printable(name) for name in names], pa.string()),
            "path": pa.array([encoded(path) for path in paths], pa.string()),
            "offset": pa.array([0.0] * len(files), pa.float64()),
            "duration": pa.nulls(len(files), pa.float64()),
        }
        | {name: pa.array(values, pa.string()) for name, values in columns.items()}
    )


def joined(tables: "Sequence[pa.Table]") -> "pa.Table":
    """Join tables of clips; a column that one lacks is null there.

    Raises:
        InputError: columns of one name have types that no type holds both of.
    """
    import pyarrow as pa

    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"expected inputs whose columns are of the same types, found: {error}") from None


def printable(text: str) -> str:
    """Return a file name as Unicode, with escapes for bytes that are not."""
    return text.encode("utf-8", "backslashreplace").decode()


def encoded(path: str) -> str:
    """Return a path as Unicode, whatever its bytes; :func:`decoded` is the inverse."""
    return path.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode() if _odd(path) else path


def decoded(path: str) -> str:
    """Return the path that :func:`encoded` was given."""
    return re.sub(r"\\(?:\\|udc([0-9a-f]{2}))", lambda m: chr(0xDC00 + int(m[1], 16)) if m[1] else "\\", path)


def _odd(path: str) -> bool:
    return "\\" in path or any(0xDC80 <= ord(c) <= 0xDCFF for c in path)


def check_inside(path: str, root: str, where: str, parents: dict[str, str] | None = None) -> None:
    """Refuse a path that leads out of its root, by itself or by a link.

    Args:
        path: of a file.
        root: a folder.
        where: start of the message.
        parents: real paths of folders, filled for the next calls.

    Raises:
        InputError: it leads elsewhere.
    """
    folder, name = os.path.split(path)
    if parents is None:
        parents = {}
    if root not in parents:
        parents[root] = os.path.realpath(root)
    if folder not in parents:
        parents[folder] = os.path.realpath(folder)
    real_root, real = parents[root], os.path.join(parents[folder], name)
    if name in ("", ".", "..") or os.path.islink(real):
        real = os.path.realpath(real)
    if not real.startswith(os.path.join(real_root, "")):
        raise InputError(
            f"{where}expected a path inside {root}, found {path}, which leads to {real}: "
            "name another --root, or pass --allow-outside"
        )
