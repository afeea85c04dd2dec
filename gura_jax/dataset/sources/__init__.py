"""Inputs of ``gura-jax embed``, of any kind, as one table of clips. A kind is one module and one row of SOURCES."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from gura_jax.audio import HEAR_RATE, check_rate
from gura_jax.dataset.sources.buckets import Objects
from gura_jax.dataset.sources.folders import File, Folder, Pattern
from gura_jax.dataset.sources.hear import HearTask
from gura_jax.dataset.sources.manifests import Manifest
from gura_jax.dataset.sources.source import Options, Source, decoded, encoded, printable
from gura_jax.dataset.sources.tars import Tar
from gura_jax.errors import InputError
from gura_jax.objects import SCHEMES, check_url, scheme

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SOURCES", "Options", "Source", "decoded", "encoded", "open_clip", "printable", "read_inputs"]

SOURCES: list[Source] = [HearTask(), Manifest(), Tar(), *map(Objects, SCHEMES), Folder(), Pattern(), File()]
"""All kinds of inputs; the first that recognises an input reads it."""


def read_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    sample_rate: int = HEAR_RATE,
    root: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
) -> "pa.Table":
    """Read inputs as one table of clips, in the order given.

    Args:
        inputs: each an audio file, a folder (searched at any depth for audio files), a glob pattern, a manifest
            (CSV, JSON Lines or Parquet, with the columns ``id`` and ``path``, perhaps ``offset`` and ``duration`` in
            seconds, and any others), a tar archive or a pattern of them, or the folder of a HEAR task. All but the last
            may be URLs (``s3://``, ``gs://``; files, manifests and archives also ``https://``), and a manifest's paths,
            too.
        sample_rate: of the model. A HEAR task's audio is read at this rate, else at the next higher one that it has,
            else at its highest.
        root: what a manifest's paths are relative to; by default the manifest's folder.
        allow_outside: allow paths and links that lead out of the root, or out of a folder that is searched.

    Returns:
        A row a clip: ``id`` and ``path`` (string), ``offset`` (seconds, 0 at the start), ``duration`` (seconds; null:
        to the end), and further columns of manifests and tasks.

    Raises:
        InputError: no clips, a URL or a manifest that cannot be read, missing columns, a bad or repeated id, a path
            outside the root; names the row.
    """
    import pyarrow as pa

    options = Options(check_rate(sample_rate), None if root is None else os.fspath(root), allow_outside)
    tables: list[pa.Table] = []
    distinct: list[bool] = []  # of each table
    for given in [os.fspath(given) for given in inputs]:
        source = next((source for source in SOURCES if source.recognises(given)), None)
        if source is None:
            raise InputError(f"{check_url(given)}: expected an input of a known kind")
        table = source.table(given, options)
        if table is not None:
            tables.append(table)
            distinct.append(source.distinct)
    if not tables:
        raise InputError(f"expected audio files, found none in {', '.join(map(str, inputs)) or 'no inputs'}")
    if len(tables) == 1 and _all_differ(tables[0]["id"]):
        return tables[0]
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"expected inputs whose columns are of the same types, found: {error}") from None
    return _unique(joined, [each for each, table in zip(distinct, tables, strict=True) for _ in range(len(table))])


def _all_differ(column: "pa.ChunkedArray") -> bool:
    import pyarrow.compute as pc

    return pc.count_distinct(column).as_py() == len(column)  # pyright: ignore[reportAttributeAccessIssue]


def _unique(clips: "pa.Table", distinct: Sequence[bool]) -> "pa.Table":
    """Drop files named twice, unless the later row is distinct; a repeated id is replaced by the path."""
    import pyarrow as pa

    keep: list[int] = []
    names: list[str] = []
    seen: set[tuple[str, float, float | None]] = set()
    taken: set[str] = set()
    columns = (clips[name].to_pylist() for name in ("id", "path", "offset", "duration"))
    for i, (name, path, offset, duration) in enumerate(zip(*columns, strict=True)):
        clip = path if scheme(path) else os.path.abspath(path), offset, duration
        if clip in seen and (name in taken or not distinct[i]):
            continue
        if name in taken:
            name = path if path not in taken else f"{path}#{i}"
        keep.append(i)
        names.append(name)
        seen.add(clip)
        taken.add(name)
    clips = clips.take(pa.array(keep, pa.int64()))
    return clips.set_column(clips.column_names.index("id"), "id", pa.array(names, pa.string()))


def open_clip(path: str) -> BinaryIO:
    """Open a clip's file by the source of its path's scheme: see :meth:`Source.open`.

    Args:
        path: :func:`decoded`.
    """
    kind = scheme(path)
    return next(source for source in SOURCES if source.scheme == kind).open(path)
