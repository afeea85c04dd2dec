"""Audio files as inputs: single files, folders, and glob patterns."""

import functools
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gura_jax.dataset.sources.source import Options, Source, check_inside, clip_table
from gura_jax.errors import InputError
from gura_jax.objects import scheme
from gura_jax.pyav import SUFFIXES

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
            parents: dict[str, str] = {}
            for file in files:
                check_inside(str(file), given, f"{given}: ", parents)
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
    walked = os.walk(folder, onerror=_cannot_list)
    return sorted(Path(root) / name for root, _, names in walked for name in names if is_audio(name))


def is_audio(path: str) -> bool:
    """Whether a path has an audio suffix, and a name that does not start with a dot."""
    name = path.rsplit("/", 1)[-1]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _suffixes()


@functools.cache
def _suffixes() -> set[str]:
    import soundfile

    suffixes = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    return (suffixes | SUFFIXES) - {".raw"}  # samples without a header: of unknown rate


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename}: expected a folder that can be listed, found: {error.strerror}")
