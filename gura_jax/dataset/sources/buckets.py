"""Objects as inputs: a prefix of a bucket, a pattern, or one object by its URL, also of a web server."""

import fnmatch
import glob
import re
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
        if is_audio(url) and not glob.has_magic(url):
            return clip_table([(url.rsplit("/", 1)[-1], url)])
        prefix = _fixed(url) if glob.has_magic(url) else url
        found = [each for each in matching(url if glob.has_magic(url) else f"{url}/*") if is_audio(each)]
        return clip_table([(each[len(prefix) + 1 :], each) for each in found])

    def open(self, path: str) -> BinaryIO:
        try:
            return objects.open_object(path)  # pyright: ignore[reportReturnType]
        except FileNotFoundError as error:
            raise AudioError(f"{path}: expected an audio file, found {error.strerror}") from None


def matching(url: str) -> list[str]:
    """The URLs of objects that match a pattern, sorted; that of one object as it is.

    Raises:
        InputError: the bucket cannot be listed.
    """
    if not glob.has_magic(url):
        return [url]
    kind, fixed = objects.scheme(url), _fixed(url)
    if kind not in objects.LISTED:
        raise InputError(
            f"{url.removesuffix('/*')}: expected an audio file or a manifest, found a URL that cannot be listed: list "
            "the clips in a manifest"
        )
    root = re.match(r"[^:]+://[^/]+", url)
    assert root is not None, "it was checked"
    try:
        found = (f"{root[0]}/{entry.key}" for entry in objects.entries(objects.locate(fixed)))
        return sorted(each for each in found if fnmatch.fnmatchcase(each, url))
    except OSError as error:
        raise InputError(f"{fixed}: expected a bucket that can be listed, found: {error.strerror}") from None


def _fixed(url: str) -> str:
    """The prefix of a pattern that has no wildcards."""
    return url[: next(i for i, c in enumerate(url) if c in "*?[")].rpartition("/")[0]
