"""Inputs: files, folders, globs, manifests and HEAR task folders, as one table of clips.

The table has ``id`` and ``path`` (string), ``offset`` (seconds, 0 at the start) and ``duration`` (seconds, null: to the
end), and whatever further columns a manifest has.
"""

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gura_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".parquet")
# Columns that the store writes: a manifest may not have them, but for those that it gives.
RESERVED = ("num_samples", "num_frames", "frame_start", "frame_offset_ms", "frame_hop_ms")
HEAR_METADATA = "task_metadata.json"
HEAR_RATE = 16_000  # Hz; of a task's folders, preferred to the others
_NAMED = "*named by a manifest"  # a column, for a while
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def read_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
) -> "pa.Table":
    """One table of the clips that are named, in the order given.

    Args:
        inputs: each an audio file, a folder (searched at any depth for audio files), a glob pattern, a manifest
            (CSV, JSON Lines or Parquet, with the columns ``id`` and ``path``, perhaps ``offset`` and ``duration`` in
            seconds, and any others), or the folder of a HEAR task.
        root: what a manifest's paths are relative to; by default the manifest's folder.
        allow_outside: allow paths and links that lead out of the root, or out of a folder that is searched.

    Raises:
        InputError: no clips, a URL, a manifest that cannot be read, missing columns, a bad or repeated id, a path
            outside the root; names the row.
    """
    import pyarrow as pa

    tables = [table for given in inputs if (table := _read_input(os.fspath(given), root, allow_outside)) is not None]
    if not tables:
        raise InputError(f"expected audio files, found none in {', '.join(map(str, inputs)) or 'no inputs'}")
    try:
        return _unique(pa.concat_tables(tables, promote_options="permissive").combine_chunks())
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"expected inputs whose columns are of the same types, found: {error}") from None


def _unique(clips: "pa.Table") -> "pa.Table":
    """A file named twice is one clip, unless a manifest names it; clips of one id are told apart by their paths."""
    import pyarrow as pa

    keep: list[int] = []
    names: list[str] = []
    seen: set[tuple[str, float, float | None]] = set()
    taken: set[str] = set()
    columns = (clips[name].to_pylist() for name in ("id", "path", "offset", "duration", _NAMED))
    for i, (name, path, offset, duration, named) in enumerate(zip(*columns, strict=True)):
        clip = os.path.abspath(path), offset, duration
        if clip in seen and (name in taken or not named):
            continue
        if name in taken:
            name = path if path not in taken else f"{path}#{i}"
        keep.append(i)
        names.append(name)
        seen.add(clip)
        taken.add(name)
    clips = clips.take(pa.array(keep, pa.int64())).drop_columns([_NAMED])
    return clips.set_column(clips.column_names.index("id"), "id", pa.array(names, pa.string()))


def _read_input(given: str, root: str | os.PathLike[str] | None, allow_outside: bool) -> "pa.Table | None":
    if _URL.match(given):
        raise InputError(f"{given}: expected a path, found a URL: download it first")
    path = Path(given)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name that no file can have
        is_folder = is_file = False
    if is_folder:
        if (path / HEAR_METADATA).is_file():
            return _hear_task(path)
        files = _audio_files(path)
        if not allow_outside:
            for file in files:
                _check_inside(str(file), path, f"{given}: ")
        return _table([(file.relative_to(path).as_posix(), str(file)) for file in files])
    if is_file and path.suffix.lower() in MANIFEST_SUFFIXES:
        return _manifest(path, Path(root) if root is not None else path.parent, allow_outside)
    if not is_file and glob.has_magic(given):
        found = sorted(p for p in glob.glob(given, recursive=True) if os.path.isfile(p))
        return _table([(Path(p).name, p) for p in found])
    return _table([(path.name, given)])  # if it is missing, that is said with the files that cannot be read


def _table(files: Sequence[tuple[str, str]], **columns: Sequence[Any]) -> "pa.Table | None":
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
            _NAMED: pa.array([False] * len(files)),
        }
        | {name: pa.array(values, pa.string()) for name, values in columns.items()}
    )


