"""Objects as inputs: a prefix of a bucket, a pattern, or one object by its URL, also of a web server."""

import glob
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from gura_jax import objects
from gura_jax.dataset.sources.folders import is_audio
from gura_jax.dataset.sources.source import Options, Source, clip_table
from gura_jax.errors import AudioError, InputError

if TYPE_CHECKING:
    import pyarrow as pa

NAMES_AT_ONCE = 1 << 16


class Objects(Source):
    """Objects of one scheme; ids are keys relative to the prefix."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def recognises(self, given: str) -> bool:
        return objects.scheme(given) == self.scheme

    def table(self, given: str, options: Options) -> "pa.Table | None":
        import pyarrow as pa

        url = objects.pinned(objects.check_url(given))
        if is_audio(url) and is_one(url):
            return clip_table([(url.rsplit("/", 1)[-1], url)])
        prefix = _fixed(url) if glob.has_magic(url) else url
        found = (each for each, *_ in listed(url if glob.has_magic(url) else f"{url}/**") if is_audio(each))
        tables: list[pa.Table] = []
        # A million names are held as Arrow does, not one by one.
        while page := clip_table([(each[len(prefix) + 1 :], each) for each in itertools.islice(found, NAMES_AT_ONCE)]):
            tables.append(page)
        return pa.concat_tables(tables).sort_by("path") if tables else None

    def signature(self, given: str, options: Options) -> str | None:
        return objects.pinned(objects.check_url(given)) if self.scheme in objects.PINNED else None

    def open(self, path: str, version: str | None = None) -> BinaryIO:
        try:
            return objects.open_object(path, version=version)  # pyright: ignore[reportReturnType]
        except FileNotFoundError as error:
            raise AudioError(f"{path}: expected an audio file, found {error.strerror}") from None


def listed(url: str) -> Iterator[objects.Entry]:
    """Iterate over the objects that match a pattern, with their URLs as keys.

    Raises:
        InputError: the bucket cannot be listed.
    """
    kind, fixed = objects.scheme(url), _fixed(url)
    if kind not in objects.LISTED:
        raise InputError(
            f"{url.removesuffix('/**')}: expected an audio file or a manifest, found a URL that cannot be listed: list "
            "the clips in a manifest"
        )
    root, pattern = objects.bucket(url), _compiled(url)
    try:
        for entry in objects.entries(objects.locate(fixed)):
            if pattern.fullmatch(each := f"{root}/{entry.key}"):
                yield entry._replace(key=each)
    except OSError as error:
        raise InputError(f"{fixed}: expected a bucket that can be listed, found: {error.strerror}") from None


def is_one(url: str) -> bool:
    """Whether a URL names one object: it has no wildcards, or there is an object of that very name."""
    if not glob.has_magic(url):
        return True
    try:
        objects.entry(objects.locate(url))
    except OSError:
        return False
    return True


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as in a shell: ``*`` and ``?`` stay within a folder, ``**/`` is any number of folders."""
    out = ""
    while pattern:
        found = re.match(r"\*\*/|\*\*|\*|\?|\[(!?)([^]]+)\]", pattern)
        if found is None:
            out, pattern = out + re.escape(pattern[0]), pattern[1:]
            continue
        plain = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        chosen = f"[{'^' if found[1] else ''}{re.escape(found[2] or '').replace(chr(92) + '-', '-')}]"
        out, pattern = out + plain.get(found[0], chosen), pattern[found.end() :]
    return re.compile(out, re.DOTALL)


def _fixed(url: str) -> str:
    """The prefix of a pattern that has no wildcards."""
    return url[: next(i for i, c in enumerate(url) if c in "*?[")].rpartition("/")[0]
