"""Objects as inputs: a prefix of a bucket, a pattern, or one object by its URL, also of a web server."""

import fnmatch
import glob
from typing import TYPE_CHECKING, BinaryIO

from gura_jax import objects
from gura_jax.dataset.sources.folders import is_audio
from gura_jax.dataset.sources.source import Options, Source, clip_table
from gura_jax.errors import AudioError, InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Objects(Source):
    """Objects of one scheme; ids are keys relative to the prefix."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def recognises(self, given: str) -> bool:
        return objects.scheme(given) == self.scheme

    def table(self, given: str, options: Options) -> "pa.Table | None":
        url = objects.check_url(given)
        root, _, key = url.removeprefix(f"{self.scheme}://").partition("/")
        root = f"{self.scheme}://{root}"
        if not glob.has_magic(key):
            if is_audio(key):
                return clip_table([(key.rsplit("/", 1)[-1], url)])
            keys = self._listed(root, key)
        else:
            fixed = key[: next(i for i, c in enumerate(key) if c in "*?[")].rpartition("/")[0]
            keys = [found for found in self._listed(root, fixed) if fnmatch.fnmatchcase(found, key)]
            key = fixed
        skip = len(key) + 1 if key else 0
        return clip_table([(found[skip:], f"{root}/{found}") for found in keys])

    def _listed(self, root: str, prefix: str) -> list[str]:
        """The keys of audio files below a prefix, sorted."""
        url = f"{root}/{prefix}".rstrip("/")
        if self.scheme not in objects.LISTED:
            raise InputError(
                f"{url}: expected an audio file or a manifest, found a URL that cannot be listed: list the clips in a "
                "manifest"
            )
        try:
            return sorted(entry.key for entry in objects.entries(objects.locate(url)) if is_audio(entry.key))
        except OSError as error:
            raise InputError(f"{url}: expected a bucket that can be listed, found: {error.strerror}") from None

    def open(self, path: str) -> BinaryIO:
        try:
            return objects.open_object(path)  # pyright: ignore[reportReturnType]
        except FileNotFoundError as error:
            raise AudioError(f"{path}: expected an audio file, found {error.strerror}") from None