def printable(text: str) -> str:
    """A file name that is not Unicode, with its odd bytes as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def encoded(path: str) -> str:
    """A path as Unicode, from which :func:`decoded` makes the same path again, whatever its bytes."""
    return path.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode() if _odd(path) else path


def decoded(path: str) -> str:
    """The path of a file, from :func:`encoded`."""
    return re.sub(r"\\(?:\\|udc([0-9a-f]{2}))", lambda m: chr(0xDC00 + int(m[1], 16)) if m[1] else "\\", path)


def _odd(path: str) -> bool:
    return "\\" in path or any(0xDC80 <= ord(c) <= 0xDCFF for c in path)


def _audio_files(folder: Path) -> list[Path]:
    """Files with an audio suffix, at any depth, sorted; not those whose names start with a dot."""
    import soundfile

    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    suffixes.remove(".raw")  # samples without a header: of unknown rate
    return sorted(
        Path(root) / name
        for root, _, names in os.walk(folder, onerror=_cannot_list)
        for name in names
        if Path(name).suffix.lower() in suffixes and not name.startswith(".")
    )


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: expected a folder that can be listed, found: {error.strerror}")


def _check_inside(path: str, root: Path, where: str, parents: dict[str, str] | None = None) -> None:
    """Refuse a path that leads out of its root, by itself or by a link."""
    real_root = os.path.realpath(root)
    folder, name = os.path.split(path)
    if parents is None:
        parents = {}
    if folder not in parents:
        parents[folder] = os.path.realpath(folder)
    real = os.path.join(parents[folder], name)
    if name in ("", ".", "..") or os.path.islink(real):
        real = os.path.realpath(real)
    if os.path.commonpath([real_root, real]) != real_root:
        raise InputError(
            f"{where}expected a path inside {root}, found {path}, which leads to {real}: "
            "name another --root, or pass --allow-outside"
        )


def _manifest(path: Path, root: Path, allow_outside: bool) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    table = _read_table(path)
    missing = [name for name in ("id", "path") if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: expected the columns id and path (and perhaps offset and duration, in seconds), "
            f"found {', '.join(table.column_names) or 'none'}"
        )
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    reserved = repeated | {name for name in table.column_names if name in RESERVED}
    if reserved:
        raise InputError(
            f"{path}: expected each column once, and none that the store writes ({', '.join(RESERVED)}), "
            f"found {', '.join(sorted(reserved))}: rename it"
        )
    if not len(table):
        raise InputError(f"{path}: expected rows, found an empty manifest")
    columns: dict[str, Any] = {}
    for name in ("id", "path"):
        if not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)) and not (
            name == "id" and pa.types.is_integer(table[name].type)
        ):
            raise InputError(f"{path}: expected the column {name} to hold strings, found {table[name].type}")
        columns[name] = table[name].cast(pa.string())
    for name in ("offset", "duration"):
        values = table[name] if name in table.column_names else pa.nulls(len(table), pa.float64())
        try:
            columns[name] = values.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{path}: expected the column {name} to hold seconds, found: {error}") from None
    columns["offset"] = pc.fill_null(columns["offset"], 0.0)  # pyright: ignore[reportAttributeAccessIssue]

    seen: dict[str, int] = {}
    paths: list[str] = []
    parents: dict[str, str] = {}
    rows = zip(*(columns[name].to_pylist() for name in ("id", "path", "offset", "duration")), strict=True)
    for number, (name, file, offset, duration) in enumerate(rows, 1):
        where = f"{path}, row {number}: "
        if not name or not file:
            raise InputError(f"{where}expected an id and a path, found id {name!r} and path {file!r}")
        if name in seen:
            raise InputError(f"{where}expected ids that differ, found {name!r} of row {seen[name]} again")
        seen[name] = number
        if _URL.match(file):
            raise InputError(f"{where}expected a path, found a URL, {file}: download it first")
        if "\0" in file:
            raise InputError(f"{where}expected a path, found {file!r}")
        if not (math.isfinite(offset) and offset >= 0 and (duration is None or 0 < duration < math.inf)):
            raise InputError(
                f"{where}expected an offset of 0 s or more and a duration over 0 s, found {offset} and {duration}"
            )
        full = os.path.join(root, file)
        if not allow_outside:
            _check_inside(full, root, where, parents)
        paths.append(encoded(full))
    columns["path"] = pa.array(paths, pa.string())
    further = {name: table[name] for name in table.column_names if name not in columns}
    return pa.table(columns | {_NAMED: pa.array([True] * len(table))} | further)


def _read_table(path: Path) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv, parquet
    from pyarrow import json as arrow_json

    strings = {"id": pa.string(), "path": pa.string()}
    try:
        with open(path, "rb") as file:  # Arrow itself opens none whose name is not UTF-8
            if path.suffix.lower() == ".csv":
                options = csv.ConvertOptions(column_types=strings, strings_can_be_null=True)
                table = csv.read_csv(file, convert_options=options)
            elif path.suffix.lower() == ".jsonl":
                table = arrow_json.read_json(file)
            else:
                table = parquet.read_table(file)
        table.validate(full=True)
        str(table.column_names)  # may not be Unicode
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        form = {".csv": "CSV", ".jsonl": "JSON Lines", ".parquet": "Parquet"}[path.suffix.lower()]
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: expected a manifest in {form}, found one that cannot be read: {reason}") from None


def _hear_task(folder: Path) -> "pa.Table":
    """The clips of a task of HEAR, with the columns task, split, file and labels (JSON, as the task has them)."""
    metadata = read_json(folder / HEAR_METADATA)
    splits = metadata.get("splits") if isinstance(metadata, Mapping) else None
    if not isinstance(splits, list) or not all(isinstance(split, str) and split for split in splits) or not splits:
        raise InputError(f"{folder / HEAR_METADATA}: expected 'splits', a list of names, found {splits!r}")
    rates = sorted((int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()), reverse=True)
    if not rates:
        raise InputError(f"{folder}: expected a folder of audio named by its sample rate, like 16000, found none")
    rate = HEAR_RATE if HEAR_RATE in rates else rates[0]
    task = folder.name
    files: list[tuple[str, str]] = []
    columns: dict[str, list[str]] = {"task": [], "split": [], "file": [], "labels": []}
    for split in splits:
        clips = read_json(folder / f"{plain_name(split, folder)}.json")
        if not isinstance(clips, Mapping):
            raise InputError(f"{folder / split}.json: expected an object of file names and labels")
        for name, labels in clips.items():
            path = folder / str(rate) / split / plain_name(name, folder)
            files.append((f"{task}/{split}/{name}", str(path)))
            for column, value in zip(columns, (task, split, name, json.dumps(labels)), strict=True):
                columns[column].append(value)
    table = _table(files, **columns)
    if table is None:
        raise InputError(f"{folder}: expected clips, found none in {', '.join(f'{s}.json' for s in splits)}")
    return table


def plain_name(name: str, where: Path) -> str:
    """A name that is no path, from a file that is not to be trusted."""
    if name in ("", ".", "..") or os.path.basename(name) != name or "\0" in name:
        raise InputError(f"{where}: expected the name of a file in its folder, found {name!r}")
    return name


def read_json(path: Path) -> Any:
    """What a JSON file holds, or an InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, found: {error}") from None


def windows(offset: float, duration: float, window: float, shortest: float) -> Iterable[tuple[float, float]]:
    """Cut a clip into windows (offset, duration), in seconds.

    The last is what is left; where that is under ``shortest``, it is part of the window before.
    """
    count = max(1, math.ceil((duration - shortest) / window))
    for i in range(count):
        start = i * window
        yield offset + start, (window if i < count - 1 else duration - start)
