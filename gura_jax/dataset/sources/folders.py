"""Audio files as inputs: single files, folders, and glob patterns."""

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gura_jax.dataset.sources.source import Options, Source, check_inside, clip_table, scheme
from gura_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Folder(Source):
    """A folder, searched for audio files at any depth; ids are paths relative to it."""

    def recognises(self, given: str) -> bool:
        return os.path.isdir(given)

    def table(self, given: str, options: Options) -> "pa.Table | None":
        folder = Path(given)
        files = _audio_files(folder)
        if not options.allow_outside:
            for file in files:
                check_inside(str(file), folder, f"{given}: ")
        return clip_table([(file.relative_to(folder).as_posix(), str(file)) for file in files])


class Pattern(Source):
    """A glob pattern; ids are file names."""

    def recognises(self, given: str) -> bool:
        return glob.has_magic(given) and not os.path.isfile(given) and not scheme(given)

    def table(self, given: str, options: Options) -> "pa.Table | None":
        found = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
        return clip_table([(Path(path).name, path) for path in found])


class File(Source):
    """A file by its path. A missing one is reported with the files that cannot be read."""

    def recognises(self, given: str) -> bool:
        return not scheme(given)

    def table(self, given: str, options: Options) -> "pa.Table | None":
        return clip_table([(Path(given).name, given)])


def _audio_files(folder: Path) -> list[Path]:
    """List files with an audio suffix, at any depth, sorted; not those whose names start with a dot."""
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
