"""Inputs of ``gura-jax embed``, of any kind, as one table of clips. A kind is one module and one row of SOURCES."""

import functools
import glob
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from gura_jax.audio import HEAR_RATE, check_rate
from gura_jax.dataset.sources.buckets import Objects
from gura_jax.dataset.sources.containers import containers
from gura_jax.dataset.sources.folders import File, Folder, Pattern
from gura_jax.dataset.sources.hear import HearTask
from gura_jax.dataset.sources.manifests import Manifest
from gura_jax.dataset.sources.source import Options, Source, decoded, encoded, joined, printable
from gura_jax.dataset.sources.tables import AudioTable
from gura_jax.dataset.sources.tars import Tar
from gura_jax.errors import InputError
from gura_jax.objects import LISTED, SCHEMES, check_place, check_url, scheme

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = [
    "SOURCES",
    "Inputs",
    "Options",
    "Source",
    "decoded",
    "encoded",
    "open_clip",
    "printable",
    "read_inputs",
    "units",
]

SOURCES: list[Source] = [
    HearTask(),
    AudioTable(),
    Manifest(),
    Tar(),
    *map(Objects, SCHEMES),
    Folder(),
    Pattern(),
    File(),
]
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
            seconds, and any others), a tar archive, a Parquet table with a column of audio, a pattern or a folder of
            these, or the folder of a HEAR task. All but the last may be URLs (``s3://``, ``gs://``, ``hf://``; files,
            manifests and archives also ``https://``), and a manifest's paths, too.
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
    options = Options(check_rate(sample_rate), None if root is None else os.fspath(root), allow_outside)
    tables: list[pa.Table] = []
    distinct: list[bool] = []  # of each table
    for given in [check_place(os.fspath(given)) for given in inputs]:
        source = next((source for source in SOURCES if source.recognises(given)), None)
        if source is None:
            raise InputError(f"{check_url(given)}: expected an input of a known kind")
        table = source.table(given, options)
        for own, clips in [(source, table)] if table is not None else _packed(given):
            tables.append(clips)
            distinct.append(own.distinct)
    if not tables:
        raise InputError(f"expected audio files, found none in {', '.join(map(str, inputs)) or 'no inputs'}")
    if len(tables) == 1 and _all_differ(tables[0]["id"]):
        return tables[0]
    rows = [each for each, table in zip(distinct, tables, strict=True) for _ in range(len(table))]
    return _unique(joined(tables), rows)


def _packed(given: str) -> "list[tuple[Source, pa.Table]]":
    """The clips in tables and archives of a folder, a prefix or a data set that has no audio files, by their kind."""
    if scheme(given) in LISTED and not glob.has_magic(given):
        folder = given.rstrip("/")
    elif os.path.isdir(given):
        folder = glob.escape(given)
    else:
        return []
    kinds = (AudioTable(), Tar())
    suffixes = tuple(suffix for source in kinds for suffix in source.suffixes)
    found = containers(f"{folder}/**/*", suffixes)
    tables = [(source, source.clips(source.own(found))) for source in kinds]
    return [(source, table) for source, table in tables if table is not None]


class Inputs:
    """What a run is given, read when it is needed: a run that goes on need not read it again.

    Args:
        inputs: as of :func:`read_inputs`, as are the others.
        sample_rate, root, allow_outside: see there.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        *,
        sample_rate: int = HEAR_RATE,
        root: str | os.PathLike[str] | None = None,
        allow_outside: bool = False,
    ) -> None:
        self._inputs = [os.fspath(given) for given in inputs]
        self._options = Options(check_rate(sample_rate), None if root is None else os.fspath(root), allow_outside)

    @functools.cached_property
    def table(self) -> "pa.Table":
        """The clips, as :func:`read_inputs` returns them."""
        return read_inputs(self._inputs, **self._options._asdict())

    @functools.cached_property
    def signature(self) -> str | None:
        """A hash that is the same where the table is; None where only the table tells."""
        found: list[str] = []
        for given in self._inputs:
            source = next((source for source in SOURCES if source.recognises(given)), None)
            own = source.signature(given, self._options) if source is not None else None
            if own is None:
                return None
            found.append(own)
        return hashlib.sha256("\n".join(found).encode("utf-8", "backslashreplace")).hexdigest()

    @property
    def shortest(self) -> "Inputs | pa.Table":
        """What to give to other processes: what they need not read themselves."""
        return self if self.signature is not None else self.table


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


def open_clip(path: str, version: str | None = None) -> BinaryIO:
    """Open a clip's file by the source of its path's scheme: see :meth:`Source.open`.

    Args:
        path: :func:`decoded`.
        version: that the file must have.
    """
    kind = scheme(path)
    return next(source for source in SOURCES if source.scheme == kind).open(path, version)


def units(paths: "pa.ChunkedArray") -> "np.ndarray | None":
    """Number the clips that can only be read together, [n]; -1: by itself. None if there are none of these."""
    import pyarrow.compute as pc

    c: Any = pc  # its functions are made when it is imported
    patterns = [source.unit for source in SOURCES if source.unit]
    found = c.struct_field(c.extract_regex(paths, f"(?P<unit>{'|'.join(patterns)})"), "unit")
    if found.null_count == len(found):
        return None
    return c.fill_null(c.dictionary_encode(found).combine_chunks().indices, -1).to_numpy()
